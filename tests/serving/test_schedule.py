"""What the decision chooses where it has a choice; what it never does is in test_histories."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from ltx2_pool.serving.actions import Action, Evict, Pause, Refuse, Spawn, Start, State, Waiting, Wake
from ltx2_pool.serving.ledger import Ledger, Phase, Reservation
from ltx2_pool.serving.schedule import decide
from ltx2_pool.words.protocol import Memory
from ltx2_pool.words.shapes import Key, Shape

A, B, C, D = (Key(Shape(32 * n, 32, 9)) for n in range(1, 5))
OTHER, GANG = Key(Shape(320, 320, 9)), Key(Shape(640, 320, 9))
NOW = 100.0
PATIENCE = 10.0


class Worker:
    """Devices and processes; every key takes 10 bytes between two jobs and 30 in one."""

    def __init__(self, devices: int = 1, budget: Any = 100, unknown: Iterable[Key] = (), **options: Any) -> None:
        budgets = budget if isinstance(budget, list) else [budget] * devices
        self.ledger = Ledger({f"d{number}": each for number, each in enumerate(budgets)}, **options)
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


def test_a_job_starts_in_a_hot_process_before_another_and_where_least_works():
    worker = Worker(devices=3)
    worker.has(A, "d0", hot=False)
    worker.has(A, "d1")
    worker.has(B, "d1", phase=Phase.ENCODING)
    best = worker.has(A, "d2")
    worker.has(A, "d2")
    job = worker.asks(A)
    assert worker.decides() == [Start(job, best, Phase.GENERATING)]


def test_the_jobs_of_a_key_start_in_all_of_its_idle_processes_in_their_order():
    worker = Worker(devices=2)
    first, second = worker.has(A, "d0"), worker.has(A, "d1", hot=False)
    jobs = [worker.asks(A), worker.asks(A), worker.asks(A)]
    assert worker.decides() == [Start(jobs[0], first, Phase.GENERATING), Start(jobs[1], second, Phase.SPAWNING)]


def test_a_first_video_needs_no_lease_and_any_other_does():
    for hot in (False, True):
        worker = Worker()
        process = worker.has(A, hot=hot)
        worker.has(B, phase=Phase.GENERATING)
        job = worker.asks(A)
        assert worker.decides() == ([] if hot else [Start(job, process, Phase.SPAWNING)])


def test_a_job_whose_first_process_lacks_a_lease_starts_in_the_next():
    worker = Worker(devices=2)
    worker.has(A, "d0")
    worker.has(B, "d0", phase=Phase.GENERATING)
    process = worker.has(A, "d1")
    worker.has(B, "d1", phase=Phase.ENCODING)
    job = worker.asks(A)
    assert worker.decides() == [Start(job, process, Phase.GENERATING)]


def test_no_younger_job_takes_the_memory_that_an_older_one_waits_for():
    for older in (True, False):
        worker = Worker(budget=60, concurrency=2, unknown=[B])
        worker.ledger.observe(B, Memory(resident=10, peak=12))
        worker.has(C, phase=Phase.GENERATING)
        worker.has(A)
        small = worker.has(B)
        if older:
            worker.asks(A)
        job = worker.asks(B)
        assert worker.decides() == ([] if older else [Start(job, small, Phase.GENERATING)])


def test_no_younger_job_takes_the_lease_that_an_older_one_waits_for():
    worker = Worker(devices=2)
    worker.has(GANG, "d0", "d1")
    worker.has(B, "d0", phase=Phase.GENERATING)
    process = worker.has(C, "d1")
    assert [worker.asks(C), *worker.decides()][1:] == [Start(worker.jobs[0], process, Phase.GENERATING)]
    worker.jobs.insert(0, Waiting(-1, GANG, NOW))
    assert worker.decides() == []


def test_nothing_starts_beside_a_job_that_has_to_be_alone_nor_while_it_waits_for_that():
    worker = Worker(concurrency=3)
    first, second = worker.has(A), worker.has(B)
    job, _ = worker.asks(A, alone=True), worker.asks(B)
    assert worker.decides() == [Start(job, first, Phase.GENERATING)]
    worker.ledger.enter(second, Phase.GENERATING)
    worker.has(C)
    worker.asks(C)
    assert worker.decides() == []


def test_while_a_job_waits_to_be_alone_a_younger_one_of_its_key_starts_on_another_device():
    worker = Worker(devices=2, concurrency=2)
    worker.has(A, "d0")
    other = worker.has(A, "d1")
    for device in worker.ledger.devices:
        worker.has(B, device, phase=Phase.GENERATING)
    worker.asks(A, alone=True)
    job = worker.asks(A)
    assert worker.decides() == [Start(job, other, Phase.GENERATING)]


@pytest.mark.parametrize("alone", [False, True])
def test_a_process_is_started_beside_others_unless_its_job_has_to_be_alone(alone):
    worker = Worker()
    worker.has(B, phase=Phase.GENERATING)
    worker.asks(A, alone=alone)
    assert worker.decides() == ([] if alone else [Spawn(A, ("d0",), False, "a job waits")])


@pytest.mark.parametrize("alone", [False, True])
def test_others_start_beside_a_job_that_waits_for_a_place_unless_it_has_to_be_alone(alone):
    worker = Worker(max_processes=2)
    worker.has(B).ending = True
    process = worker.has(C)
    worker.asks(A, alone=alone)
    job = worker.asks(C)
    assert worker.decides() == ([] if alone else [Start(job, process, Phase.GENERATING)])


def test_hot_shapes_flow_on_beside_a_start():
    worker = Worker()
    process = worker.has(B)
    worker.asks(A)
    job = worker.asks(B)
    assert worker.decides() == [Spawn(A, ("d0",), False, "a job waits"), Start(job, process, Phase.GENERATING)]


def test_what_a_process_holds_already_is_not_counted_twice():
    worker = Worker(budget=60, concurrency=2)
    first, second = worker.has(A), worker.has(B)
    jobs = worker.asks(A), worker.asks(B)
    assert worker.decides() == [Start(jobs[0], first, Phase.GENERATING), Start(jobs[1], second, Phase.GENERATING)]
    worker = Worker(budget=90)
    worker.has(A)
    worker.has(C, phase=Phase.GENERATING)
    worker.asks(A)  # has 10, and waits for 20 more
    worker.asks(D)
    assert worker.decides() == [Spawn(D, ("d0",), False, "a job waits")]


def test_what_an_older_job_waits_for_stays_whoever_is_out_of_patience():
    worker = Worker(max_processes=2)
    worker.has(A)
    worker.has(C, phase=Phase.GENERATING)
    worker.asks(A)
    worker.asks(D, NOW - PATIENCE)
    assert worker.decides() == []


def test_room_is_made_beside_what_an_older_job_waits_for():
    worker = Worker(budget=70)
    worker.has(A)
    worker.has(B, phase=Phase.GENERATING)
    idle = worker.has(C)
    worker.asks(A)
    worker.asks(D)
    assert worker.decides() == [Evict(idle, f"a place for {D} on d0")]


def test_nothing_goes_where_what_works_now_leaves_enough_when_it_is_done():
    for budget, goes in ((50, False), (49, True)):
        worker = Worker(budget=budget)
        worker.has(B, phase=Phase.GENERATING)
        idle = worker.has(C)
        worker.asks(A)
        assert worker.decides() == ([Evict(idle, f"a place for {A} on d0")] if goes else [])


def test_idle_processes_go_where_a_video_lacks_memory_even_beside_them_the_least_recently_used_first():
    worker = Worker(budget=45)
    worker.has(A)
    other, _ = worker.has(B), worker.has(C)
    worker.asks(A)
    assert worker.decides() == [Evict(other, f"memory for a video of {A} on d0")]
    worker = Worker(budget=45)
    worker.has(A)
    victims = [worker.has(B), worker.has(C)]
    worker.has(D)
    worker.asks(A)
    assert worker.decides() == [Evict(victim, f"memory for a video of {A} on d0") for victim in victims]
    worker = Worker(budget=35)
    worker.has(A)
    worker.has(B, phase=Phase.GENERATING)
    idle = worker.has(C)
    worker.asks(A)
    assert worker.decides() == [Evict(idle, f"memory for a video of {A} on d0")]
    worker = Worker(budget=50)
    worker.has(A)
    worker.has(B, phase=Phase.GENERATING)
    worker.has(C)
    worker.asks(A)
    assert worker.decides() == []
    worker = Worker(budget=50)
    process, _, _ = worker.has(A), worker.has(B), worker.has(C)
    job = worker.asks(A)
    assert worker.decides() == [Start(job, process, Phase.GENERATING)]


def test_of_idle_processes_in_the_way_of_a_video_those_go_last_that_somebody_waits_for():
    worker = Worker(budget=35)
    worker.has(A)
    awaited, other = worker.has(B), worker.has(C)
    worker.asks(A)
    worker.asks(B)
    why = f"memory for a video of {A} on d0"
    assert worker.decides()[:2] == [Evict(other, why), Evict(awaited, why)]


def test_a_job_that_waits_gets_a_process_where_least_is():
    worker = Worker(budget=[100, 100, 100, 130])
    worker.has(B, "d0", phase=Phase.GENERATING)  # no lease is left
    worker.has(B, "d1")
    worker.has(C, "d1")
    worker.has(D, "d2")
    worker.has(C, "d3")
    worker.asks(A)
    assert worker.decides() == [Spawn(A, ("d3",), False, "a job waits")]
    worker.has(B, "d2")
    worker.has(D, "d3", phase=Phase.GENERATING)
    assert worker.decides() == [Spawn(A, ("d1",), False, "a job waits")]


def test_one_lease_to_spare_is_as_good_as_two():
    worker = Worker(devices=2, concurrency=2)
    worker.has(B, "d0", phase=Phase.GENERATING)
    worker.has(B, "d1")
    worker.has(C, "d1")
    worker.asks(A)
    assert worker.decides() == [Spawn(A, ("d0",), False, "a job waits")]


def test_a_gang_gets_the_devices_on_which_least_is():
    worker = Worker(devices=3)
    worker.has(B, "d1")
    worker.asks(GANG)
    assert worker.decides() == [Spawn(GANG, ("d0", "d2"), False, "a job waits")]


def test_no_process_is_started_where_it_did_not_do_well_unless_there_is_no_other_device():
    avoid = {A: ["d0"]}
    worker = Worker(devices=2)
    worker.asks(A)
    assert worker.decides(avoid=avoid) == [Spawn(A, ("d1",), False, "a job waits")]
    out = {"d1": Pause(NOW + 1, "out")}
    assert worker.decides(avoid=avoid, out=out) == [Spawn(A, ("d0",), False, "a job waits"), Wake(NOW + 1)]
    worker.jobs.clear()
    worker.asks(GANG)
    assert worker.decides(avoid={GANG: ["d0"]}) == [Spawn(GANG, ("d0", "d1"), False, "a job waits")]


def test_a_process_is_started_where_it_can_stay_while_the_others_take_jobs():
    for budget, fits in ((110, True), (109, False)):
        worker = Worker(budget=budget, unknown=[B])
        worker.ledger.observe(B, Memory(resident=60, peak=100))
        idle = worker.has(B)
        worker.asks(A)
        expected = Spawn(A, ("d0",), False, "a job waits") if fits else Evict(idle, f"a place for {A} on d0")
        assert worker.decides() == [expected]


def test_no_two_jobs_get_the_same_memory_or_the_same_place():
    for options in ({"budget": 50}, {"max_processes": 1}, {"unknown": [A, B, C, D, GANG]}):
        worker = Worker(**options)
        worker.asks(A)
        worker.asks(B)
        assert [a for a in worker.decides() if isinstance(a, Spawn)] == [Spawn(A, ("d0",), False, "a job waits")]


def test_where_there_is_no_place_a_copy_goes_before_a_keys_last_process():
    worker = Worker(devices=3, max_processes=1)
    worker.has(B, "d0")
    copy, _ = worker.has(C, "d1"), worker.has(C, "d2")
    worker.asks(A)
    assert worker.decides() == [Evict(copy, f"a place for {A} on d1")]


def test_the_jobs_of_a_key_without_a_process_wait_for_one_place():
    worker = Worker(devices=2, max_processes=1)
    first, _ = worker.has(B, "d0"), worker.has(C, "d1")
    worker.asks(A)
    worker.asks(A)
    assert worker.decides() == [Evict(first, f"a place for {A} on d0")]


def test_as_few_go_as_must_the_least_recently_used_first():
    worker = Worker(budget=55)
    first, second = worker.has(B), worker.has(C)
    worker.has(D)
    worker.ledger.enter(first, Phase.GENERATING)
    worker.ledger.enter(first, Phase.IDLE)  # the last to be used
    worker.asks(A)
    assert worker.decides() == [Evict(second, f"a place for {A} on d0")]
    worth = {B: 1.0, C: 3.0, D: 2.0}.__getitem__
    assert worker.decides(worth=worth) == [Evict(first, f"a place for {A} on d0")]


def test_room_is_made_where_fewest_go_and_there_where_least_works():
    worker = Worker(budget=[35, 55, 45])
    worker.has(D, "d1", phase=Phase.ENCODING)
    here = {device: (worker.has(B, device), worker.has(C, device)) for device in worker.ledger.devices}
    worker.asks(A)
    assert worker.decides() == [Evict(here["d2"][0], f"a place for {A} on d2")]


def test_two_jobs_do_not_wait_for_one_place():
    worker = Worker(devices=2, max_processes=1)
    worker.has(B, "d0").ending = True
    idle = worker.has(C, "d1")
    worker.asks(A)
    assert worker.decides() == []
    worker.asks(D)
    assert worker.decides() == [Evict(idle, f"a place for {D} on d1")]


@pytest.mark.parametrize("late", [False, True])
def test_what_somebody_waits_for_goes_when_the_patience_of_the_job_is_over(late):
    worker = Worker(max_processes=1)
    idle = worker.has(B)
    worker.asks(A, NOW - PATIENCE if late else NOW - 1)
    job = worker.asks(B)
    patient = [Start(job, idle, Phase.GENERATING), Wake(NOW - 1 + PATIENCE)]
    assert worker.decides() == ([Evict(idle, f"a place for {A} on d0")] if late else patient)


@pytest.mark.parametrize("late", [False, True])
def test_what_alone_is_not_enough_goes_when_the_patience_of_the_job_is_over(late):
    worker = Worker(budget=39)
    worker.has(B, phase=Phase.GENERATING)
    idle = worker.has(C)
    worker.asks(A, NOW - PATIENCE if late else NOW)
    assert worker.decides() == ([Evict(idle, f"a place for {A} on d0")] if late else [Wake(NOW + PATIENCE)])


def test_room_is_made_on_the_device_on_which_least_works_and_is_waited_for():
    worker = Worker(budget=39, devices=2)
    for device in worker.ledger.devices:
        worker.has(B, device, phase=Phase.GENERATING)
    worker.has(D, "d0", phase=Phase.GENERATING)
    worker.has(C, "d0")
    idle = worker.has(C, "d1")
    worker.asks(A, NOW - PATIENCE)
    assert worker.decides() == [Evict(idle, f"a place for {A} on d1")]
    worker = Worker(devices=2, max_processes=3)
    worker.has(A, "d0")
    worker.has(C, "d0", phase=Phase.GENERATING)
    worker.has(D, "d1", phase=Phase.GENERATING)
    worker.has(B, "d0")
    idle = worker.has(B, "d1")
    worker.has(C, "d1")
    worker.asks(A)  # waits for the lease of d0
    worker.asks(OTHER)
    assert worker.decides() == [Evict(idle, f"a place for {OTHER} on d1")]


@pytest.mark.parametrize("since", [(NOW - PATIENCE, NOW), (NOW, NOW - PATIENCE)])
def test_the_patience_is_that_of_the_first_job_that_waits_for_the_key(since):
    worker = Worker(max_processes=1)
    idle = worker.has(B)
    worker.asks(A, since[0])
    worker.asks(B)
    worker.asks(A, since[1])
    assert worker.decides() == [Evict(idle, f"a place for {A} on d0")]


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


def test_a_job_whose_key_is_paused_waits_for_that_and_others_are_served():
    worker = Worker()
    worker.asks(A)
    job = worker.asks(A)
    pauses = {A: Pause(NOW + 3, "")}
    assert worker.decides(pauses=pauses) == [Wake(NOW + 3)]
    assert worker.decides(pauses=pauses, ahead=[B]) == [Spawn(B, ("d0",), True, "started ahead"), Wake(NOW + 3)]
    refuse = Pause(NOW + 3, "it fails")
    assert worker.decides(pauses={A: refuse}) == [Refuse(worker.jobs[0], refuse), Refuse(job, refuse)]


OUT = {"d0": Pause(NOW + 6, "lost"), "d1": Pause(NOW + 4, "worn"), "d2": Pause(NOW + 8, "")}


@pytest.mark.parametrize(
    ("key", "out", "refused"),
    [
        (A, {"d0": OUT["d0"], "d1": OUT["d1"], "d2": Pause(NOW + 8, "gone")}, OUT["d1"]),
        (A, OUT, None),  # one of them is waited for
        (GANG, {"d0": OUT["d0"], "d1": OUT["d1"]}, OUT["d1"]),  # the other one is there
        (GANG, OUT, OUT["d0"]),
        (GANG, {**OUT, "d1": Pause(NOW + 4, "")}, None),
    ],
)
def test_jobs_without_devices_are_refused_until_enough_are_back_unless_enough_are_waited_for(key, out, refused):
    worker = Worker(devices=3)
    job = worker.asks(key)
    expected = [Refuse(job, refused)] if refused is not None else []
    assert worker.decides(out=out) == [*expected, Wake(NOW + 4)]


def test_without_its_only_device_a_job_is_refused_until_that_is_back():
    worker = Worker()
    job = worker.asks(A)
    assert worker.decides(out={"d0": OUT["d0"]}) == [Refuse(job, OUT["d0"]), Wake(NOW + 6)]


def test_a_gang_of_more_devices_than_there_are_is_refused():
    worker = Worker()
    job = worker.asks(GANG)
    never = Pause(float("inf"), "unavailable: it needs 2 devices, and this worker has 1")
    assert worker.decides() == [Refuse(job, never)]


def test_a_device_whose_pause_is_over_is_used_and_not_thought_of_again():
    worker = Worker()
    worker.asks(A)
    assert worker.decides(out={"d0": Pause(NOW, "was lost")}) == [Spawn(A, ("d0",), False, "a job waits")]


def test_a_gang_in_the_way_of_another_job_goes_once_from_all_of_its_devices():
    worker = Worker(devices=2, max_processes=1)
    gang = worker.has(GANG, "d0", "d1")
    worker.asks(A)
    worker.asks(B)
    assert worker.decides() == [Evict(gang, f"a place for {A} on d0")]


def test_a_gang_makes_room_on_the_devices_where_that_costs_least():
    worker = Worker(devices=3, max_processes=1)
    first = worker.has(A, "d0")
    worker.has(B, "d1", phase=Phase.GENERATING)
    second = worker.has(C, "d2")
    worker.asks(GANG)
    why = f"a place for {GANG} on "
    assert worker.decides() == [Evict(first, why + "d0"), Evict(second, why + "d2")]
    worker.asks(D)
    assert worker.decides() == [Evict(first, why + "d0"), Evict(second, why + "d2"), Wake(NOW + PATIENCE)]
