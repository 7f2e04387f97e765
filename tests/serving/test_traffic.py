"""The traffic that survives restarts, and that several workers count together."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import threading

import pytest

from ltx2_pool.serving import traffic as traffic_module
from ltx2_pool.serving.traffic import HALF_LIFE, Traffic
from ltx2_pool.words.shapes import Key, Shape
from tests.serving.made_up import until

A, B, C = Key(Shape(64, 64, 9)), Key(Shape(96, 64, 17)), Key(Shape(64, 96, 9))


def test_it_survives_a_restart_and_fades(tmp_path):
    now = 1e9
    path = tmp_path / "traffic.json"
    first = Traffic(path, clock=lambda: now)
    for shape in (B, B, B, C):
        first.count(shape)
    first.save()
    now += HALF_LIFE
    second = Traffic(path, clock=lambda: now)
    assert second.scores() == pytest.approx({str(B): 1.5, str(C): 0.5})
    assert second.top([A, B, C], 2) == [B, C]
    second.count(A)
    second.count(A)
    assert second.top([A, B, C], 3) == [A, B, C]
    now -= 100 * HALF_LIFE  # a clock that is set back makes nothing count more
    assert second.scores() == pytest.approx({str(A): 2, str(B): 1.5, str(C): 0.5})


def test_two_workers_on_one_cache_root_add_up(tmp_path):
    path = tmp_path / "traffic.json"
    clock = 1e9
    one, two = (Traffic(path, clock=lambda: clock) for _ in range(2))
    one.count(A)
    two.count(A)
    two.count(B)
    for _ in range(3):  # whoever saves last, and however often, nothing is lost and nothing counts twice
        one.save()
        two.save()
    one.count(C)
    one.save()
    assert one.scores() == Traffic(path, clock=lambda: clock).scores() == {str(A): 2, str(B): 1, str(C): 1}
    two.count(C)
    two.save()
    assert two.scores() == {str(A): 2, str(B): 1, str(C): 2}


def test_what_is_counted_while_the_file_is_written_is_saved_next(tmp_path, monkeypatch):
    path = tmp_path / "traffic.json"
    traffic = Traffic(path, clock=lambda: 1e9)
    traffic.count(A)
    monkeypatch.setattr(os, "fsync", lambda _: traffic.count(A))
    traffic.save()
    monkeypatch.undo()
    assert traffic.scores() == {str(A): 2}
    assert Traffic(path, clock=lambda: 1e9).scores() == {str(A): 1}
    traffic.save()
    assert Traffic(path, clock=lambda: 1e9).scores() == {str(A): 2}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"scores": 3}', '{"scores": {"a": "x"}, "at": 1}', "\0\0\0"])
def test_a_torn_file_is_no_reason_not_to_start(tmp_path, content, caplog):
    path = tmp_path / "traffic.json"
    path.write_text(content)
    traffic = Traffic(path)
    assert traffic.scores() == {}
    assert "counted from zero" in caplog.text
    traffic.count(A)
    traffic.save()
    assert json.loads(path.read_text())["scores"].keys() == {str(A)}
    assert {p.name for p in tmp_path.iterdir()} == {"traffic.json", ".traffic.json.lock"}


def test_a_save_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    traffic = Traffic(tmp_path / "traffic.json")
    traffic.count(A)
    monkeypatch.setattr(os, "fsync", fail)
    traffic.save()
    assert [p.name for p in tmp_path.iterdir()] == [".traffic.json.lock"]
    monkeypatch.undo()
    traffic.save()
    assert Traffic(tmp_path / "traffic.json").scores().keys() == {str(A)}


def test_without_a_place_to_write_it_counts_on(tmp_path, caplog):
    traffic = Traffic(tmp_path / "no" / "such" / "directory.json")
    for _ in range(2):
        traffic.count(A)
        traffic.save()
    assert traffic.top([B, A], 1) == [A]
    assert caplog.text.count("not remembered") == 1


def test_a_lock_that_somebody_holds_costs_nothing_but_this_save(tmp_path, monkeypatch):
    monkeypatch.setattr(traffic_module, "_LOCK_WAIT", 0)
    path = tmp_path / "traffic.json"
    traffic = Traffic(path, clock=lambda: 1e9)
    traffic.count(A)
    with (tmp_path / ".traffic.json.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        traffic.save()
        assert not path.exists()
    traffic.save()
    assert Traffic(path, clock=lambda: 1e9).scores() == {str(A): 1}


async def test_it_is_kept_off_the_loop(tmp_path, monkeypatch):
    path = tmp_path / "traffic.json"
    traffic = Traffic(path)
    where = []
    monkeypatch.setattr(os, "fsync", lambda _: where.append(threading.current_thread()))
    keeping = asyncio.create_task(traffic.keep(interval=0.001))
    for _ in range(2):
        traffic.count(A)
    assert not path.exists()
    await until(path.exists)
    assert threading.main_thread() not in where
    keeping.cancel()
    await asyncio.wait({keeping})
