"""What the decision depends on, and the actions that it consists of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ltx2_pool.serving.ledger import Ledger, Phase, Reservation
from ltx2_pool.words.shapes import Key


@dataclass(slots=True, eq=False)
class Waiting:
    """A job that waits, as the decision sees it."""

    number: int
    key: Key
    since: float
    """When its patience began, by the clock of `State.now`."""
    turn: int = 0
    """Its place among the users' jobs (:class:`ltx2_pool.serving.tickets.Turns`)."""
    alone: bool = False
    """Memory ran out in it: nothing else may be active beside it."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Starts of a key, or of all, have failed."""

    until: float
    """No start before."""
    refuse: str = ""
    """Why its jobs are not to wait for that; empty: they are."""


@dataclass(frozen=True, slots=True)
class State:
    """All that a decision depends on. Nothing in it is changed by :func:`decide`."""

    now: float
    jobs: Sequence[Waiting]
    """In the order of (turn, number)."""
    ledger: Ledger
    pauses: Mapping[Key, Pause] = field(default_factory=dict)
    """Of starts of a key."""
    out: Mapping[str, Pause] = field(default_factory=dict)
    """Devices on which nothing can be started."""
    avoid: Mapping[Key, Collection[str]] = field(default_factory=dict)
    """Devices that did a key's processes no good: others are preferred."""
    gpus: Mapping[Key, int] = field(default_factory=dict)
    """Devices that a process of the key runs on together, where that is not one."""
    ahead: Sequence[Key] = ()
    """What to start before anybody asks, in that order, as far as `worth` says no other."""
    most_ahead: int | None = None
    """Of these; None: all."""
    worth: Callable[[Key], float] | None = None
    """Starts a second that a process of a key saves the fleet here; None: nobody says."""
    patience: float = 0.0
    """Seconds."""


@dataclass(frozen=True, slots=True)
class Start:
    """Give the job to the process, in that phase: SPAWNING for its first video, which needs no lease."""

    job: Waiting
    process: Reservation
    phase: Phase


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start a process. `warm`: let it make a video before it takes jobs, because nobody waits for it."""

    key: Key
    devices: tuple[str, ...]
    warm: bool
    why: str


@dataclass(frozen=True, slots=True)
class Evict:
    """End an idle process."""

    process: Reservation
    why: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell the job's client that it will not be made."""

    job: Waiting
    pause: Pause
    """Why, and until when."""


@dataclass(frozen=True, slots=True)
class Wake:
    """Decide again at that time, if nothing has happened before."""

    at: float


Action = Start | Spawn | Evict | Refuse | Wake
