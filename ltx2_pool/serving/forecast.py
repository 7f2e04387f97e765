"""What a pool expects of itself, for whoever decides where the next job goes. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field, TypeAdapter

from ltx2_pool.serving.book import Book
from ltx2_pool.serving.ledger import Phase
from ltx2_pool.words.shapes import Key

LEFT_AT_LEAST = 0.1
"""Of its shape's seconds, what a job that runs still takes at least, as far as anybody knows."""

Count = Annotated[int, Field(ge=0, le=10**6)]
Seconds = Annotated[float, Field(ge=0, le=1e7, allow_inf_nan=False)]
"""What is beyond them is nonsense, and would spoil what is known of all other workers."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """A pool at one moment; keys are written as in status and metrics."""

    leases: Annotated[int, Field(ge=1, le=10**6)]
    """On all devices together."""
    free: Annotated[int, Field(ge=-(10**6), le=10**6)]
    """Leases less the jobs that compute or wait; below 0 when there are more. A first video counts: it computes beside
    the others without a lease, and slows them down."""
    work: Seconds
    """Device seconds until everything that runs or waits is done, divided by `leases`."""
    processes: Mapping[str, Count] = field(default_factory=dict)
    """By key: those that take jobs or will, once started."""
    jobs: Mapping[str, Count] = field(default_factory=dict)
    """By key: those that run or wait."""
    seconds: Mapping[str, Seconds] = field(default_factory=dict)
    """By key that has a process or a job: what a video took lately."""
    unmeasured: Mapping[str, Count] = field(default_factory=dict)
    """By key: the jobs of which `work` knows nothing, because no video of the key was made here yet."""
    spawn: Seconds | None = None
    """What a video takes longer, lately, when a process has to be started for it; None: nobody knows yet."""
    unavailable: frozenset[str] = frozenset()
    """Keys whose jobs would be refused."""

    @classmethod
    def of(cls, said: object) -> Forecast:
        """From what :meth:`said` made; fields that a newer worker has besides are passed over. Raises ValueError."""
        return _READER.validate_python(said)

    def said(self) -> dict[str, object]:
        """For JSON."""
        said: dict[str, object] = _READER.dump_python(self, mode="json")
        return said


_READER = TypeAdapter(Forecast)


def forecast(book: Book, now: float) -> Forecast:
    """What the book expects."""
    keys: dict[str, Key] = {}
    processes: dict[str, int] = {}
    for process in book.ledger.reservations.values():
        if not process.ending:
            label = str(process.key)
            keys[label] = process.key
            processes[label] = processes.get(label, 0) + 1
    jobs: dict[str, int] = {}
    unmeasured: dict[str, int] = {}
    work, wanted = 0.0, 0
    videos, gpus = book.durations.videos, book.gpus
    for ticket in (*book.running.values(), *book.waiting):
        label = str(ticket.key)
        keys[label] = ticket.key
        jobs[label] = jobs.get(label, 0) + 1
        if ticket.key not in videos:
            unmeasured[label] = unmeasured.get(label, 0) + 1
        left = videos.get(ticket.key, 0.0)
        if ticket.process is not None:
            if ticket.process.phase is Phase.ENCODING:
                continue
            spawn = book.durations.spawn(ticket.key) if ticket.cold else 0.0
            left = max(left + spawn - (now - ticket.began), LEFT_AT_LEAST * left)
        wanted += gpus.get(ticket.key, 1)
        work += left * gpus.get(ticket.key, 1)
    return Forecast(
        leases=book.ledger.leases,
        free=book.ledger.leases - wanted,
        work=work / book.ledger.leases,
        processes=processes,
        jobs=jobs,
        seconds={label: videos[key] for label, key in keys.items() if key in videos},
        unmeasured=unmeasured,
        spawn=book.durations.usual_spawn,
        unavailable=frozenset(map(str, book.unavailable(now))),
    )
