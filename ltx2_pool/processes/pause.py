"""When what all starts need may be tried again: a pause that grows while it keeps failing."""

from __future__ import annotations

import time
from collections.abc import Callable

_FREE_TRIES = 3
"""Failures in a row before there is a pause."""
_FIRST = 5.0
_LONGEST = 300.0


class HelpersPause:
    """Failures in a row of the helpers: the weights process, the zygote, the guard.

    Many starts meet one failure. Each takes down `turn` before it tries, and only the first of those that took down the
    same one counts.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until = 0.0
        self.turn = 0
        """How many failures there were."""
        self.failures = 0
        """How many in a row."""
        self.error = ""
        """The last one's first line."""

    @property
    def remaining(self) -> float:
        """Seconds until the next try."""
        return max(0.0, self._until - self._clock())

    def failed(self, turn: int, error: str) -> None:
        """A helper did not start, or ended before it was of any use."""
        if turn != self.turn:
            return
        self.turn += 1
        self.failures += 1
        self.error = error.partition("\n")[0]
        if self.failures >= _FREE_TRIES:
            pause = _FIRST * 2.0 ** min(self.failures - _FREE_TRIES, 16)
            self._until = self._clock() + min(pause, _LONGEST)

    def succeeded(self) -> None:
        """A shape process is READY: all of them did their work."""
        self.failures = 0
        self._until = 0.0
        self.error = ""
