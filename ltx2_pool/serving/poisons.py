"""Parameters that have ended processes, and for how long jobs with them are refused. Pure."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

from ltx2_pool.words.requests import Job

POISON_SECONDS = 600.0
_MAX_POISONS = 1000


class Poisons:
    """The last of them."""

    def __init__(self) -> None:
        self._until: OrderedDict[Job, float] = OrderedDict()

    def add(self, job: Job, now: float) -> None:
        """From now on for a while."""
        self._until[parameters(job)] = now + POISON_SECONDS
        if len(self._until) > _MAX_POISONS:
            self._until.popitem(last=False)

    def left(self, job: Job, now: float) -> float:
        """Seconds for which such a job is refused."""
        return max(0.0, self._until.get(parameters(job), now) - now) if self._until else 0.0


def parameters(job: Job) -> Job:
    """The job without what makes it one of a kind."""
    return replace(job, id="")
