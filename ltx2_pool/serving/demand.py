"""What the routers say of the fleet, and what a process of each key saves here because of it. Pure.

A key that is asked for while every process of it is busy costs a start. With `n` other workers that have one, a process
here saves *rate of the key x load of the fleet to the power of n* starts a second: much where nobody else has the key,
hardly anything where many have. No brain decides for the fleet. Each router says with each question what it knows, each
worker draws its own conclusions, and what was said goes stale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field, TypeAdapter

from ltx2_pool.words.shapes import Key

STALE = 5.0
"""Seconds after which what a router said is not believed any more."""
ROUTERS = 100
"""More than these are not listened to."""
LEAST_LOAD, MOST_LOAD = 0.1, 0.95
"""Within these the load counts: another process always helps somebody, and the fewer there are the more."""

_Name = Annotated[str, Field(max_length=200)]
_Amount = Annotated[float, Field(ge=0, le=1e6)]
_Count = Annotated[int, Field(ge=0, le=10**6)]


@dataclass(frozen=True, slots=True)
class Demand:
    """The fleet as one router sees it, for one worker; keys are written as in status and metrics."""

    router: _Name
    """Which one says it."""
    rates: Annotated[Mapping[_Name, _Amount], Field(max_length=10_000)] = field(default_factory=dict)
    """By key: requests a second that came to this router lately."""
    elsewhere: Annotated[Mapping[_Name, _Count], Field(max_length=10_000)] = field(default_factory=dict)
    """By key: other workers that have a process of it."""
    load: _Amount = 0.0
    """Share of the time of all leases that these requests take."""

    @classmethod
    def of(cls, said: object) -> Demand:
        """From what :meth:`said` made; fields that a newer router has besides are passed over. Raises ValueError."""
        return _READER.validate_python(said)

    def said(self) -> dict[str, object]:
        """For JSON."""
        said: dict[str, object] = _READER.dump_python(self, mode="json")
        return said


_READER = TypeAdapter(Demand)


class Listener:
    """The last word of each router, for as long as it is believed."""

    def __init__(self) -> None:
        self._words: dict[str, tuple[float, Demand]] = {}

    def hear(self, demand: Demand, now: float) -> None:
        """A router says that."""
        self._forget(now)
        if demand.router in self._words or len(self._words) < ROUTERS:
            self._words[demand.router] = now, demand

    def routers(self, now: float) -> int:
        """How many are believed."""
        return sum(now - heard <= STALE for heard, _ in list(self._words.values()))

    def worth(self, now: float) -> Callable[[Key], float] | None:
        """What says how many starts a second a process of a key saves here; None while no router says anything."""
        self._forget(now)
        said = [demand for _, demand in self._words.values()]
        if not said:
            return None
        load = min(MOST_LOAD, max(LEAST_LOAD, sum(demand.load for demand in said)))

        def worth(key: Key) -> float:
            name = str(key)
            rate = sum(demand.rates.get(name, 0.0) for demand in said)
            others: int = max(demand.elsewhere.get(name, 0) for demand in said)
            return rate * load**others

        return worth

    def _forget(self, now: float) -> None:
        self._words = {router: word for router, word in self._words.items() if now - word[0] <= STALE}
