"""Who sends jobs to simulated workers: the policy, and what Dynamo itself can do for videos."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, Protocol, get_args

from ltx2_pool.fleet.policy import Fleet, Sent
from ltx2_pool.serving.demand import Demand
from ltx2_pool.serving.forecast import Forecast
from ltx2_pool.words.shapes import Key

Policy = Literal["round robin", "least loaded", "ours"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


class Router(Protocol):
    """Who sends jobs to workers."""

    def choose(self, key: Key, workers: Mapping[int, None], now: float) -> int:
        """One of these workers."""

    def send(self, worker: int, key: Key, now: float) -> Any:
        """The job goes there; what is returned is given to :meth:`ended`."""

    def ended(self, worker: int, token: Any) -> None:
        """It was answered."""

    def hear(self, worker: int, forecast: Forecast, now: float) -> None:
        """What a worker says of itself."""

    def demand(self, worker: int, now: float) -> Demand | None:
        """What a worker is told; None: this one tells nothing."""

    def forget(self, worker: int) -> None:
        """A worker is gone."""


class RoundRobin:
    """One after the other."""

    def __init__(self, seed: int) -> None:
        self._turn = itertools.count(seed)

    def choose(self, _key: Key, workers: Mapping[int, None], _now: float) -> int:
        return next(itertools.islice(workers, next(self._turn) % len(workers), None))

    def send(self, _worker: int, _key: Key, _now: float) -> None: ...

    def ended(self, _worker: int, _token: None) -> None: ...

    def hear(self, _worker: int, _forecast: Forecast, _now: float) -> None: ...

    def demand(self, _worker: int, _now: float) -> None: ...

    def forget(self, _worker: int) -> None: ...


class LeastLoaded:
    """Where fewest of its own requests are under way; of equals, one at random. As ``--router-mode least-loaded``."""

    def __init__(self, seed: int) -> None:
        self._load: Counter[int] = Counter()
        self._chance = random.Random(seed)

    def choose(self, _key: Key, workers: Mapping[int, None], _now: float) -> int:
        least = min(map(self._load.__getitem__, workers))
        return self._chance.choice([worker for worker in workers if self._load[worker] == least])

    def send(self, worker: int, _key: Key, _now: float) -> None:
        self._load[worker] += 1

    def ended(self, worker: int, _token: None) -> None:
        self._load[worker] -= 1

    def hear(self, _worker: int, _forecast: Forecast, _now: float) -> None: ...

    def demand(self, _worker: int, _now: float) -> None: ...

    def forget(self, _worker: int) -> None: ...


class Ours:
    """The policy of :mod:`ltx2_pool.fleet.policy`; every worker answers, so no forecast is stale."""

    def __init__(self, name: str, reasons: Counter[str]) -> None:
        self.fleet = Fleet(name, stale=float("inf"))
        self._reasons = reasons

    def choose(self, key: Key, workers: Mapping[int, None], now: float) -> int:
        choice = self.fleet.choose(str(key), workers, now)
        assert choice is not None
        self._reasons[choice.reason] += 1
        return choice.worker

    def send(self, worker: int, key: Key, now: float) -> Sent:
        return self.fleet.sent(worker, str(key), now)

    def ended(self, _worker: int, token: Sent) -> None:
        self.fleet.ended(token)

    def hear(self, worker: int, forecast: Forecast, now: float) -> None:
        self.fleet.hear(worker, forecast, now)

    def demand(self, worker: int, now: float) -> Demand:
        return self.fleet.demand(worker, now)

    def forget(self, worker: int) -> None:
        self.fleet.forget(worker)


def router(policy: Policy, seed: int, reasons: Counter[str]) -> Router:
    """The router of a policy, which counts its reasons there if it has any."""
    if policy == "ours":
        return Ours(str(seed), reasons)
    return RoundRobin(seed) if policy == "round robin" else LeastLoaded(seed)
