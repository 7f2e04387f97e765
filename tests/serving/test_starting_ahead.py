"""What is started before anybody asks: in which order, on which devices, and beside what."""

from __future__ import annotations

from typing import Any

from ltx2_pool.serving.actions import Pause, Spawn, Wake
from ltx2_pool.serving.ledger import Phase
from ltx2_pool.words.protocol import Memory
from ltx2_pool.words.shapes import Key

from .choices import GANG, NOW, A, B, C, D, Worker


def test_one_process_at_a_time_is_started_ahead_on_a_device_in_the_operators_order():
    worker = Worker(devices=2)
    assert worker.starts_ahead(B, A, C) == [(B, ("d0",)), (A, ("d1",))]


def test_nothing_is_started_ahead_beside_a_start():
    worker = Worker(devices=2)
    worker.has(C, "d0", phase=Phase.SPAWNING)
    assert worker.starts_ahead(A, B) == [(A, ("d1",))]
    worker = Worker(devices=2, budget=None)
    worker.has(C, "d0", phase=Phase.LOADING)
    assert worker.starts_ahead(A, B) == [(A, ("d1",))]
    worker.has(D, "d1", phase=Phase.LOADING)
    assert worker.starts_ahead(A, B) == []


def test_what_works_is_no_reason_to_start_nothing_ahead():
    worker = Worker()
    worker.has(C, phase=Phase.GENERATING)
    assert worker.starts_ahead(A) == [(A, ("d0",))]


def test_a_key_that_has_a_process_is_not_started_ahead_and_the_next_one_is():
    worker = Worker()
    worker.has(A)
    assert worker.starts_ahead(A, B) == [(B, ("d0",))]


def test_a_key_whose_starts_fail_is_passed_over_until_its_pause_ends():
    worker = Worker()
    paused = {A: Pause(NOW + 7, ""), C: Pause(NOW + 5, ""), B: Pause(NOW, "is over")}
    for ahead in ((A, C, B), (C, A, B)):
        actions = worker.decides(ahead=ahead, pauses=paused)
        assert actions == [Spawn(B, ("d0",), True, "started ahead"), Wake(NOW + 5)]


def test_the_fleet_says_what_is_started_ahead_first_and_the_operator_how_many():
    worth = {A: 1.0, B: 3.0, C: 2.0, D: 2.0}.__getitem__
    assert worker_starts(worth=worth) == [B, C, D, A]
    assert worker_starts(worth=worth, most_ahead=3) == [B, C, D]
    assert worker_starts(worth=worth, most_ahead=0) == []
    assert worker_starts(most_ahead=2) == [A, B]


def worker_starts(**state: Any) -> list[Key]:
    return [key for key, _ in Worker(devices=4).starts_ahead(A, B, C, D, **state)]


def test_nothing_is_started_ahead_while_a_job_waits():
    worker = Worker(devices=2)
    worker.has(A, "d0", phase=Phase.GENERATING)
    worker.asks(A)
    assert worker.starts_ahead(B) == []


def test_nothing_is_started_ahead_where_it_did_not_do_well():
    assert Worker(devices=2).starts_ahead(A, avoid={A: ["d0"]}) == [(A, ("d1",))]


def test_a_key_that_lacks_memory_leaves_the_device_to_the_next():
    worker = Worker(budget=55, unknown=[C])
    worker.ledger.observe(C, Memory(resident=10, peak=12))
    worker.has(B, phase=Phase.GENERATING)
    assert worker.starts_ahead(A, C) == [(C, ("d0",))]


def test_a_gang_is_left_the_devices_on_which_least_is_where_it_may_be():
    worker = Worker(devices=3)
    worker.has(A, "d0")
    worker.has(B, "d0", phase=Phase.SPAWNING)
    worker.has(B, "d1", phase=Phase.SPAWNING)
    assert worker.starts_ahead(GANG, C) == []  # it waits for d1 and d2
    assert worker.starts_ahead(GANG, C, avoid={GANG: ["d2"]}) == [(C, ("d2",))]


def test_a_gang_is_started_ahead_where_it_has_room_on_all_of_its_devices():
    worker = Worker(devices=3, max_processes=1)
    worker.has(A, "d1")
    assert worker.starts_ahead(GANG, B) == [(GANG, ("d0", "d2"))]
    worker.has(B, "d0")
    assert worker.starts_ahead(GANG, C) == [(C, ("d2",))]  # no device need wait for a gang that has no room
