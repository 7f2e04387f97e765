"""When a key gets another process, where, and in whose place."""

from __future__ import annotations

import pytest

from ltx2_pool.serving.actions import Evict, Pause, Spawn, Start, Wake
from ltx2_pool.serving.ledger import Phase

from .choices import GANG, NOW, PATIENCE, A, B, C, Worker


def test_more_jobs_than_a_keys_process_can_take_get_a_copy_on_a_device_with_a_lease_to_spare():
    worker = Worker(devices=2)
    worker.has(A, "d0", phase=Phase.GENERATING)
    worker.asks(A)
    copy = Spawn(A, ("d1",), False, "more jobs wait than its processes can take")
    assert worker.decides() == [copy]
    assert worker.decides(avoid={A: ["d1"]}) == []  # it need not be there
    assert worker.decides(pauses={A: Pause(NOW + 1, "")}) == [Wake(NOW + 1)]
    worker.has(B, "d1", phase=Phase.GENERATING)
    assert worker.decides() == []


def test_each_job_that_waits_gets_a_copy_of_its_own():
    worker = Worker(devices=4)
    worker.has(A, "d0", phase=Phase.GENERATING)
    worker.asks(A)
    worker.asks(A)
    copies = [Spawn(A, (device,), False, "more jobs wait than its processes can take") for device in ("d1", "d2")]
    assert worker.decides() == copies


def test_a_job_that_starts_gets_no_copy():
    worker = Worker(devices=2)
    process = worker.has(A, "d0")
    job = worker.asks(A)
    assert worker.decides() == [Start(job, process, Phase.GENERATING)]


def test_a_job_whose_process_lacks_a_lease_gets_a_copy():
    worker = Worker(devices=2)
    worker.has(A, "d0")
    worker.has(B, "d0", phase=Phase.GENERATING)
    worker.asks(A)
    assert worker.decides() == [Spawn(A, ("d1",), False, "more jobs wait than its processes can take")]


def test_a_job_waits_for_the_process_that_starts_and_the_next_one_gets_a_copy():
    worker = Worker(devices=3)
    worker.has(A, "d0", phase=Phase.GENERATING)
    worker.has(A, "d1", phase=Phase.SPAWNING, hot=False)
    worker.asks(A)
    assert worker.decides() == []
    worker.asks(A)
    assert worker.decides() == [Spawn(A, ("d2",), False, "more jobs wait than its processes can take")]


def test_a_job_waits_for_the_process_whose_weights_still_load():
    worker = Worker(budget=[100, None, 100])
    worker.has(A, "d0", phase=Phase.GENERATING)
    worker.has(A, "d1", phase=Phase.LOADING, hot=False)
    worker.asks(A)
    assert worker.decides() == []


def test_a_gang_gets_a_copy_where_it_has_all_of_its_devices():
    for devices in (3, 4):
        worker = Worker(devices)
        worker.has(GANG, "d0", "d1", phase=Phase.GENERATING)
        worker.asks(GANG)
        copy = Spawn(GANG, ("d2", "d3"), False, "more jobs wait than its processes can take")
        assert worker.decides() == ([copy] if devices == 4 else [])


def test_a_copy_takes_the_place_of_a_copy_before_a_keys_last_process():
    worker = Worker(devices=4, max_processes=1)
    worker.has(A, "d0", phase=Phase.GENERATING)
    worker.has(B, "d1")
    idle, _ = worker.has(C, "d2"), worker.has(C, "d3", phase=Phase.GENERATING)
    worker.asks(A, NOW - PATIENCE)
    assert worker.decides() == [Evict(idle, f"a copy of {A} on d2")]


def test_for_a_copy_of_a_gang_all_of_its_devices_are_cleared_or_none():
    worker = Worker(devices=4, max_processes=1)
    worker.has(GANG, "d0", "d1", phase=Phase.GENERATING)
    idle = [worker.has(B, "d2"), worker.has(C, "d3")]
    worker.asks(GANG, NOW - PATIENCE)
    assert worker.decides() == [Evict(each, f"a copy of {GANG} on {each.devices[0]}") for each in idle]
    job = worker.asks(C)
    assert worker.decides() == [Start(job, idle[1], Phase.GENERATING)]


@pytest.mark.parametrize("phase", [Phase.SPAWNING, Phase.GENERATING])
def test_a_key_gets_no_copy_before_a_process_of_it_has_shown_that_it_works(phase):
    worker = Worker(devices=2)
    worker.has(A, "d0", phase=phase, hot=False)
    worker.asks(A)
    worker.asks(A)
    assert worker.decides() == []


@pytest.mark.parametrize("awaited", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_a_copy_takes_the_place_of_what_nobody_waits_for_when_the_patience_is_over(late, awaited):
    worker = Worker(devices=3, max_processes=1)
    worker.has(A, "d0", phase=Phase.GENERATING)
    idle, _ = worker.has(B, "d1"), worker.has(C, "d2", phase=Phase.GENERATING)
    worker.asks(A, NOW - PATIENCE if late else NOW)
    job = worker.asks(B) if awaited else None
    start = [Start(job, idle, Phase.GENERATING)] if job is not None else []
    evict = [Evict(idle, f"a copy of {A} on d1")] if not awaited else []
    assert worker.decides() == (evict + start if late else [*start, Wake(NOW + PATIENCE)])
