"""A fleet under a simulated clock: arrivals, the routing policy, losses and restarts over simulated workers.

A lost worker takes its requests along. With Dynamo's own routing that is a 503 for each client; our router sends them
to another worker. Not simulated: the network, and the seconds for which a frontend still tries a worker that is gone.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ltx2_pool.fleet import rivals
from ltx2_pool.fleet.arrivals import DAY
from ltx2_pool.fleet.rivals import Policy
from ltx2_pool.fleet.simulated import Clock, Costs, Worker
from ltx2_pool.serving.forecast import forecast
from ltx2_pool.serving.tickets import Answer
from ltx2_pool.words.outcomes import Rejected
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import Key

HEAD_START = 180.0
"""Seconds that the workers have to start ahead before the first request comes; nothing in them counts."""


@dataclass(frozen=True)
class Plan:
    """What is simulated."""

    workers: int
    costs: Costs
    ahead: Sequence[Key] = ()
    """What each worker starts before anybody asks."""
    places: int | None = None
    """K: processes on each device."""
    devices: int = 1
    """Of each worker."""
    seconds: float = 3600.0
    losses: float = 0.0
    """Workers that are lost, with all that they do, for each worker and day."""
    rollings: int = 0
    """How often in that time all workers are drained and restarted, one after the other."""
    routers: int = 1
    """Routers side by side (for the others: frontends), none of which knows what the others send."""
    interval: float = 0.5
    """Seconds between two forecasts of a worker."""
    listening: bool = True
    """Whether workers listen to what our routers say of the fleet."""
    seed: int = 0


@dataclass
class Outcome:
    """What became of it."""

    policy: Policy
    plan: Plan
    waits: array[float] = field(default_factory=lambda: array("d"))
    """Of each video: seconds from the request to its end, less what it takes alone and hot."""
    took: array[float] = field(default_factory=lambda: array("d"))
    """The same in all."""
    ended: float = 0.0
    """When the last video was there, in seconds from the first moment that counts."""
    hot: int = 0
    """Videos made in a process that had made one before."""
    spawns: int = 0
    """For a job, or ahead, after the start of the workers."""
    asked: int = 0
    refused: int = 0
    lost: int = 0
    """Requests that a lost worker took along."""
    retried: int = 0
    busy: float = 0.0
    """Device seconds."""
    reasons: Counter[str] = field(default_factory=Counter)

    def figures(self) -> dict[str, float]:
        """What is compared, by name."""
        videos = len(self.waits)
        ordered = sorted(self.waits)
        return {
            "videos an hour": videos / self.plan.seconds * 3600,
            "p50 wait s": _percentile(ordered, 0.50),
            "p99 wait s": _percentile(ordered, 0.99),
            "spawns per 1,000 videos": 1000 * self.spawns / max(1, videos),
            "hot hits %": 100 * self.hot / max(1, videos),
            "idle %": 100 - 100 * self.busy / (self.plan.seconds * self.plan.workers * self.plan.devices),
            "refused": self.refused,
            "lost": self.lost,
        }


def _percentile(ordered: Sequence[float], p: float) -> float:
    """By nearest rank; nan of nothing."""
    return ordered[min(len(ordered) - 1, int(p * len(ordered)))] if ordered else float("nan")


def simulate(plan: Plan, policy: Policy, asked: Iterable[tuple[float, Key]]) -> Outcome:
    """What becomes of the requests that come at these moments (from 0, in order)."""
    return _World(plan, policy, asked).run()


@dataclass(slots=True, eq=False)
class _Request:
    """One request, on its way through the fleet."""

    job: Job
    key: Key
    since: float
    router: int
    token: Any = None
    open: bool = True


class _World:
    def __init__(self, plan: Plan, policy: Policy, asked: Iterable[tuple[float, Key]]) -> None:
        self._plan = plan
        self._asked = iter(asked)
        self._clock = Clock()
        self._chance = random.Random(plan.seed)
        self.outcome = Outcome(policy, plan)
        self._retries = policy == "ours"
        self._routers = [
            rivals.router(policy, plan.seed + number, self.outcome.reasons) for number in range(plan.routers)
        ]
        self._ids: dict[Worker, int] = {}
        self._numbers = iter(range(10**9))
        self._open: dict[int, None] = {}
        """Workers that take requests, in discovery; a dictionary for its order and its quick look-ups."""
        self._workers: dict[int, Worker] = {}
        self._working: dict[int, dict[int, _Request]] = {}
        """By worker, what it has not answered."""
        self._changed: dict[Worker, None] = {}
        self._job_numbers = iter(range(10**12))
        self._draining: int | None = None
        self._rolling: list[int] = []

    def run(self) -> Outcome:
        plan, clock = self._plan, self._clock
        for _ in range(plan.workers):
            self._enter()
        self._tick()
        clock.run(HEAD_START)
        for worker in self._workers.values():
            self.outcome.spawns -= worker.spawns
            self.outcome.busy -= worker.busy
        if plan.losses:
            self._plan_loss()
        for number in range(plan.rollings):
            clock.after((number + 0.5) * plan.seconds / plan.rollings, self._roll)
        self._next_arrival()
        clock.run(HEAD_START + plan.seconds)
        for worker in self._workers.values():
            self._count(worker)
        return self.outcome

    # Workers come and go.

    def _enter(self) -> None:
        plan, number = self._plan, next(self._numbers)
        on_change, tell = self._changed.setdefault, self._tell if plan.listening else lambda _: None
        worker = Worker(self._clock, plan.costs, plan.ahead, plan.devices, plan.places, on_change, tell)
        self._ids[worker] = number
        self._workers[number] = worker
        self._working[number] = {}
        self._open[number] = None

    def _tell(self, worker: Worker) -> None:
        """What it is told all the time, it hears when it makes use of it."""
        if (number := self._ids.get(worker)) is not None:
            for router in self._routers:
                if (demand := router.demand(number, self._clock.now)) is not None:
                    worker.book.listener.hear(demand, self._clock.now)

    def _count(self, worker: Worker) -> None:
        worker.die()
        self.outcome.busy += worker.busy
        self.outcome.spawns += worker.spawns
        self.outcome.hot += worker.hot

    def _end(self, number: int) -> None:
        """The worker is gone; another one takes its place in a while."""
        worker = self._workers.pop(number)
        self._open.pop(number, None)
        self._count(worker)
        self._changed.pop(worker, None)
        del self._ids[worker]
        for router in self._routers:
            router.forget(number)
        self._clock.after(self._plan.costs.restart, self._back, number)

    def _back(self, number: int) -> None:
        self._enter()
        if number == self._draining:
            self._drain_next()

    def _plan_loss(self) -> None:
        self._clock.after(self._chance.expovariate(self._plan.losses * self._plan.workers / DAY), self._lose)

    def _lose(self) -> None:
        self._plan_loss()
        if len(self._open) < 2:
            return
        number = self._chance.choice(list(self._open))
        left = list(self._working[number].values())
        self._end(number)
        del self._working[number]
        for request in left:
            self._routers[request.router].ended(number, request.token)
            if self._retries:
                self.outcome.retried += 1
                self._send(request)
            else:
                self.outcome.lost += 1
                request.open = False

    def _roll(self) -> None:
        begun = not self._rolling and self._draining is None
        self._rolling = list(self._open)
        if begun:
            self._drain_next()

    def _drain_next(self) -> None:
        self._draining = None
        while self._rolling and self._draining is None:
            number = self._rolling.pop()
            if number in self._open and len(self._open) > 1:
                self._draining = number
                del self._open[number]
                self._workers[number].book.close()
                if not self._working[number]:
                    self._drained(number)

    def _drained(self, number: int) -> None:
        self._end(number)
        del self._working[number]

    # Requests.

    def _next_arrival(self) -> None:
        if (following := next(self._asked, None)) is not None:
            self._clock.at(HEAD_START + following[0], self._arrive, following[1])

    def _arrive(self, key: Key) -> None:
        self.outcome.asked += 1
        job = Job(str(next(self._job_numbers)), key.shape, "", 0, 5, 1.0, 24, variant=key.variant)
        router = self._chance.randrange(len(self._routers)) if len(self._routers) > 1 else 0
        self._send(_Request(job, key, self._clock.now, router))
        self._next_arrival()

    def _send(self, request: _Request) -> None:
        now, router, key = self._clock.now, self._routers[request.router], request.key
        number = router.choose(key, self._open, now)
        request.token = router.send(number, key, now)
        mine = self._working[number]
        mine[id(request)] = request

        def settle(answer: Answer) -> None:
            del mine[id(request)]
            router.ended(number, request.token)
            if isinstance(answer, Exception):
                self.outcome.refused += 1
            else:
                self.outcome.ended = self._clock.now - HEAD_START
                took = self._clock.now - request.since
                self.outcome.took.append(took)
                self.outcome.waits.append(max(0.0, took - self._alone(key)))
            if number == self._draining and not mine:
                self._clock.after(0.0, self._drained, number)

        try:
            self._workers[number].admit(request.job, key, settle)
        except Rejected as rejected:
            settle(rejected)

    def _alone(self, key: Key) -> float:
        return self._plan.costs.videos[key] + self._plan.costs.encode

    def _tick(self) -> None:
        """The workers whose forecast is another now are heard; the others would say the same."""
        now = self._clock.now
        if self.outcome.policy == "ours":
            for worker in self._changed:
                said = forecast(worker.book, now)
                for router in self._routers:
                    router.hear(self._ids[worker], said, now)
        self._changed.clear()
        self._clock.after(self._plan.interval, self._tick)
