"""The router over made-up clients of Dynamo: what is a loss, what is an answer, and who is asked next."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from dynamo.llm.exceptions import HttpError, InvalidArgument

from ltx2_pool.fleet.metrics import Metrics
from ltx2_pool.fleet.router import Router, is_loss, translate
from ltx2_pool.gateway import upstream
from ltx2_pool.serving.demand import Demand
from ltx2_pool.tools.stack import TINY_MENU
from ltx2_pool.words.menu import Menu
from tests.serving.made_up import Context, collect, until

MENU = Menu.load(TINY_MENU)
LOST = "Unavailable: Stream ended before generation completed"
REQUEST = {"model": MENU.model, "prompt": "a fox"}


class Workers:
    """Dynamo's client of an endpoint: each worker yields its items, and raises what is among them."""

    def __init__(self, **items: list[Any]) -> None:
        self.items = {int(name[1:]): what for name, what in items.items()}
        self.asked: list[tuple[int, dict[str, Any]]] = []
        self.requests: list[tuple[int, Any]] = []

    def instance_ids(self) -> list[int]:
        return list(self.items)

    async def direct(self, request: Any, worker: int, **options: Any) -> AsyncIterator[Any]:
        self.asked.append((worker, options))
        self.requests.append((worker, request))

        async def answer() -> AsyncIterator[Any]:
            for item in self.items[worker]:
                if isinstance(item, Exception):
                    raise item
                yield item

        return answer()


def idle(*keys: object) -> list[Any]:
    return [{"leases": 1, "free": 1, "work": 0.0, "processes": {str(key): 1 for key in keys}}]


def router(workers: Workers, forecasts: Workers | None = None, attempts: int = 4) -> Router:
    metrics = Metrics([str(key) for key in MENU.keys])
    return Router(workers, forecasts or Workers(), MENU, metrics, attempts=attempts, name="r")


def counted(router: Router, name: str, **labels: str) -> float:
    return router._metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError('RateLimited: {"message":"too many","code":429}'), 429),
        (ValueError('Unavailable: {"message":"try again in 30 s","code":503}'), 503),
        (ValueError('Internal: {"message":"no","code":500}'), 500),
        (ValueError("Internal: something"), 500),
        (KeyError("something"), 500),
        (HttpError(429, "too many"), 429),
    ],
)
def test_a_workers_answer_is_no_loss_and_keeps_its_status(error, status):
    assert not is_loss(error)
    said = translate(error)
    assert isinstance(said, HttpError)
    assert said.code == status


def test_the_text_of_a_400_and_a_timeout_stay_what_they_are():
    error = InvalidArgument("no such size")
    assert translate(error) is error
    assert not is_loss(error)
    said = translate(ValueError("DeadlineExceeded: TimeoutError: not done"))
    assert (type(said), str(said)) == (TimeoutError, "TimeoutError: not done")


@pytest.mark.parametrize(
    "text", [LOST, "Unavailable: TCP connection to 127.0.0.1:9 failed", "Disconnected: x", "CannotConnect: x"]
)
def test_a_worker_that_cannot_be_reached_is_lost(text):
    for kind in (ValueError, Exception, ConnectionError):
        assert is_loss(kind(text))
        assert translate(kind(text)).code == 503


def test_a_worker_that_does_not_even_take_the_request_is_lost_and_one_that_is_late_is_not():
    assert is_loss(Exception("DeadlineExceeded: TCP request to 127.0.0.1:9 timed out"))
    assert not is_loss(ValueError("DeadlineExceeded: TimeoutError: not done"))


@pytest.mark.parametrize("code", ["1e400", "9999", "-1", "200", "[" * 100_000])
def test_a_status_that_is_none_is_a_500(code):
    assert translate(ValueError(f'Internal: {{"message":"no","code":{code}}}')).code == 500


async def test_a_lost_request_goes_elsewhere_and_the_lost_worker_is_passed_over_until_it_answers():
    workers, forecasts = Workers(w1=[ValueError(LOST)], w2=["video"]), Workers(w1=idle(*MENU.keys), w2=idle())
    one = router(workers, forecasts)
    await one.look()
    assert await collect(one.generate(REQUEST, Context())) == ["video"]
    assert [worker for worker, _ in workers.asked] == [1, 2]
    workers.items[1] = ["hot video"]
    assert await collect(one.generate(REQUEST, Context())) == ["video"]
    await one.look()
    assert await collect(one.generate(REQUEST, Context())) == ["hot video"]
    assert counted(one, "ltx2_router_retry_total") == 1
    assert (
        counted(one, "ltx2_router_choice_total", reason="hot") == 3
    )  # the second worker is hot once it has had the job


async def test_a_worker_that_begins_to_answer_and_is_lost_ends_the_request():
    one = router(Workers(w1=["step", ValueError(LOST)], w2=["step", ValueError(LOST)]))
    items = one.generate({**REQUEST, "stream": True}, Context())
    assert await anext(items) == "step"
    with pytest.raises(HttpError) as said:
        await anext(items)
    assert said.value.code == 503
    assert counted(one, "ltx2_router_retry_total") == 0


@pytest.mark.parametrize(("workers", "attempts", "tries"), [(3, 2, 2), (2, 4, 2)])
async def test_when_every_worker_is_lost_the_client_gets_503(workers, attempts, tries):
    there = Workers(**{f"w{number}": [ValueError(LOST)] for number in range(workers)})
    one = router(there, attempts=attempts)
    with pytest.raises(HttpError) as said:
        await collect(one.generate(REQUEST, Context()))
    assert said.value.code == 503
    assert len({worker for worker, _ in there.asked}) == len(there.asked) == tries
    assert counted(one, "ltx2_router_problem_total", problem="nobody") == 1


async def test_while_no_worker_is_there_a_gateways_job_waits_and_has_lost_no_attempt():
    one = router(Workers())
    with pytest.raises(HttpError) as said:
        await collect(one.generate(REQUEST, Context()))
    assert isinstance(upstream.meaning(said.value.code, b'{"message": "overloaded"}'), upstream.Busy)
    assert counted(one, "ltx2_router_problem_total", problem="nobody") == 1


async def test_nothing_is_kept_of_workers_that_are_gone():
    gate = asyncio.Event()

    class Gated(Workers):
        async def direct(self, request: Any, worker: int, **options: Any) -> AsyncIterator[Any]:
            await gate.wait()
            return await super().direct(request, worker, **options)

    there = Gated(**{f"w{number}": [ValueError(LOST)] for number in range(8)})
    one = router(there, attempts=1)
    asked = [asyncio.create_task(collect(one.generate(REQUEST, Context()))) for _ in range(8)]
    await until(lambda: len(one._fleet._views) == 8)
    there.items, lost = {}, there.items
    await one.look()  # none of them was there at a look
    assert not one._fleet._views
    there.items = lost
    gate.set()
    await asyncio.wait(asked)
    assert counted(one, "ltx2_router_retry_total") == 8
    there.items = {}
    await one.look()
    assert (one._lost, counted(one, "ltx2_router_workers", state="lost")) == (set(), 0)


def test_megabytes_of_a_prompt_are_not_looked_at():
    """Each character was, while all other requests waited."""
    one = router(Workers())
    assert one._key_of(REQUEST) is not None
    assert one._key_of({**REQUEST, "prompt": "x" * 100_001}) is None


async def test_an_answer_is_not_tried_again():
    there = Workers(w1=[ValueError('RateLimited: {"message":"full","code":429}')], w2=["video"])
    one = router(there, Workers(w1=idle(*MENU.keys), w2=idle()))
    await one.look()
    with pytest.raises(HttpError):
        await collect(one.generate(REQUEST, Context()))
    assert [worker for worker, _ in there.asked] == [1]
    assert counted(one, "ltx2_router_problem_total", problem="error") == 1


async def test_the_context_goes_along_and_who_has_left_is_not_served():
    there = Workers(w1=["video"])
    one, context = router(there), Context()
    await collect(one.generate(REQUEST, context))
    assert there.asked[0][1]["context"] is context
    context.gone.set()
    assert await collect(one.generate(REQUEST, context)) == []
    there.items[1] = [ValueError(LOST)]
    assert len(there.asked) == 1


async def test_a_request_that_nobody_would_take_gets_a_workers_words():
    error = InvalidArgument("size '1x1' is not on the menu")
    one = router(Workers(w1=[error]))
    with pytest.raises(InvalidArgument, match="1x1"):
        await collect(one.generate({**REQUEST, "size": "1x1"}, Context()))


async def test_a_client_that_goes_in_the_middle_leaves_nothing_behind():
    one = router(Workers(w1=["step", "video"]))
    items = one.generate(REQUEST, Context())
    await anext(items)
    assert one.working == 1
    await items.aclose()
    assert one.working == 0
    assert not one._fleet._views[1].sent


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"leases": "many"},
        ValueError("no such endpoint"),
        *(
            {**idle(*MENU.keys)[0], **nonsense}
            for nonsense in (
                {"leases": 0},
                {"work": float("nan")},
                {"work": float("inf")},
                {"spawn": float("inf")},
                {"spawn": -1.0},
                {"seconds": {str(MENU.keys[0]): float("nan")}},
                {"seconds": {str(MENU.keys[0]): -1e9}},
                {"unmeasured": {str(MENU.keys[0]): 10**400}},
                {"processes": {str(MENU.keys[0]): -1}},
            )
        ),
    ],
)
async def test_a_worker_that_says_nothing_sensible_is_unheard_and_serves(said):
    one = router(Workers(w1=["video"]), Workers(w1=[said]))
    await one.look()
    assert counted(one, "ltx2_router_workers", state="unheard") == 1
    assert await collect(one.generate(REQUEST, Context())) == ["video"]
    assert counted(one, "ltx2_router_choice_total", reason="unheard") == 1


async def test_a_worker_that_hangs_does_not_hold_up_the_others_and_is_passed_over_until_it_answers(monkeypatch):
    hangs = asyncio.Event()

    class Hanging(Workers):
        async def direct(self, request: Any, worker: int, **options: Any) -> AsyncIterator[Any]:
            if worker == 1:
                await hangs.wait()
            return await super().direct(request, worker, **options)

    monkeypatch.setattr("ltx2_pool.fleet.router.PATIENCE", 0.01)
    monkeypatch.setattr("ltx2_pool.fleet.router.STALE", 0.2)
    forecasts = Hanging(w1=idle(*MENU.keys), w2=idle())
    one = router(Workers(w1=["of 1"], w2=["of 2"]), forecasts)
    await one.look()
    await one.look()
    assert [worker for worker, _ in forecasts.asked] == [2, 2]  # while the first question to the other is open
    await until(lambda: 1 in one._lost)
    assert await collect(one.generate(REQUEST, Context())) == ["of 2"]
    hangs.set()
    await until(lambda: not one._asking)
    await one.look()
    assert not one._lost
    assert await collect(one.generate(REQUEST, Context())) == ["of 1"]


async def test_a_worker_is_told_what_is_asked_for_and_how_many_others_have_it():
    key, forecasts = str(MENU.keys[0]), Workers(w1=idle(MENU.keys[0]), w2=idle())
    one = router(Workers(w1=["video"], w2=["video"]), forecasts)
    await one.look()
    await collect(one.generate(REQUEST, Context()))
    await one.look()
    told = {worker: Demand.of(request) for worker, request in forecasts.requests}
    assert {worker: demand.elsewhere for worker, demand in told.items()} == {1: {key: 0}, 2: {key: 1}}
    assert all(demand.router == "r" and demand.rates[key] > 0 < demand.load for demand in told.values())
    assert counted(one, "ltx2_router_hot_workers", shape_key=key) == 1
    assert counted(one, "ltx2_router_rate", shape_key=key) > 0


async def test_the_expected_wait_of_each_shape_is_published():
    key, other = MENU.keys[:2]
    one = router(Workers(w1=["video"]), Workers(w1=idle(key)))
    await one.look()
    assert counted(one, "ltx2_router_expected_wait_seconds", shape_key=str(key)) == 0
    assert counted(one, "ltx2_router_expected_wait_seconds", shape_key=str(other)) > 0
