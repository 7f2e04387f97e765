"""A job on its way, how many may be, and whose turn it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ltx2_pool.serving.actions import Waiting
from ltx2_pool.serving.ledger import Reservation
from ltx2_pool.words.outcomes import Reason, Video
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
    began: float = 0.0
    """Since when it is being made there."""
    cold: bool = False
    """It is its process's first."""
    faults: int = 0
    faulty: set[str] = field(default_factory=set)
    """Devices that faulted under it."""
    losses: int = 0
    riddles: int = 0
    puzzled: int = -1
    """The newest process that there was at the last of these riddles."""
    attempts: int = 0

    @property
    def order(self) -> tuple[int, int]:
        return self.turn, self.number

    def puzzle(self, reason: Reason, process: int, newest: int) -> None:
        """It lost a process that nothing outside explains; `newest` is there now. What this machine has refused to one
        process it may refuse to all that were there then: copies confined to a directory that is gone are one riddle.
        """
        if reason != "system" or process > self.puzzled:
            self.riddles += 1
            self.puzzled = newest


class Turns:
    """Start-time fair queueing over users, each job of cost one (Goyal, Vin, Cheng: Start-time Fair Queuing, 1996).

    A job's turn is one after its user's last, or after the turn that was last served: whoever asks seldom is served
    alongside whoever has fifty jobs waiting, and nobody gains by having been idle.
    """

    def __init__(self) -> None:
        self._served = 0
        self._last: dict[str, int] = {}

    def next(self, user: str) -> int:
        """The turn of a job that this user has now."""
        turn = max(self._served, self._last.get(user, 0)) + 1
        self._last[user] = turn
        return turn

    def give_back(self, user: str, last: int) -> None:
        """A job of this user will not be served; `last` is the highest turn of those that still wait, 0 without any."""
        if last > self._served:
            self._last[user] = last
        else:
            self._last.pop(user, None)

    def serve(self, turn: int) -> None:
        """A job of that turn starts."""
        if turn > self._served:
            self._served = turn
            self._last = {user: last for user, last in self._last.items() if last > turn}
