"""The simulator: its clock and device, its arrivals, and what it says of the policies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ltx2_pool.fleet.arrivals import DAY, PATTERNS, arrivals, zipf
from ltx2_pool.fleet.rivals import POLICIES
from ltx2_pool.fleet.simulated import Clock, Costs, Worker
from ltx2_pool.fleet.simulator import Outcome, Plan, simulate
from ltx2_pool.serving.forecast import forecast
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import Key, Shape

KEYS = [Key(Shape(32 * n, 32, 9)) for n in range(1, 7)]
COSTS = Costs(dict.fromkeys(KEYS, 4.0), dict.fromkeys(KEYS, 1.0))
A, B, C = KEYS[:3]


def job(key: Key, number: int = 0) -> Job:
    return Job(str(number), key.shape, "", 0, 5, 1.0, 24)


def worker(clock: Clock, *ahead: Key, devices: int = 1, places: int | None = 2) -> Worker:
    made = Worker(clock, COSTS, ahead, devices, places, lambda _: None, lambda _: None)
    clock.run(clock.now + 60)
    return made


def seconds_of(clock: Clock, worker: Worker, *keys: Key) -> list[Any]:
    """Ask for them at once: when each was answered, from now."""
    began, ends = clock.now, [0.0] * len(keys)
    for number, key in enumerate(keys):

        def settle(_answer: object, number: int = number) -> None:
            ends[number] = clock.now - began

        worker.admit(job(key, number), key, settle)
    clock.run(clock.now + 600)
    return [pytest.approx(end) for end in ends]


def test_a_hot_video_takes_its_seconds_and_the_next_begins_while_the_file_is_written():
    clock = Clock()
    one = worker(clock, A, B)
    assert seconds_of(clock, one, A) == [4.1]
    assert seconds_of(clock, one, A, B) == [4.1, 8.1]
    assert (one.hot, one.spawns) == (3, 2)


def test_a_cold_one_is_started_traced_and_made_in_the_place_of_another():
    clock = Clock()
    one = worker(clock, A, B)
    assert seconds_of(clock, one, C) == [COSTS.end + COSTS.ready + COSTS.trace + 4.1]
    assert (one.hot, one.spawns) == (0, 3)


def test_what_things_take_may_spread():
    clock = Clock()
    spread = replace(COSTS, hot_spread=(2.0,), start_spread=(3.0,))
    one = Worker(clock, spread, [A, B], 1, 2, lambda _: None, lambda _: None)
    clock.run(60)
    assert seconds_of(clock, one, A) == [2 * 4 + 0.1]
    assert seconds_of(clock, one, C) == [COSTS.end + 3 * (COSTS.ready + COSTS.trace + 4) + 0.1]


def test_a_first_video_shares_the_device_with_what_runs_there():
    clock = Clock()
    one = worker(clock, A, places=2)
    # B's first video computes from 4.3 s on. A's second one has begun at 4.1 s, and is left with 3.8 of its 4 s.
    first, second, cold = seconds_of(clock, one, A, A, B)
    assert first == 4.1
    assert second == 4.3 + 2 * 3.8 + 0.1
    assert cold == 4.3 + 2 * 3.8 + 0.2 + 0.1


def test_the_forecast_of_a_worker_is_what_then_happens():
    clock = Clock()
    one = worker(clock, A, B)
    seconds_of(clock, one, A, B)
    idle = forecast(one.book, clock.now)
    assert (idle.free, idle.work, idle.processes) == (1, 0.0, {str(A): 1, str(B): 1})
    began, ends = clock.now, []
    for number, key in enumerate((A, B)):
        one.admit(job(key, number), key, lambda _: ends.append(clock.now - began))
    said = forecast(one.book, clock.now)
    assert (said.free, said.jobs) == (-1, {str(A): 1, str(B): 1})
    clock.run(clock.now + 100)
    assert ends[-1] == pytest.approx(said.work, abs=0.3)


def test_a_spawn_is_known_once_a_first_video_can_be_compared_with_another():
    clock = Clock()
    one = worker(clock, A, B)
    seconds_of(clock, one, A, C)
    assert forecast(one.book, clock.now).spawn is None
    seconds_of(clock, one, B)
    seconds_of(clock, one, A)
    seconds_of(clock, one, C)
    said = forecast(one.book, clock.now).spawn
    assert said is not None
    assert said == pytest.approx(COSTS.ready + COSTS.trace, abs=2)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_arrivals_have_their_rate_their_shares_and_repeat_with_their_seed(pattern):
    shares = zipf(KEYS)
    assert sum(shares.values()) == pytest.approx(1)
    asked = list(arrivals(pattern, 0.2, shares, DAY, 3))
    assert asked == list(arrivals(pattern, 0.2, shares, DAY, 3)) != list(arrivals(pattern, 0.2, shares, DAY, 4))
    assert len(asked) == pytest.approx(0.2 * DAY, rel=0.06)
    assert [at for at, _ in asked] == sorted(at for at, _ in asked)
    first = sum(key == A for _, key in asked) / len(asked)
    assert first == pytest.approx(shares[A], rel=0.06)


def test_a_days_curve_is_low_at_night_and_bursts_are_bursts():
    day = [at for at, _ in arrivals("day", 0.2, zipf(KEYS), DAY, 1)]
    night, noon = (sum(abs(at - middle * DAY) < DAY / 12 for at in day) for middle in (0.0, 0.5))
    assert noon > 2 * night  # of which only half is within the day

    def most(pattern: str) -> int:
        counts = [0] * 1000
        for at, _ in arrivals(pattern, 1.0, zipf(KEYS), 10_000, 1):  # type: ignore[arg-type]
            counts[int(at / 10)] += 1
        return max(counts)

    assert most("bursts") > 1.4 * most("poisson")


def outcomes(plan: Plan, load: float = 0.6) -> dict[str, Outcome]:
    shares = zipf(list(plan.costs.videos))
    rate = load * plan.workers * plan.devices / 4.0
    return {p: simulate(plan, p, arrivals("poisson", rate, shares, plan.seconds, 1)) for p in POLICIES}


def test_ours_keeps_shapes_together_and_nobody_waits_longer_for_it():
    plan = Plan(9, COSTS, KEYS[:2], places=2, seconds=1200)
    found = {policy: outcome.figures() for policy, outcome in outcomes(plan).items()}
    ours, least, robin = found["ours"], found["least loaded"], found["round robin"]
    assert ours["hot hits %"] > 90 > least["hot hits %"]
    assert ours["spawns per 1,000 videos"] < 0.3 * least["spawns per 1,000 videos"]
    assert ours["p99 wait s"] <= min(least["p99 wait s"], robin["p99 wait s"])
    assert all(0 < figures["idle %"] < 100 for figures in found.values())


def test_every_request_is_accounted_for_and_only_ours_survives_the_loss_of_a_worker():
    plan = Plan(6, COSTS, KEYS[:2], places=2, seconds=1200, losses=2000, rollings=1, routers=2)
    found = outcomes(plan)
    for policy, outcome in found.items():
        open_at_the_end = outcome.asked - len(outcome.waits) - outcome.refused - outcome.lost
        assert 0 <= open_at_the_end < 60, policy
    assert found["ours"].lost == 0 < found["ours"].retried
    assert found["least loaded"].lost > 0
    assert all(outcome.figures()["videos an hour"] > 0 for outcome in found.values())


def test_the_same_plan_gives_the_same_outcome():
    plan = Plan(3, COSTS, KEYS[:2], places=2, seconds=300, losses=1000)
    one, other = outcomes(plan)["ours"], outcomes(plan)["ours"]
    assert (one.waits, one.reasons, one.spawns) == (other.waits, other.reasons, other.spawns)


def test_workers_that_listen_start_less_and_meet_more_jobs_hot():
    keys = [Key(Shape(32 * n, 32, 9)) for n in range(1, 13)]
    costs = Costs(dict.fromkeys(keys, 4.0), dict.fromkeys(keys, 1.0))
    found = {}
    for listening in (False, True):
        plan = Plan(6, costs, keys[:4], places=4, seconds=7200, losses=40, listening=listening)
        outcome = simulate(plan, "ours", arrivals("poisson", 0.5 * 6 / 4.0, zipf(keys), plan.seconds, 1))
        found[listening] = outcome.figures()
    assert found[True]["spawns per 1,000 videos"] < 0.9 * found[False]["spawns per 1,000 videos"]
    assert 100 - found[True]["hot hits %"] < 0.9 * (100 - found[False]["hot hits %"])
