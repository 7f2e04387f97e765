"""One worker under a simulated clock: its book, its ledger and its decision are the real ones.

Simulated is what takes time: starts, tracing, the device, the encoder. Whatever computes on a device at once shares it
evenly (processor sharing), so a first video, which runs alongside the others without a lease, costs those others what
it costs them on a real device. Not simulated: memory that runs out, and faults of shape processes.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltx2_pool.serving.actions import Evict, Start, Wake
from ltx2_pool.serving.book import Begin, Book
from ltx2_pool.serving.ledger import Ledger, Phase, Reservation
from ltx2_pool.serving.tickets import Answer, Ticket
from ltx2_pool.words.outcomes import Video
from ltx2_pool.words.protocol import Memory
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import Key

_MEMORY = Memory(resident=1, peak=2)
_FRESH = Memory(resident=1, peak=2, generated=False)
_VIDEO = Video(Path(), 0, {})


@dataclass(frozen=True)
class Costs:
    """Seconds that things take. The defaults are an H200's with 48 layers (docs/measurements.md)."""

    videos: Mapping[Key, float]
    """On the device, hot and alone, by key."""
    warm_ups: Mapping[Key, float]
    """The same of a warm-up video, which has one step."""
    ready: float = 1.3
    """From the fork to READY, without a warm-up."""
    trace: float = 3.0
    """What the first video of a process takes longer with a baked cache; no device time."""
    encode: float = 0.1
    """From the end of the device's part to the file."""
    end: float = 0.2
    """From the word to a process to go, until its place is free."""
    restart: float = 55.0
    """From the loss of a worker, or the end of its drain, to another one that serves: zygote and weights."""
    hot_spread: Sequence[float] = (1.0,)
    """How a hot video's seconds spread about those above: for each, one of these factors is drawn."""
    start_spread: Sequence[float] = (1.0,)
    """The same of starts and first videos."""


class Clock:
    """Simulated seconds, and what is to happen when."""

    def __init__(self) -> None:
        self.now = 0.0
        self.chance = random.Random(0)
        """What is drawn in this simulated time."""
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()

    def at(self, when: float, what: Callable[..., None], *arguments: Any) -> None:
        """Call it then. Of two things at the same moment, the one that was asked for first."""
        heapq.heappush(self._events, (when, next(self._numbers), what, arguments))

    def after(self, seconds: float, what: Callable[..., None], *arguments: Any) -> None:
        """Call it in so many seconds."""
        self.at(self.now + seconds, what, *arguments)

    def run(self, until: float) -> None:
        """Let everything happen that is to happen before that moment."""
        events = self._events
        while events and events[0][0] < until:
            self.now, _, what, arguments = heapq.heappop(events)
            what(*arguments)
        self.now = until


class _Device:
    """Shares itself evenly among the work on it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._work: dict[int, tuple[float, Callable[[], None]]] = {}
        """By process: the share of all seconds so far at which it is done, and what is then."""
        self._share = 0.0
        """Seconds that each piece of work has had that was there all the time."""
        self._since = 0.0
        self._version = 0
        self._busy = 0.0

    @property
    def busy(self) -> float:
        """Seconds in which there was work, so far."""
        self._settle()
        return self._busy

    def add(self, process: int, seconds: float, done: Callable[[], None]) -> None:
        """Work of that many device seconds."""
        self._settle()
        self._work[process] = (self._share + seconds, done)
        self._plan()

    def clear(self) -> None:
        """Nothing is worked on any more."""
        self._settle()
        self._work.clear()
        self._plan()

    def _settle(self) -> None:
        now = self._clock.now
        if self._work:
            self._busy += now - self._since
            self._share += (now - self._since) / len(self._work)
        self._since = now

    def _plan(self) -> None:
        self._version += 1
        if self._work:
            left = min(end for end, _ in self._work.values()) - self._share
            self._clock.after(max(0.0, left) * len(self._work), self._done, self._version)

    def _done(self, version: int) -> None:
        if version != self._version:
            return  # something has come in between
        self._settle()
        process = min(self._work, key=lambda number: self._work[number][0])
        _, done = self._work.pop(process)
        self._plan()
        done()


class Worker:
    """A pool's book, and the time that what it decides takes."""

    def __init__(
        self,
        clock: Clock,
        costs: Costs,
        ahead: Sequence[Key],
        devices: int,
        places: int | None,
        on_change: Callable[[Worker], object],
        tell: Callable[[Worker], object],
    ) -> None:
        """`on_change` is called when its forecast may be another, `tell` when it should hear of the fleet."""
        self._clock = clock
        self._costs = costs
        self._on_change = on_change
        self._tell = tell
        names = [f"gpu{number}" for number in range(devices)]
        ledger = Ledger(dict.fromkeys(names, 10**9), max_processes=places)
        for key in costs.videos:
            ledger.observe(key, _MEMORY)
        self.book = Book(ledger, keys=tuple(costs.videos), ahead=ahead)
        self.devices = {name: _Device(clock) for name in names}
        self._full = devices * places if places is not None else None
        self._wake: float | None = None
        self.alive = True
        self.spawns = 0
        self.hot = 0
        self.decide()

    def admit(self, job: Job, key: Key, settle: Callable[[Answer], None]) -> Ticket:
        """Take a job in. Raises a Rejected, as the book does."""
        ticket = self.book.admit(job, key, "", settle, self._clock.now)
        self.decide()
        return ticket

    def die(self) -> None:
        """The worker is lost, or ends, with all that it does."""
        self.alive = False
        for device in self.devices.values():
            device.clear()

    @property
    def busy(self) -> float:
        """Device seconds that it has worked."""
        return sum(device.busy for device in self.devices.values())

    def decide(self) -> None:
        """As the pool does after every event."""
        self._on_change(self)
        book = self.book
        if not book.waiting and len(book.ledger.reservations) == self._full:
            return  # nobody waits, and nothing can be started ahead: there is nothing to decide
        self._tell(self)
        for action in book.next_actions(self._clock.now):
            match action:
                case Begin():
                    self._begin(action)
                case Start():
                    ticket = action.job
                    assert isinstance(ticket, Ticket)
                    self._make(ticket, action.process, action.phase)
                case Evict():
                    self._clock.after(self._costs.end, self._gone, action.process)
                case Wake():
                    self._wake_at(action.at)

    def _wake_at(self, when: float) -> None:
        if self._wake != when:
            self._wake = when
            self._clock.at(when + 1e-3, self._woken, when)

    def _woken(self, when: float) -> None:
        if self.alive and self._wake == when:
            self._wake = None
            self.decide()

    def _begin(self, action: Begin) -> None:
        self.spawns += 1
        process, costs = action.process, self._costs
        if not action.warm:
            seconds = costs.ready * self._clock.chance.choice(costs.start_spread)
            self._clock.after(seconds, self._ready, process, _FRESH, seconds)
            return
        began = self._clock.now

        def warm_up() -> None:
            self._compute(process, costs.warm_ups[process.key], lambda: self._warm(process, began))

        self._clock.after(costs.ready + costs.trace, warm_up)

    def _warm(self, process: Reservation, began: float) -> None:
        self._ready(process, _MEMORY, self._clock.now - began)

    def _ready(self, process: Reservation, memory: Memory, seconds: float) -> None:
        if self.alive:
            self.book.ready(process, memory, seconds)
            self.decide()

    def _make(self, ticket: Ticket, process: Reservation, phase: Phase) -> None:
        began, costs, hot = self._clock.now, self._costs, phase is Phase.GENERATING
        factor = self._clock.chance.choice(costs.hot_spread if hot else costs.start_spread)
        seconds = factor * costs.videos[ticket.key]

        def computed() -> None:
            self.book.encoding(process)
            self._clock.after(costs.encode, done)
            self.decide()

        def done() -> None:
            if self.alive:
                self.hot += hot
                self.book.done(process, _MEMORY, _VIDEO, self._clock.now - began)
                self.decide()

        if hot:
            self._compute(process, seconds, computed)
        else:
            self._clock.after(factor * costs.trace, self._compute, process, seconds, computed)

    def _compute(self, process: Reservation, seconds: float, done: Callable[[], None]) -> None:
        if self.alive:
            self.devices[process.devices[0]].add(process.id, seconds, done)

    def _gone(self, process: Reservation) -> None:
        if self.alive:
            self.book.end(process)
            self.book.gone(process)
            self.decide()
