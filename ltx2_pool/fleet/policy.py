"""Which worker gets a job: the one from which its video is expected first. Pure: no I/O, no clock but times passed in.

Expected seconds to the video = wait + spawn if the worker has no process of the key + the key's own seconds. What is
known of a worker is its last :class:`~ltx2_pool.serving.forecast.Forecast` and what was sent to it since that was asked
for. Other routers' jobs show with the next forecast. Of a worker that was not heard of for `STALE` seconds nothing is
believed but its name: it counts as cold, and as busy with what this router has sent to it. So with no forecast at all
the policy is *least loaded*.

Two preferences keep shapes together, and both are bounded. A cold start is charged twice, once for the client that
waits for it and once for the shape that has to go for it, so a rare shape gets another copy only where that saves
`TOLL` spawns and not some fraction of one. And among workers that are equally quick within `EVEN` seconds, the one is
taken that rare shapes can best do without: their processes are neither kept busy nor pushed out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from ltx2_pool.fleet.rates import Rates
from ltx2_pool.serving.demand import Demand
from ltx2_pool.serving.forecast import Forecast

STALE = 5.0
"""Seconds after which a forecast is not believed any more."""
TOLL = 0.25
"""Spawns that a cold start is charged for the shape that it pushes out."""
EVEN = 1.0
"""Seconds by which a worker that is needed for rare shapes may be passed over at most."""
SECONDS, SPAWN = 10.0, 5.0
"""What a video takes, and a start, of which nobody has said anything yet."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Where a job goes."""

    worker: int
    seconds: float
    """Expected until its video is there."""
    reason: str
    """For logs and metrics: one of `REASONS`."""


REASONS = ("hot", "queued", "cold", "first", "unheard")
"""A process of the key is free; all are busy, and that is still the quickest; another copy is quicker than the wait for
the others; nobody has the key; nothing is known of the worker."""


@dataclass(slots=True, eq=False)
class Sent:
    """A job that this router has sent, until it is answered."""

    worker: int
    key: str | None
    at: float
    cost: float


@dataclass(slots=True, eq=False)
class _View:
    """One worker, as this router sees it."""

    forecast: Forecast | None = None
    heard: float = float("-inf")
    done: float = 0.0
    """When all that is known to run or wait there is done."""
    free: int = 0
    keys: set[str] = field(default_factory=set)
    """Those that it has a process of, or will have for what was sent."""
    needed: float = 0.0
    """From 0 to 1: how much rare shapes depend on it."""
    sent: set[Sent] = field(default_factory=set)
    news: dict[str, int] = field(default_factory=dict)
    """Jobs by key that the forecast does not know of."""


class _Rated(NamedTuple):
    """A worker for a job; the least is the best."""

    rank: float
    """Seconds to wait, and what is charged besides."""
    done: float
    worker: int
    wait: float
    reason: str


_NOBODY = _Rated(float("inf"), 0.0, -1, 0.0, "")
_REFUSED = 1e6


class Fleet:
    """What one router knows of all workers."""

    def __init__(self, name: str = "", stale: float = STALE) -> None:
        """`name` is what the workers know the router by."""
        self._name = name
        self._stale = stale
        self._views: dict[int, _View] = {}
        self._seconds: dict[str, float] = {}
        self._spawn = SPAWN
        self._rates = Rates()
        self._leases = 0
        """Of all workers that were heard."""
        self._hot: dict[str, set[int]] = {}
        """By key: the workers that have a process of it, or are about to."""

    def hear(self, worker: int, forecast: Forecast, asked: float) -> None:
        """A worker answered what it was asked at that time: of what was sent to it before, the answer knows."""
        view = self._views.setdefault(worker, _View())
        if asked < view.heard:
            return  # a later answer has overtaken it
        for key in view.keys.difference(forecast.processes):
            self._hot[key].discard(worker)
        self._leases += forecast.leases - _leases(view)
        view.forecast, view.heard, view.keys = forecast, asked, set(forecast.processes)
        self._seconds.update(forecast.seconds)
        unmeasured = sum(number * self.seconds(key) for key, number in forecast.unmeasured.items())
        view.done = asked + forecast.work + unmeasured / forecast.leases
        view.free, view.news = forecast.free, {}
        if forecast.spawn is not None:
            self._spawn += (forecast.spawn - self._spawn) / 10
        needed = 0.0
        for key in forecast.processes:
            hot = self._hot.setdefault(key, set())
            hot.add(worker)
            needed += 1 / len(hot)
        view.needed = needed / len(forecast.processes) if forecast.processes else 0.0
        for sent in view.sent:
            if sent.at >= asked:
                self._add(view, sent)

    def demand(self, worker: int, now: float) -> Demand:
        """What the worker is told of the fleet."""
        rates = self._rates.at(now)
        view = self._views.get(worker)
        here: Collection[str] = view.keys if view is not None else ()
        elsewhere = {key: len(self._hot.get(key, ())) - (key in here) for key in rates}
        work = sum(rate * self.seconds(key) for key, rate in rates.items())
        # What one worker says that its videos take must not make the others stop believing the rest.
        return Demand(self._name, rates, elsewhere, min(1.0, work / max(1, self._leases)))

    def hot(self, key: str) -> int:
        """How many workers have a process of the key, or are about to."""
        return len(self._hot.get(key, ()))

    def rate(self, key: str, now: float) -> float:
        """How many requests of the key come in a second, lately."""
        return self._rates.at(now).get(key, 0.0)

    def forget(self, worker: int) -> None:
        """The worker is gone, or what is known of it is wrong."""
        if view := self._views.pop(worker, None):
            self._leases -= _leases(view)
            for key in view.keys:
                self._hot[key].discard(worker)

    def keep(self, workers: Collection[int]) -> None:
        """These are all that there are."""
        for worker in [worker for worker in self._views if worker not in workers]:
            self.forget(worker)

    def sent(self, worker: int, key: str | None, now: float) -> Sent:
        """A job goes to a worker; give it to :meth:`ended` when it is answered."""
        view = self._views.setdefault(worker, _View())
        cost = self.seconds(key)
        if key is not None and key not in view.keys:
            cost += self._spawn
        sent = Sent(worker, key, now, cost)
        view.sent.add(sent)
        if key is not None:
            self._rates.count(key, now)
        view.done = max(view.done, now)
        self._add(view, sent)
        return sent

    def ended(self, sent: Sent) -> None:
        """A job was answered, or is given up."""
        view = self._views.get(sent.worker)
        if view is None or sent not in view.sent:
            return
        view.sent.remove(sent)
        if sent.at >= view.heard:
            view.free += 1
            view.done -= self._share(view, sent)
            if sent.key in view.news:
                view.news[sent.key] -= 1

    def seconds(self, key: str | None) -> float:
        """What a video of the key takes, as far as anybody has said; at worst, as much as the longest that is known."""
        if key is None:
            return 0.0
        if (seconds := self._seconds.get(key)) is not None:
            return seconds
        return max(self._seconds.values(), default=SECONDS)

    def heard(self, workers: Iterable[int], now: float) -> int:
        """How many of these workers have a forecast that is believed."""
        return sum((view := self._views.get(worker)) is not None and self._fresh(view, now) for worker in workers)

    def choose(self, key: str | None, workers: Collection[int], now: float) -> Choice | None:
        """The worker, of these, from which a video of the key is expected first; None without any.

        `key` is None for a request that no worker would take: whoever is free says what is wrong with it.
        """
        hot = self._hot.get(key, ()) if key is not None else ()
        best = self._best([worker for worker in hot if worker in workers], key, now, _NOBODY)
        if best.rank >= self._spawn:  # else no cold start can be quicker
            best = self._best([worker for worker in workers if worker not in hot], key, now, best)
        if best is _NOBODY:
            return None
        reason = "first" if best.reason == "cold" and not hot else best.reason
        return Choice(best.worker, best.wait + self.seconds(key), reason)

    def _best(self, workers: Iterable[int], key: str | None, now: float, best: _Rated) -> _Rated:
        """The best of these workers, and of what was the best so far."""
        heard = now - self._stale
        for worker in workers:
            view = self._views.get(worker)
            if view is None or view.forecast is None or view.heard < heard:
                jobs = len(view.sent) if view is not None else 0
                wait = jobs * SECONDS + self._spawn
                best = min(best, _Rated(wait + EVEN + TOLL * self._spawn, now, worker, wait, "unheard"))
                continue
            wait = max(0.0, view.done - now) if view.free <= 0 else 0.0
            if wait + EVEN * view.needed <= best.rank:  # most are passed over here: a fleet is looked through for a job
                best = min(best, self._rate(view, worker, key, wait))
        return best

    def _rate(self, view: _View, worker: int, key: str | None, wait: float) -> _Rated:
        """What speaks against a worker that was heard, on which a job has to wait for a lease."""
        forecast = view.forecast
        assert forecast is not None
        # It would be refused there; but where that is all there is, the refusal is the answer.
        toll = EVEN * view.needed + (_REFUSED if key in forecast.unavailable else 0.0)
        if key is None or key in view.keys:
            if key is not None:
                processes = forecast.processes.get(key) or 1
                ahead = forecast.jobs.get(key, 0) + view.news.get(key, 0) - processes
                if ahead >= 0:  # half of the first one is over, as far as anybody knows
                    wait = max(wait, (ahead + 0.5) * self.seconds(key) / processes)
            return _Rated(wait + toll, view.done, worker, wait, "queued" if wait else "hot")
        wait += self._spawn
        return _Rated(wait + toll + TOLL * self._spawn, view.done, worker, wait, "cold")

    def _fresh(self, view: _View, now: float) -> bool:
        return view.forecast is not None and now - view.heard <= self._stale

    @staticmethod
    def _share(view: _View, sent: Sent) -> float:
        """Seconds by which a job delays those behind it."""
        return sent.cost / (_leases(view) or 1)

    def _add(self, view: _View, sent: Sent) -> None:
        view.free -= 1
        view.done += self._share(view, sent)
        if sent.key is not None:
            view.news[sent.key] = view.news.get(sent.key, 0) + 1
            if sent.key not in view.keys:
                view.keys.add(sent.key)
                self._hot.setdefault(sent.key, set()).add(sent.worker)


def _leases(view: _View) -> int:
    return view.forecast.leases if view.forecast is not None else 0
