"""A job on its way, and how many may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ltx2_pool.serving.ledger import Reservation
from ltx2_pool.serving.schedule import Waiting
from ltx2_pool.words.outcomes import Video
from ltx2_pool.words.requests import Job

Answer = Video | Exception


@dataclass(frozen=True)
class Limits:
    """What the pool admits."""

    max_queue: int = 64
    max_queue_per_shape: int = 32
    max_queue_per_user: int | None = None
    """None: three quarters of `max_queue`."""
    job_timeout: float = 3600
    """Seconds from admission to the video."""
    patience: float = 20
    """Seconds for which hot jobs may pass one that needs another's room."""

    @property
    def per_user(self) -> int:
        return self.max_queue_per_user or max(1, self.max_queue * 3 // 4)


@dataclass(slots=True, eq=False, kw_only=True)
class Ticket(Waiting):
    """One admitted job on its way."""

    job: Job
    user: str
    pixels: Sequence[int] = ()
    """Descriptors of the job's pictures; open until it is settled."""
    settle: Callable[[Answer], None]
    """Called once, with the video or with why there is none."""
    answered: bool = False
    process: Reservation | None = None
    """Where it is being made."""
    faults: int = 0
    losses: int = 0
    riddles: int = 0
    attempts: int = 0

    @property
    def order(self) -> tuple[int, int]:
        return self.turn, self.number
