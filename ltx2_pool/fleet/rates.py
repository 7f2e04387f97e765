"""How often each key is asked for lately. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping

HALF_LIFE = 1800.0
"""Seconds after which a request counts half."""
LEAST_AGE = 60.0
"""Seconds: what came in a shorter time says no more than if it had come in this."""
EVERY = 1.0
"""Seconds for which the rates stay what they are."""


class Rates:
    """Requests a second by key, each counting the less the older it is; right from the first minute on."""

    def __init__(self) -> None:
        self._counts: dict[str, float] = {}
        self._rates: dict[str, float] = {}
        self._began: float | None = None
        self._faded = self._made = float("-inf")

    def count(self, key: str, now: float) -> None:
        """One came."""
        if self._began is None:
            self._began = self._faded = now
        self._counts[key] = self._counts.get(key, 0.0) + 1.0

    def at(self, now: float) -> Mapping[str, float]:
        """Not to be changed; calculated once a second at most."""
        if self._began is not None and now - self._made >= EVERY:
            fade = 0.5 ** ((now - self._faded) / HALF_LIFE)
            self._counts = {key: count * fade for key, count in self._counts.items()}
            self._faded = self._made = now
            # What a steady rate of one a second would have left by now.
            steady = (1 - 0.5 ** (max(LEAST_AGE, now - self._began) / HALF_LIFE)) * HALF_LIFE / math.log(2)
            self._rates = {key: count / steady for key, count in self._counts.items()}
        return self._rates
