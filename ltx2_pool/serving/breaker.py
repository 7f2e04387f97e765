"""How the starts of one key have gone: when the next may be tried, and whether it is worth waiting for."""

from __future__ import annotations

from dataclasses import dataclass

from ltx2_pool.serving.actions import Pause

THRESHOLD = 3
"""Failed starts in a row that make a shape unavailable."""
DISTURBANCES = 10
"""Starts ended from outside after which, where nothing else serves, the worker no longer says that it can."""


@dataclass(frozen=True)
class Pauses:
    """Seconds. Each pause is twice the one before, up to the longest."""

    first: float = 30.0
    """Of a shape that is unavailable."""
    longest: float = 600.0
    disturbed: float = 0.1
    """After a start that something outside has ended: it says nothing about the shape, and its jobs wait."""
    longest_disturbed: float = 10.0


class Starts:
    """Failed starts of one key in a row."""

    def __init__(self, pauses: Pauses) -> None:
        self._pauses = pauses
        self._disturbances = 0
        self._until = 0.0
        self.failures = 0
        self.error = ""
        """Of the last start that failed."""

    def failed(self, now: float, error: str) -> None:
        """A start failed, and the shape may be why. The third in a row makes it unavailable for a while."""
        self.failures += 1
        self.error = error
        if self.failures >= THRESHOLD:
            pause = self._pauses.first * 2.0 ** min(self.failures - THRESHOLD, 32)
            self._until = now + min(pause, self._pauses.longest)

    def disturbed(self, now: float, error: str) -> None:
        """A start was ended from outside, or the machine refused it: try again a little later."""
        pause = self._pauses.disturbed * 2.0 ** min(self._disturbances, 32)
        self._disturbances += 1
        self.error = error
        self._until = max(self._until, now + min(pause, self._pauses.longest_disturbed))

    def started(self) -> None:
        """A start worked. Whether the process lasts is another question: pauses after disturbances go on growing."""
        self.failures = 0
        self._until = 0.0
        self.error = ""

    @property
    def hopeless(self) -> bool:
        """Whether so many have failed, for whatever reason, that nobody should count on the next."""
        return self.failures >= THRESHOLD or self._disturbances >= DISTURBANCES

    def remaining(self, now: float) -> float:
        """Seconds until the next try."""
        return max(0.0, self._until - now)

    def unavailable(self, now: float) -> bool:
        """Whether jobs are refused until the next try."""
        return self.failures >= THRESHOLD and self._until > now

    def pause(self, now: float) -> Pause | None:
        """What the decision is told; None when a start may be tried."""
        if self._until <= now:
            return None
        if not self.unavailable(now):
            return Pause(self._until)
        first = self.error.splitlines()[0] if self.error else "unknown"
        return Pause(self._until, f"unavailable after {self.failures} failed starts in a row, the last: {first}")
