"""What routers say of the fleet: how it is read, for how long it is believed, and what a worker makes of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import pytest

from ltx2_pool.serving.actions import Evict
from ltx2_pool.serving.book import Begin, Book
from ltx2_pool.serving.demand import LEAST_LOAD, ROUTERS, STALE, Demand, Listener
from ltx2_pool.serving.ledger import Ledger
from ltx2_pool.serving.names import BehindRouter
from ltx2_pool.words.protocol import Memory
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import Key, Shape

KEYS = [Key(Shape(32 * n, 32, 9)) for n in range(1, 5)]
A, B, C, D = KEYS
FORGOTTEN = STALE + 0.1


def said(
    rates: dict[Key, float], elsewhere: dict[Key, int] | None = None, router: str = "r", load: float = 0.5
) -> Demand:
    others = {str(key): number for key, number in (elsewhere or {}).items()}
    return Demand(router, {str(key): rate for key, rate in rates.items()}, others, load)


def saves(listener: Listener, key: Key, now: float = 0.0) -> float:
    worth = listener.worth(now)
    assert worth is not None
    return worth(key)


def test_a_process_saves_the_less_the_more_others_there_are_and_the_more_the_more_are_asked_for():
    listener = Listener()
    listener.hear(said({A: 0.4, B: 0.4, C: 0.1}, {A: 3, B: 1}), 0.0)
    assert [saves(listener, key) for key in KEYS] == pytest.approx([0.4 / 8, 0.4 / 2, 0.1, 0.0])


def test_the_rates_and_loads_of_routers_add_up_and_the_last_word_of_each_counts_until_it_is_stale():
    listener = Listener()
    listener.hear(said({A: 9.0}, {A: 1}, "one", 0.3), 0.0)
    listener.hear(said({A: 1.0}, {A: 1}, "one", 0.3), 1.0)
    listener.hear(said({A: 2.0}, {A: 2}, "two", 0.3), 2.0)
    assert saves(listener, A, 2.0) == pytest.approx(3.0 * 0.6**2)
    assert listener.routers(2.0) == 2
    assert saves(listener, A, 1.0 + FORGOTTEN) == pytest.approx(2.0 * 0.3**2)
    assert listener.worth(2.0 + FORGOTTEN) is None
    assert listener.routers(2.0 + FORGOTTEN) == 0


def test_no_load_of_a_router_makes_all_keys_equal_and_no_number_of_routers_is_remembered():
    listener = Listener()
    for number in range(10 * ROUTERS):
        listener.hear(said({A: 1.0, B: 1.0}, {A: 1}, str(number), 0.0), 0.0)
    assert listener.routers(0.0) == ROUTERS
    assert 0 < saves(listener, A) == pytest.approx(LEAST_LOAD * saves(listener, B))


def test_it_survives_json_and_fields_of_a_newer_router():
    demand = said({A: 0.5}, {A: 2})
    assert Demand.of({**json.loads(json.dumps(demand.said())), "new": 1}) == demand


NONSENSE: dict[str, Any] = {
    "no object": 3,
    "no router": {"rates": {}},
    "a rate below zero": {"router": "r", "rates": {"a": -1.0}},
    "a rate that is no number": {"router": "r", "rates": {"a": float("nan")}},
    "an endless rate": {"router": "r", "rates": {"a": float("inf")}},
    "workers below zero": {"router": "r", "elsewhere": {"a": -1}},
    "half a worker": {"router": "r", "elsewhere": {"a": 0.5}},
    "workers without end": {"router": "r", "rates": {"a": 1.0}, "elsewhere": {"a": 10**400}},
    "workers without end, as text": {"router": "r", "elsewhere": {"a": "9" * 400}},
    "a load that is none": {"router": "r", "load": "much"},
    "rates that are a list": {"router": "r", "rates": ["a"]},
    "an endless name": {"router": "r" * 10_000},
    "keys without end": {"router": "r", "rates": {str(number): 1.0 for number in range(20_000)}},
}


class Runtime:
    def endpoint(self, path: str) -> str:
        return path


async def answers(worker: BehindRouter, request: object) -> list[dict[str, Any]]:
    return [answer async for answer in worker._forecast(request)]


async def test_nonsense_is_passed_over_said_once_and_answered_as_ever(caplog):
    listener = Listener()
    worker = BehindRouter(Runtime(), "n.c.e", ["m"], lambda: {"forecast": {"free": 1}}, listener, "mem")
    with caplog.at_level(logging.WARNING):
        for nonsense in NONSENSE.values():
            assert await answers(worker, nonsense) == [{"free": 1}]
    assert listener.worth(0.0) is None
    assert [record.message[:60] for record in caplog.records] == [
        "what a router says of the fleet cannot be understood, and is"
    ]
    assert await answers(worker, {}) == [{"free": 1}]  # an older router's question
    assert len(caplog.records) == 1
    assert await answers(worker, said({A: 1.0}).said()) == [{"free": 1}]
    assert len(listener._words) == 1


async def test_nonsense_of_one_router_is_said_once_also_while_others_speak_clearly(caplog):
    worker = BehindRouter(Runtime(), "n.c.e", ["m"], lambda: {}, Listener(), "mem")
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            for request in (NONSENSE["no router"], said({A: 1.0}).said()):
                await answers(worker, request)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_is_refused(what):
    with pytest.raises(ValueError, match="validation error"):
        Demand.of(NONSENSE[what])


class OneDevice:
    """A book with one device and room for two, whose processes are ready at once."""

    def __init__(self, ahead: Sequence[Key] = (), **options: Any) -> None:
        ledger = Ledger({"gpu": 10**9}, max_processes=2)
        for key in KEYS:
            ledger.observe(key, Memory(resident=1, peak=2))
        self.book = Book(ledger, keys=KEYS, ahead=ahead, **options)

    def decide(self, now: float) -> list[Key]:
        """The keys that are started, until nothing more is."""
        started: list[Key] = []
        while begun := [a.process for a in self.book.next_actions(now) if isinstance(a, Begin)]:
            for process in begun:
                started.append(process.key)
                self.book.ready(process, Memory(resident=1, peak=2), 1.0)
        return started

    def victim(self, key: Key, now: float) -> Key:
        """Whose process goes for a job of that key."""
        self.book.admit(Job("1", key.shape, "", 0, 5, 1.0, 24), key, "", lambda _: None, now)
        return next(action.process.key for action in self.book.next_actions(now) if isinstance(action, Evict))


@pytest.mark.parametrize(
    ("demand", "now", "victim"),
    [
        (None, 0.0, A),  # the least recently used
        (said({A: 1.0, B: 1.0}, {B: 2}), 0.0, B),  # is hot elsewhere
        (said({A: 1.0, B: 1.0}, {A: 2}), 0.0, A),
        (said({A: 1.0, B: 0.1}), 0.0, B),  # is rare
        (said({A: 1.0, B: 1.0}, {B: 2}), FORGOTTEN, A),
        (said({C: 1.0}), 0.0, A),  # of which nothing is said
    ],
)
def test_of_two_idle_processes_the_one_goes_that_the_fleet_misses_least(demand, now, victim):
    worker = OneDevice([A, B])
    assert worker.decide(0.0) == [A, B]
    if demand is not None:
        worker.book.listener.hear(demand, 0.0)
    assert worker.victim(C, now) == victim


def test_what_is_started_ahead_is_what_the_fleet_lacks_and_never_more_than_was_to_be():
    worker = OneDevice([A])
    worker.book.listener.hear(said(dict.fromkeys(KEYS, 1.0), {A: 3, B: 2, D: 1}), 0.0)
    assert worker.decide(0.0) == [C]


def test_a_worker_that_hears_nothing_any_more_starts_ahead_what_it_was_to():
    worker = OneDevice([A, B])
    worker.book.listener.hear(said(dict.fromkeys(KEYS, 1.0), {A: 3, B: 2}), 0.0)
    assert worker.decide(FORGOTTEN) == [A, B]


def test_before_anybody_asks_the_order_is_the_operators():
    worker = OneDevice([B, A])
    worker.book.listener.hear(said({}), 0.0)
    assert worker.decide(0.0) == [B, A]


def test_of_shapes_that_an_operator_has_named_only_the_order_changes():
    worker = OneDevice([A, B], pinned=True)
    worker.book.listener.hear(said(dict.fromkeys(KEYS, 1.0), {A: 3, B: 2}), 0.0)
    assert worker.decide(0.0) == [B, A]


def test_nothing_is_started_ahead_where_nothing_was_to_be():
    worker = OneDevice()
    worker.book.listener.hear(said(dict.fromkeys(KEYS, 1.0)), 0.0)
    assert worker.decide(0.0) == []
