"""The book: every job and every process of the pool, and what each event does to them. Pure, like the decision.

An event is a method; what follows for a client comes out through its ticket, exactly once. No I/O, no tasks, and no
clock but the times passed in: the property test drives this very class through its histories, :mod:`pool` through one.
"""

from __future__ import annotations

import itertools
from bisect import insort
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal

from ltx2_pool.serving.actions import Action, Evict, Pause, Refuse, Spawn, Start, State, Wake
from ltx2_pool.serving.breaker import Pauses, Starts
from ltx2_pool.serving.demand import Listener
from ltx2_pool.serving.devices import Devices
from ltx2_pool.serving.durations import Durations
from ltx2_pool.serving.ledger import Ledger, Phase, Reservation
from ltx2_pool.serving.poisons import POISON_SECONDS, Poisons
from ltx2_pool.serving.schedule import decide
from ltx2_pool.serving.tickets import Answer, Limits, Ticket, Turns
from ltx2_pool.words.outcomes import (
    FROM_OUTSIDE,
    SHAPES_OWN_FAULT,
    JobFailed,
    Poisonous,
    PoolClosed,
    ProcessLost,
    QueueFull,
    Rejected,
    Unavailable,
    Video,
)
from ltx2_pool.words.protocol import Memory
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import Key

FAULTS = 2
"""Processes that a job may have ended before it fails, and its parameters are refused for a while."""
LOSSES = 10
"""Processes that a job may lose through no fault of its own before it is given up."""
RIDDLES = 3
"""Of these, losses that nothing outside explains: deaths before its first phase, failed compilations."""

Charge = Literal["dropped", "retry", "failed", "poisoned"]
"""What a loss does to its job: nobody waited for it, it is tried again, it failed, it and its equals are refused."""


@dataclass(frozen=True, slots=True)
class Begin:
    """A process to start; its reservation is made. `warm`: with a warm-up video."""

    process: Reservation
    warm: bool
    why: str


@dataclass
class Book:
    """The pool's state.

    `keys` is what may be asked for, `ahead` what is started before anybody asks, `gpus` on how many devices a process
    of a key runs, where that is not one. `pinned`: the fleet's demand decides on the order of `ahead` only.
    """

    ledger: Ledger
    limits: Limits = field(default_factory=Limits)
    keys: Sequence[Key] = ()
    ahead: Sequence[Key] = ()
    pauses: Pauses = field(default_factory=Pauses)
    gpus: Mapping[Key, int] = field(default_factory=dict)
    decide: Callable[[State], list[Action]] = decide
    pinned: bool = False

    def __post_init__(self) -> None:
        self.waiting: list[Ticket] = []
        """In the order in which they are served."""
        self.running: dict[int, Ticket] = {}
        """By the process that makes it."""
        self.closing = False
        self.helpers_down = False
        """What starts need had failed too often on every device, and no start has worked since."""
        self.starts: dict[Key, Starts] = {}
        self.devices = Devices(self.ledger.devices, self.pauses)
        self._turns = Turns()
        self._numbers = itertools.count()
        self._process_numbers = itertools.count()
        self._poisons = Poisons()
        self.durations = Durations()
        self.listener = Listener()
        self._ahead = self.ahead if self.pinned else tuple(dict.fromkeys((*self.ahead, *self.keys)))

    # Jobs come and go.

    def admit(
        self,
        job: Job,
        key: Key,
        user: str,
        settle: Callable[[Answer], None],
        now: float,
        pixels: Sequence[int] = (),
    ) -> Ticket:
        """Take a job in. Raises a Rejected; nothing has then happened."""
        if self.closing:
            raise PoolClosed("the worker is shutting down")
        if left := self._poisons.left(job, now):
            raise _poisonous(left)
        starts = self.starts.get(key)
        if starts is not None and starts.unavailable(now) and not self._serves(key):
            raise _unavailable(key, starts.pause(now), now)
        limits = self.limits
        of_shape = sum(ticket.key == key for ticket in self.waiting)
        of_user = sum(ticket.user == user for ticket in self.waiting)
        for reason, count, limit in (
            ("queue_full", len(self.waiting), limits.max_queue),
            ("shape_queue_full", of_shape, limits.max_queue_per_shape),
            ("user_queue_full", of_user, limits.per_user),
        ):
            if count >= limit:
                raise QueueFull(reason, count, self.expected_wait())
        ticket = Ticket(
            number=next(self._numbers),
            key=key,
            since=now,
            turn=self._turns.next(user),
            job=job,
            user=user,
            pixels=pixels,
            settle=settle,
        )
        insort(self.waiting, ticket, key=attrgetter("order"))
        return ticket

    def give_up(self, ticket: Ticket) -> Reservation | None:
        """Nobody waits for the job any more. Returns the process that makes it now and should be told."""
        ticket.answered = True
        if ticket.process is not None:
            return ticket.process
        if ticket in self.waiting:
            self._remove(ticket)
        return None

    def close(self) -> None:
        """Admit nothing more."""
        self.closing = True

    def settle_all(self, make_error: Callable[[], Exception]) -> None:
        """Answer every job that is not answered yet; those that run are dropped when their process is done."""
        for ticket in (*self.waiting, *self.running.values()):
            self._answer(ticket, make_error())
        self.waiting.clear()

    # Processes begin, report and end.

    def ready(self, process: Reservation, memory: Memory, seconds: float) -> None:
        """A process takes jobs; its start took that many seconds."""
        if process.key in self.starts:
            self.starts[process.key].started()
        self.helpers_down = False
        self.ledger.observe(process.key, memory)
        process.hot = process.hot or memory.generated
        if memory.generated:
            self.devices.well(process.key, process.devices)
        if not process.ending:
            self.ledger.enter(process, Phase.IDLE)
        self.durations.ready(process.key, seconds)

    def start_failed(self, process: Reservation, lost: ProcessLost, now: float) -> bool:
        """A process was lost before it took jobs. Returns whether that counts against the shape."""
        alone = self.ledger.alone(process)
        if lost.reason == "oom":
            self.ledger.ran_out(process)
            for ticket in self.waiting:
                if ticket.key == process.key:
                    ticket.alone = True
                    break
        process.ending = True
        starts = self.starts.setdefault(process.key, Starts(self.pauses))
        # Of several ranks whose start fails, which one is noticed first says nothing of its device.
        if lost.reason in SHAPES_OWN_FAULT and lost.reason != "oom" and len(process.devices) == 1:
            self.devices.faulted(process.key, lost.devices or process.devices, now, lost.what)
        guilty = lost.reason in SHAPES_OWN_FAULT and (lost.reason != "oom" or alone)
        if guilty:
            starts.failed(now, lost.what)
        elif lost.reason == "helper":  # those have a pause of their own
            self.devices.shun(process.key, process.devices)
        else:
            starts.disturbed(now, lost.what)
        return guilty

    def encoding(self, process: Reservation) -> None:
        """The devices are done with the job: the next one may have them."""
        if not process.ending and process.phase is not Phase.ENCODING:
            process.hot = True
            self.ledger.enter(process, Phase.ENCODING)

    def done(self, process: Reservation, memory: Memory, video: Video, seconds: float) -> bool:
        """The process made its job's video, in that many seconds. Returns False when nobody wants it."""
        ticket = self.running.pop(process.id)
        wanted = not ticket.answered
        ticket.process = None
        self.starts.pop(process.key, None)
        self.devices.well(process.key, process.devices)
        self.durations.made(process.key, seconds, first=ticket.cold)
        self._free(process, memory, made=True)
        self._answer(ticket, video)
        return wanted

    def failed(self, process: Reservation, error: JobFailed | Rejected) -> None:
        """The process made no video, and serves on."""
        ticket = self.running.pop(process.id)
        ticket.process = None
        self._free(process, error.memory if isinstance(error, JobFailed) else None, made=False)
        self._answer(ticket, error)

    def _free(self, process: Reservation, memory: Memory | None, *, made: bool) -> None:
        if memory is not None:
            self.ledger.observe(process.key, memory, made=made)
        process.hot = process.hot or made
        if not process.ending:
            self.ledger.enter(process, Phase.IDLE)

    def lost(self, process: Reservation, lost: ProcessLost, now: float) -> Charge | None:
        """A process that took jobs is lost, or will be in a moment. Says what became of its job; None without one."""
        ticket = self.running.pop(process.id, None)
        alone = self.ledger.alone(process)
        if lost.memory is not None:
            self.ledger.observe(process.key, lost.memory, made=False)
        if lost.reason == "oom":
            self.ledger.ran_out(process)
        if lost.reason == "cuda_fault":
            self.devices.faulted(process.key, lost.devices or process.devices, now, lost.what)
        process.ending = True
        if ticket is None:
            self.starts.setdefault(process.key, Starts(self.pauses)).disturbed(now, lost.what)
            return None
        ticket.process = None
        if ticket.answered:
            return "dropped"
        ticket.losses += 1
        ticket.faults += lost.jobs_fault and not self._again_there(ticket, process, lost)
        if not lost.jobs_fault and lost.reason not in FROM_OUTSIDE:
            ticket.puzzle(lost.reason, process.id, max([process.id, *self.ledger.reservations]))
        if ticket.faults >= FAULTS:
            self._poison(ticket.job, now)
            self._answer(ticket, lost)
            return "poisoned"
        hopeless = lost.reason == "oom" and ticket.alone and alone
        if (
            hopeless
            or ticket.losses >= LOSSES
            or ticket.riddles >= RIDDLES
            or (lost.reason == "gen_timeout" and lost.jobs_fault)
        ):
            self._answer(ticket, lost)
            return "failed"
        ticket.alone = ticket.alone or lost.reason == "oom"
        insort(self.waiting, ticket, key=attrgetter("order"))
        return "retry"

    def _again_there(self, ticket: Ticket, process: Reservation, lost: ProcessLost) -> bool:
        """Whether a device has faulted under the job before, and there are others: then it is the device's fault."""
        if lost.reason != "cuda_fault" or len(process.devices) == len(self.ledger.devices):
            return False
        where = lost.devices or process.devices
        again = not ticket.faulty.isdisjoint(where)
        ticket.faulty.update(where)
        return again

    def end(self, process: Reservation) -> None:
        """The process is told to end, or has ended; its devices are not free yet."""
        process.ending = True

    def gone(self, process: Reservation) -> None:
        """Nothing is left of the process."""
        self.ledger.release(process)

    # The decision.

    def next_actions(
        self, now: float, helpers: Mapping[str, Pause] = {}
    ) -> list[Start | Begin | Evict | Refuse | Wake]:
        """What to do now. What that changes in the book is changed already: the list only has to be carried out.

        `helpers`: devices on which what all starts need does not start.
        """
        paused = {key: pause for key, starts in self.starts.items() if (pause := starts.pause(now)) is not None}
        ahead: Sequence[Key] = () if self.closing else self._ahead
        most_ahead: int | None = len(self.ahead)
        self.devices.helpless = frozenset(helpers)
        out = {**self.devices.out(now), **helpers}
        self.helpers_down = self.helpers_down or len(out) == len(self.ledger.devices)
        if not self.closing and not self.able():
            # Or it would never learn that it can.
            ahead, most_ahead = tuple(dict.fromkeys((*ahead, *self.starts, *self.keys))), None
        todo: list[Start | Begin | Evict | Refuse | Wake] = []
        jobs, avoid = self.waiting[:], self.devices.avoided
        worth, patience = self.listener.worth(now), self.limits.patience
        state = State(now, jobs, self.ledger, paused, out, avoid, self.gpus, ahead, most_ahead, worth, patience)
        for action in self.decide(state):
            match action:
                case Spawn():
                    process = self.ledger.reserve(next(self._process_numbers), action.key, action.devices)
                    todo.append(Begin(process, action.warm, action.why))
                    continue
                case Start():
                    self._start(action, now)
                case Evict():
                    action.process.ending = True
                case Refuse():
                    ticket = action.job
                    assert isinstance(ticket, Ticket)
                    self._remove(ticket)
                    self._answer(ticket, _unavailable(ticket.key, action.pause, now))
            todo.append(action)
        return todo

    def _start(self, action: Start, now: float) -> None:
        ticket = action.job
        assert isinstance(ticket, Ticket)
        self.waiting.remove(ticket)
        self._turns.serve(ticket.turn)
        ticket.process = action.process
        ticket.attempts += 1
        ticket.began, ticket.cold = now, action.phase is Phase.SPAWNING
        self.running[action.process.id] = ticket
        self.ledger.enter(action.process, action.phase, alone=ticket.alone)

    # What can be said.

    @property
    def unanswered(self) -> int:
        """Jobs whose clients still wait."""
        return sum(not ticket.answered for ticket in (*self.waiting, *self.running.values()))

    def able(self) -> bool:
        """Whether some video can be made: a process serves, or a start is worth a try."""
        if any(not r.ending and (r.hot or r.phase is Phase.IDLE) for r in self.ledger.reservations.values()):
            return True
        hopeless = {key for key, starts in self.starts.items() if starts.hopeless}
        return not self.helpers_down and (not self.keys or not hopeless.issuperset(self.keys))

    def unavailable(self, now: float) -> dict[Key, float]:
        """Keys whose jobs are refused, and for how many seconds more."""
        return {key: starts.remaining(now) for key, starts in self.starts.items() if starts.unavailable(now)}

    def hot_enough(self, minimum: int, now: float) -> bool:
        """Whether `minimum` of the keys to start ahead are hot, or nothing more can become so for the moment."""
        live = [r for r in self.ledger.reservations.values() if not r.ending]
        ready = {r.key for r in live if r.phase not in (Phase.LOADING, Phase.SPAWNING)}.intersection(self.ahead)
        if len(ready) >= min(minimum, len(self.ahead)):
            return True
        starting = {r.key for r in live} - ready
        left = len(self.devices.in_service(now))
        tried = {k for k, starts in self.starts.items() if not starts.unavailable(now) and self.gpus.get(k, 1) <= left}
        if not (starting | tried).isdisjoint(set(self.ahead) - ready):
            return False
        return bool(ready) or self.able()

    def expected_wait(self) -> float:
        """Seconds that a job admitted now would wait for the jobs before it, by what their shapes took lately."""
        jobs = Counter(ticket.key for ticket in (*self.waiting, *self.running.values()))
        work = sum(self.durations.videos.get(key, 0.0) * count * self.gpus.get(key, 1) for key, count in jobs.items())
        cold = sum(self.durations.spawn(key) for key in jobs if not self._serves(key))
        return work / self.ledger.leases + cold

    def _serves(self, key: Key) -> bool:
        return any(r.key == key and not r.ending for r in self.ledger.reservations.values())

    def _poison(self, job: Job, now: float) -> None:
        """Refuse these parameters for a while, to the equal jobs that wait already as well."""
        self._poisons.add(job, now)
        for ticket in [ticket for ticket in self.waiting if self._poisons.left(ticket.job, now)]:
            self._remove(ticket)
            self._answer(ticket, _poisonous(POISON_SECONDS))

    def _remove(self, ticket: Ticket) -> None:
        """It waits no longer, and was not started: its turn is given back."""
        self.waiting.remove(ticket)
        self._turns.give_back(ticket.user, max((t.turn for t in self.waiting if t.user == ticket.user), default=0))

    def _answer(self, ticket: Ticket, answer: Answer) -> None:
        if not ticket.answered:
            ticket.answered = True
            ticket.settle(answer)


def _poisonous(seconds: float) -> Poisonous:
    return Poisonous(f"a job with these parameters ended {FAULTS} processes; refused for {seconds:.0f} s more")


def _unavailable(key: Key, pause: Pause | None, now: float) -> Unavailable:
    left = max(0.0, pause.until - now) if pause is not None and pause.until < float("inf") else None
    why = pause.refuse if pause is not None and pause.refuse else "its processes do not start"
    return Unavailable(f"{key} is {why}" + (f"; the next try is in {left:.0f} s" if left is not None else ""), left)
