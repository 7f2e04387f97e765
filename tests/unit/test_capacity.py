"""K by memory, the breaker's pauses, and the traffic that survives restarts."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltx2_pool.serving.breaker import Breaker
from ltx2_pool.serving.capacity import FixedCapacity, MemoryCapacity, main_memory
from ltx2_pool.serving.traffic import HALF_LIFE, Traffic
from ltx2_pool.words.protocol import Lending, Memory
from ltx2_pool.words.shapes import Shape

A, B, C = Shape(64, 64, 9), Shape(96, 64, 17), Shape(64, 96, 9)
GB = 10**9


def on_gpu(total: int, reserve: int = 0, **known: Memory) -> MemoryCapacity:
    capacity = MemoryCapacity(reserve, known={{"A": A, "B": B, "C": C}[name]: memory for name, memory in known.items()})
    capacity.lent(Lending(pid=1, import_s=0, load_s=0, bytes=9 * GB, overhead=1 * GB, device_total=total))
    return capacity


def test_shapes_fit_while_weights_residents_and_the_highest_peaks_do():
    memory = {name: Memory(resident=GB, peak=peak * GB) for name, peak in (("A", 3), ("B", 5), ("C", 2))}
    # 10 lent + 3 resident + two at their peaks: 4 and 2 above what they keep
    assert on_gpu(19 * GB, **memory).fits([A, B, C])
    assert not on_gpu(19 * GB - 1, **memory).fits([A, B, C])
    assert not on_gpu(19 * GB, reserve=1, **memory).fits([A, B, C])
    assert on_gpu(18 * GB, **memory).fits([A, B])


def test_one_process_may_always_be_tried_and_nothing_measured_means_one():
    assert on_gpu(0).fits([A])
    assert not on_gpu(1000 * GB).fits([A, B])


def test_a_shape_never_measured_is_expected_to_need_more_in_proportion():
    capacity = on_gpu(100 * GB, A=Memory(resident=GB, peak=2 * GB))
    factor = 96 * 64 * 17 / (64 * 64 * 9)
    assert capacity.expected(B) == Memory(resident=int(GB * factor), peak=int(2 * GB * factor))
    assert capacity.expected(Shape(32, 32, 9)) == Memory(resident=GB, peak=2 * GB)


def test_private_weights_count_for_each_process():
    own = Memory(resident=GB, peak=GB, weights=60 * GB)
    capacity = MemoryCapacity(0, known={A: own, B: own})
    capacity._total = 121 * GB
    assert not capacity.fits([A, B])
    capacity._total = 122 * GB
    assert capacity.fits([A, B])


def test_the_highest_peak_counts_and_the_last_resident_size():
    capacity = on_gpu(100 * GB)
    for resident, peak in ((2, 9), (1, 3)):
        capacity.observe(A, Memory(resident=resident * GB, peak=peak * GB))
    assert capacity.expected(A) == Memory(resident=GB, peak=9 * GB)


@given(st.integers(1, 64), st.integers(0, 100))
def test_a_number_means_exactly_that_many(size, shapes):
    assert FixedCapacity(size).fits([Shape(32 * (n + 1), 32, 9) for n in range(shapes)]) == (shapes <= size)


def test_main_memory_respects_the_control_group(tmp_path):
    everything = main_memory(tmp_path)
    assert everything > 0
    (tmp_path / "memory.current").write_text("1000")
    (tmp_path / "memory.max").write_text("5000\n")
    assert main_memory(tmp_path) == 4000
    (tmp_path / "memory.max").write_text("max\n")
    assert main_memory(tmp_path) == pytest.approx(everything, rel=0.2)


def test_the_breaker_opens_at_the_third_failure_and_for_longer_each_time():
    now = 0.0
    breaker = Breaker(first=30, longest=100, clock=lambda: now)
    pauses = []
    for _ in range(7):
        breaker.failed()
        pauses.append(breaker.remaining)
    assert pauses == [0, 0, 30, 60, 100, 100, 100]
    now = 100.0
    assert breaker.remaining == 0
    breaker.failed()
    assert breaker.remaining == 100
    breaker.succeeded()
    assert (breaker.remaining, breaker.failures) == (0, 0)


def test_traffic_survives_a_restart_and_fades(tmp_path):
    now = 1e9
    path = tmp_path / "traffic.json"
    first = Traffic(path, clock=lambda: now)
    for shape in (B, B, B, C):
        first.count(shape)
    first.save()
    now += HALF_LIFE
    second = Traffic(path, clock=lambda: now)
    assert second.scores() == pytest.approx({B.key: 1.5, C.key: 0.5})
    assert second.top([A, B, C], 2) == [B, C]
    second.count(A)
    second.count(A)
    assert second.top([A, B, C], 3) == [A, B, C]
    now -= 100 * HALF_LIFE  # a clock that is set back makes nothing count more
    assert second.scores() == pytest.approx({A.key: 2, B.key: 1.5, C.key: 0.5})


@pytest.mark.parametrize("content", ["", "{", "[]", '{"scores": 3}', '{"scores": {"a": "x"}, "at": 1}', "\0\0\0"])
def test_a_torn_traffic_file_is_no_reason_not_to_start(tmp_path, content, caplog):
    path = tmp_path / "traffic.json"
    path.write_text(content)
    traffic = Traffic(path)
    assert traffic.scores() == {}
    assert "counted anew" in caplog.text
    traffic.count(A)
    assert json.loads(path.read_text())["scores"].keys() == {A.key}
    assert [p.name for p in tmp_path.iterdir()] == ["traffic.json"]


def test_traffic_without_a_place_to_write_counts_on(tmp_path):
    traffic = Traffic(tmp_path / "no" / "such" / "directory.json")
    for _ in range(2):
        traffic.count(A)
    assert traffic.top([B, A], 1) == [A]
