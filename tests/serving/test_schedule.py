"""What the decision chooses where it has a choice; what it never does is in test_histories."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ltx2_pool.serving.actions import Action, Pause, Spawn, State, Waiting, Wake
from ltx2_pool.serving.ledger import Ledger, Phase, Reservation
from ltx2_pool.serving.schedule import decide
from ltx2_pool.words.protocol import Memory
from ltx2_pool.words.shapes import Key, Shape

A, B, C, D = (Key(Shape(32 * n, 32, 9)) for n in range(1, 5))
GANG = Key(Shape(640, 320, 9))
NOW = 100.0
PATIENCE = 10.0


class Worker:
    """Devices and processes; every key takes 10 bytes between two jobs and 30 in one."""

    def __init__(self, devices: int = 1, budget: int | None = 100, unknown: Iterable[Key] = (), **options: Any) -> None:
        self.ledger = Ledger({f"d{number}": budget for number in range(devices)}, **options)
        for key in (A, B, C, D, GANG):
            if key not in unknown:
                self.ledger.observe(key, Memory(resident=10, peak=30))
        self.jobs: list[Waiting] = []

    def has(self, key: Key, *devices: str, phase: Phase = Phase.IDLE, hot: bool = True) -> Reservation:
        """A process of the key, used after all others."""
        process = self.ledger.reserve(len(self.ledger.reservations), key, devices or ("d0",))
        if phase is not process.phase:
            self.ledger.enter(process, Phase.GENERATING)
            self.ledger.enter(process, phase)
        process.hot = hot
        return process

    def asks(self, key: Key, since: float = NOW, alone: bool = False) -> Waiting:
        self.jobs.append(Waiting(len(self.jobs), key, since, alone=alone))
        return self.jobs[-1]

    def decides(self, **state: Any) -> list[Action]:
        return decide(State(NOW, self.jobs, self.ledger, **{"gpus": {GANG: 2}, "patience": PATIENCE, **state}))

    def starts_ahead(self, *ahead: Key, **state: Any) -> list[tuple[Key, tuple[str, ...]]]:
        actions = self.decides(ahead=ahead, **state)
        return [(action.key, action.devices) for action in actions if isinstance(action, Spawn) and action.warm]


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
    actions = worker.decides(ahead=(A, C, B), pauses=paused)
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


def test_a_gang_is_started_ahead_where_it_has_room_on_all_of_its_devices():
    worker = Worker(devices=3, max_processes=1)
    worker.has(A, "d1")
    assert worker.starts_ahead(GANG, B) == [(GANG, ("d0", "d2"))]
    worker.has(B, "d0")
    assert worker.starts_ahead(GANG, C) == [(C, ("d2",))]  # no device need wait for a gang that has no room
