"""Where a job goes, by what is known of the workers."""

from __future__ import annotations

import random

import pytest

from ltx2_pool.fleet.policy import EVEN, REASONS, SECONDS, STALE, TOLL, Fleet
from ltx2_pool.fleet.rates import HALF_LIFE, LEAST_AGE, Rates
from ltx2_pool.serving.demand import Demand
from ltx2_pool.serving.forecast import Forecast

A, B = "64x64@9f", "96x64@9f"
SPAWN = 5.0


def idle(*keys: str, **fields: object) -> Forecast:
    said = {"leases": 1, "free": 1, "work": 0.0, "spawn": SPAWN, "seconds": {A: 2.0, B: 2.0}, **fields}
    return Forecast(processes=dict.fromkeys(keys, 1), **said)  # type: ignore[arg-type]


def busy(work: float, *keys: str, **fields: object) -> Forecast:
    return idle(*keys, **{"free": 0, "work": work, "jobs": dict.fromkeys(keys, 1), **fields})


def fleet(**forecasts: Forecast) -> Fleet:
    """Workers w1, w2, ... heard at 0."""
    made = Fleet()
    for name, forecast in forecasts.items():
        made.hear(int(name[1:]), forecast, 0.0)
    return made


def choose(fleet: Fleet, key: str | None, now: float = 0.0, workers: tuple[int, ...] = (1, 2, 3)) -> tuple[int, str]:
    choice = fleet.choose(key, workers, now)
    assert choice is not None
    assert choice.reason in REASONS
    return choice.worker, choice.reason


def test_a_hot_and_free_worker_wins():
    assert choose(fleet(w1=idle(B), w2=idle(A), w3=busy(1.0, A)), A) == (2, "hot")


def test_the_expected_seconds_are_wait_spawn_and_the_keys_own():
    one = Fleet()
    one.hear(1, busy(3.0, A), 0.0)
    choice = one.choose(A, (1,), 1.0)
    assert choice is not None
    assert choice.seconds == pytest.approx(2.0 + 2.0)
    cold = one.choose(B, (1,), 1.0)
    assert cold is not None
    assert cold.seconds == pytest.approx(2.0 + SPAWN + 2.0)


@pytest.mark.parametrize(("work", "expected"), [(0.9, (1, "queued")), (1.3, (2, "cold"))])
def test_another_copy_is_made_where_it_is_quicker_than_the_wait_and_pays_the_toll(work, expected):
    cost = SPAWN * (1 + TOLL)
    assert choose(fleet(w1=busy(work * cost - EVEN * (work < 1), A), w2=idle(B)), A, workers=(1, 2)) == expected


def test_a_key_that_nobody_has_goes_where_the_wait_is_least():
    assert choose(fleet(w1=busy(4.0, B), w2=busy(1.0, B), w3=busy(3.0, B)), A) == (2, "first")


def test_what_was_sent_counts_until_it_is_answered():
    one = fleet(w1=idle(A), w2=idle(A))
    first = choose(one, A, 0.1, (1, 2))[0]
    sent = one.sent(first, A, 0.1)
    assert choose(one, A, 0.2, (1, 2)) == (3 - first, "hot")
    other = one.sent(3 - first, A, 0.2)
    assert choose(one, A, 0.3, (1, 2))[1] == "queued"
    one.ended(sent)
    assert choose(one, A, 0.4, (1, 2)) == (first, "hot")
    one.ended(other)
    one.ended(other)  # may be said again


def test_a_cold_key_that_was_sent_somewhere_is_hot_there_from_then_on():
    one = fleet(w1=idle(B), w2=idle(B))
    worker = choose(one, A, 0.1, (1, 2))[0]
    one.ended(one.sent(worker, A, 0.1))
    assert choose(one, A, 0.2, (1, 2)) == (worker, "hot")


def test_a_forecast_knows_of_what_was_sent_before_it_was_asked_for_and_of_nothing_later():
    one = fleet(w1=idle(A), w2=busy(1.0, A))
    one.sent(1, A, 0.5)
    one.hear(1, busy(1.5, A), 0.6)
    assert choose(one, A, 0.6, (1, 2)) == (2, "queued")  # 0.4 s, and not 1.5: the job at 1 is not counted twice
    one.sent(2, A, 0.7)
    one.hear(2, idle(A), 0.65)  # was asked before
    assert choose(one, A, 0.7, (1, 2)) == (1, "queued")


def test_an_answer_that_was_overtaken_is_passed_over():
    one = fleet(w1=idle(A), w2=idle(B))
    one.hear(1, idle(A), 2.0)
    one.hear(1, busy(50.0, B), 1.0)
    assert choose(one, A, 2.0, (1, 2)) == (1, "hot")


def test_a_stale_forecast_is_not_believed_and_the_worker_still_serves():
    one = fleet(w1=idle(A), w2=idle(B))
    one.hear(2, idle(B), STALE)
    later = STALE + 0.1
    assert choose(one, B, later, (1, 2)) == (2, "hot")
    assert choose(one, A, later, (1,)) == (1, "unheard")
    assert one.heard((1, 2), later) == 1


def test_with_nothing_known_at_all_the_least_loaded_gets_it():
    one = Fleet()
    load = dict.fromkeys((1, 2, 3), 0)
    chance, sent = random.Random(1), []
    for _ in range(200):
        worker, reason = choose(one, A)
        assert (load[worker], reason) == (min(load.values()), "unheard")
        load[worker] += 1
        sent.append(one.sent(worker, A, 0.0))
        if chance.random() < 0.5:
            one.ended(done := sent.pop(chance.randrange(len(sent))))
            load[done.worker] -= 1


def test_of_equally_quick_workers_the_one_is_spared_that_a_rare_key_needs():
    one = fleet(w1=idle(A, B), w2=idle(A), w3=idle(A))
    assert choose(one, A)[0] in (2, 3)
    assert choose(one, B) == (1, "hot")


def test_a_spared_worker_is_taken_when_it_is_quicker_by_more_than_the_bound():
    rare = idle(A, B)
    one = fleet(w1=rare, w2=busy(EVEN * 1.5, A))
    assert choose(one, A, workers=(1, 2)) == (1, "hot")


def test_where_a_key_is_unavailable_it_is_sent_last():
    one = fleet(w1=idle(A, unavailable=frozenset((A,))), w2=busy(30.0, B))
    assert choose(one, A, workers=(1, 2))[0] == 2
    assert choose(one, A, workers=(1,))[0] == 1


def test_only_workers_that_are_there_are_chosen():
    one = fleet(w1=idle(A), w2=idle(A))
    assert choose(one, A, workers=(2,))[0] == 2
    assert one.choose(A, (), 0.0) is None
    one.forget(1)
    one.forget(1)
    assert choose(one, A, workers=(1, 2)) == (2, "hot")


def test_a_request_without_a_key_goes_to_who_is_free():
    assert choose(fleet(w1=busy(9.0, A), w2=idle(B)), None, workers=(1, 2))[0] == 2


def test_jobs_of_a_key_that_nobody_has_measured_count_as_the_longest_that_is_known():
    one = fleet(w1=busy(0.0, A, unmeasured={B: 1}, seconds={A: 30.0}), w2=busy(20.0, A))
    assert choose(one, A, workers=(1, 2))[0] == 2
    assert Fleet().seconds(A) == SECONDS


def test_several_devices_take_as_many_jobs_before_anybody_waits():
    one, waits = Fleet(), []
    one.hear(1, Forecast(leases=2, free=2, work=0.0, processes={A: 2}, seconds={A: 2.0}), 0.0)
    for _ in range(3):
        choice = one.choose(A, (1,), 0.0)
        assert choice is not None
        waits.append(choice.seconds - 2.0)
        one.sent(1, A, 0.0)
    assert waits[:2] == [0.0, 0.0]
    assert 0 < waits[2] <= 2.0


def test_a_worker_is_told_how_many_others_have_a_key_and_how_much_is_asked_for():
    one = Fleet("r")
    for worker, keys in ((1, (A, B)), (2, (A,)), (3, ())):
        one.hear(worker, idle(*keys), 0.0)
    for second in range(100):
        one.ended(one.sent(1, A if second % 4 else B, float(second)))
    one.sent(3, B, 100.0)
    told = [one.demand(worker, 100.0) for worker in (1, 2, 3, 4)]
    assert [(demand.elsewhere[A], demand.elsewhere[B]) for demand in told] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert told[0].rates == pytest.approx({A: 0.75, B: 0.26}, rel=0.05)
    assert told[0].load == pytest.approx(2.0 * 1.01 / 3, rel=0.05)
    one.forget(2)
    one.hear(3, idle(leases=3, free=3), 101.0)
    last = one.demand(1, 101.0)
    assert (last.elsewhere[A], last.elsewhere[B]) == (0, 0)
    assert last.load == pytest.approx(2.0 * 1.01 / 4, rel=0.05)


def test_rates_are_right_from_the_first_minute_on_and_sink_when_nobody_asks():
    rates, now = Rates(), 0.0
    rates.count(A, now)
    assert rates.at(now)[A] <= 1 / LEAST_AGE * 1.1
    while now < 5 * HALF_LIFE:
        now += 10.0
        rates.count(A, now)
        if now % 300 == 0:
            assert rates.at(now)[A] == pytest.approx(0.1, rel=0.1)
    assert rates.at(now + HALF_LIFE)[A] == pytest.approx(0.05, rel=0.1)
    assert Rates().at(0.0) == {}


def test_a_forecast_survives_json_and_fields_of_a_newer_worker():
    said = busy(1.5, A, unavailable=frozenset((B,))).said()
    assert Forecast.of({**said, "new": 1}) == busy(1.5, A, unavailable=frozenset((B,)))
    with pytest.raises(ValueError, match="leases"):
        Forecast.of({"free": 1})


def test_what_workers_are_told_is_understood_however_long_one_says_that_a_video_takes():
    one = fleet(w1=idle(A, seconds={A: 1e7}))
    for _ in range(10):
        one.sent(1, A, 1.0)
    assert Demand.of(one.demand(1, 1.0).said()).rates[A] > 0
