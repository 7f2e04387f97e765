"""Where a job's key gets a process, what goes for it, and when that is not to be."""

from __future__ import annotations

import pytest

from ltx2_pool.serving.actions import Evict, Pause, Refuse, Spawn, Start, Wake
from ltx2_pool.serving.ledger import Phase
from ltx2_pool.words.protocol import Memory

from .choices import GANG, NOW, OTHER, PATIENCE, A, B, C, D, Worker


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
