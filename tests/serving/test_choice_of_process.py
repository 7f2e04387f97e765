"""In which process a job starts, and what it claims while it waits for that."""

from __future__ import annotations

import pytest

from ltx2_pool.serving.actions import Evict, Spawn, Start, Waiting
from ltx2_pool.serving.ledger import Phase
from ltx2_pool.words.protocol import Memory

from .choices import GANG, NOW, PATIENCE, A, B, C, D, Worker


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


@pytest.mark.parametrize(
    ("budget", "others", "going"),
    [
        (50, (Phase.GENERATING, Phase.IDLE), []),
        (45, (Phase.IDLE, Phase.IDLE), [0]),
        (45, (Phase.IDLE, Phase.IDLE, Phase.IDLE), [0, 1]),
        (35, (Phase.GENERATING, Phase.IDLE), [1]),
    ],
)
def test_where_a_video_lacks_memory_even_beside_idle_processes_the_least_recently_used_of_them_go(
    budget, others, going
):
    worker = Worker(budget=budget)
    worker.has(A)
    there = [worker.has(key, phase=phase) for key, phase in zip((B, C, D), others, strict=False)]
    worker.asks(A)
    assert worker.decides() == [Evict(there[number], f"memory for a video of {A} on d0") for number in going]


def test_a_video_that_fits_beside_idle_processes_is_begun():
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
