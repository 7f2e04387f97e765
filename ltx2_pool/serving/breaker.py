"""A circuit breaker: a shape whose processes keep dying at start is left alone for a while."""

from __future__ import annotations

import time
from collections.abc import Callable

THRESHOLD = 3
"""Failures in a row that open the circuit."""


class Breaker:
    """Counts the failed starts of one shape in a row. Open means: do not try now."""

    def __init__(self, first: float = 30, longest: float = 600, clock: Callable[[], float] = time.monotonic) -> None:
        self._first = first
        self._longest = longest
        self._clock = clock
        self._failures = 0
        self._closed_at = 0.0

    def failed(self) -> None:
        """A start failed. From the third in a row on the circuit opens, each time for twice as long."""
        self._failures += 1
        if self._failures >= THRESHOLD:
            pause = self._first * 2.0 ** min(self._failures - THRESHOLD, 32)
            self._closed_at = self._clock() + min(pause, self._longest)

    def succeeded(self) -> None:
        """A start worked: the count begins anew."""
        self._failures = 0
        self._closed_at = 0.0

    @property
    def failures(self) -> int:
        """Failed starts in a row."""
        return self._failures

    @property
    def remaining(self) -> float:
        """Seconds until the next try; 0 when the circuit is closed."""
        return max(0.0, self._closed_at - self._clock())
