"""Random histories of the book, the ledger and the decision, with every kind of event, and what must hold in each.

A history is made from a number, so one that fails can be run again: ``python -m tests.serving.histories NUMBER``.
"""

from __future__ import annotations

import random
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from ltx2_pool.serving import schedule
from ltx2_pool.serving.actions import Action, Evict, Pause, Start, State, Wake
from ltx2_pool.serving.book import FAULTS, LOSSES, Begin, Book
from ltx2_pool.serving.breaker import Pauses
from ltx2_pool.serving.demand import Demand
from ltx2_pool.serving.ledger import ACTIVE, Ledger, Phase, Reservation
from ltx2_pool.serving.poisons import parameters
from ltx2_pool.serving.tickets import Limits, Ticket
from ltx2_pool.words.outcomes import JobFailed, Poisonous, PoolClosed, ProcessLost, Reason, Rejected, Video
from ltx2_pool.words.protocol import Memory
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import Key, Shape

KEYS = [Key(Shape(32 * n, 32, 9)) for n in range(1, 5)]
PROMPTS = ("a", "b", "c", "d")
MEMORIES = {(idle, peak): Memory(resident=idle, peak=peak) for idle in range(4) for peak in range(61)}
INNOCENT = ("killed", "weights_lost", "silent", "send_failed", "oom")
GUILTY = ("gen_eof", "cuda_fault", "parse_error", "desync")
STARTS = ("spawn_eof", "spawn_timeout", "killed", "system", "weights_lost", "oom")
VIDEO = Video(None, 0, {})  # type: ignore[arg-type]
Decide = Callable[[State], list[Action]]


class Broken(AssertionError):
    """Something that must hold does not."""


@dataclass(slots=True)
class Life:
    """One process of the world."""

    process: Reservation
    stage: str = "starting"
    """starting, idle, given (a job), begun (its first phase), writing, ending."""


class World:
    """Makes events happen to a book, and looks at it after each."""

    def __init__(self, number: int, decide: Decide = schedule.decide) -> None:
        self.random = random.Random(number)
        pick = self.random.random
        roll = pick()
        count = 1 if roll < 0.5 else 2 if roll < 0.75 else self.random.randrange(3, 9)
        self.devices = tuple(f"d{n}" for n in range(count))
        self.concurrency = 1 if pick() < 0.7 else 2
        self.budget = self.random.randrange(20, 80)
        self.max_processes = None if pick() < 0.6 else self.random.randrange(1, 4)
        self.lends = pick() < 0.3
        self.measures = pick() < 0.9  # the driver may never say how much is free
        self.keys = KEYS[: self.random.randrange(2, 5)]
        peaks = sorted(self.random.randrange(3, 60) for _ in self.keys)  # a larger shape takes more
        self.true = dict(zip(self.keys, ((self.random.randrange(3), peak) for peak in peaks), strict=True))
        self.ledger = Ledger(
            dict.fromkeys(self.devices, None if self.lends else self.budget),
            concurrency=self.concurrency,
            max_processes=self.max_processes,
        )
        for key in self.keys:
            if pick() < 0.7:
                self.ledger.observe(key, MEMORIES[self.true[key]])
        ahead = self.keys if pick() < 0.3 else ()
        self.gpus = {key: self.random.randrange(1, 5) for key in self.keys if pick() < 0.3} if count > 1 else {}
        limits = Limits(8, 5, 6, patience=3.0)
        self.book = Book(self.ledger, limits, self.keys, ahead, Pauses(2.0, 8.0, 0.1, 1.0), self.gpus, decide)
        self.now = 0.0
        self.wake: float | None = None
        self.lives: dict[int, Life] = {}
        self.tickets: list[Ticket] = []
        self.answers: Counter[int] = Counter()
        self.cancelled: set[int] = set()
        self.faults: Counter[Job] = Counter()
        self.kind: Counter[str] = Counter()
        self.helpers: dict[str, Pause] = {}
        self.listens = pick() < 0.5

    # Events.

    def arrive(self) -> None:
        key = self.keys[int(self.random.random() * len(self.keys))]
        number = len(self.tickets)
        job = Job(str(number), key.shape, PROMPTS[int(self.random.random() * 4)], 1, 2, 1.0, 24)

        def settle(answer: object) -> None:
            self.answers[number] += 1
            if isinstance(answer, Poisonous):
                self.innocent_unless(self.faults[parameters(job)] >= FAULTS)

        try:
            ticket = self.book.admit(job, key, PROMPTS[int(self.random.random() * 3)], settle, self.now)
        except Poisonous:
            self.innocent_unless(self.faults[parameters(job)] >= FAULTS)
        except Rejected:
            self.kind["rejected"] += 1
        else:
            if self.book.closing:
                raise Broken("a job was admitted after the close")
            self.tickets.append(ticket)

    def innocent_unless(self, guilty: bool) -> None:
        if not guilty:
            raise Broken("an innocent job was called poison")

    def cancel(self) -> None:
        open_ = [ticket for ticket in self.tickets[-6:] if not ticket.answered]
        if open_:
            ticket = open_[int(self.random.random() * len(open_))]
            self.cancelled.add(ticket.number)
            self.book.give_up(ticket)

    def hear(self) -> None:
        """One of two routers says what the fleet is asked for."""
        pick = self.random.random
        rates = {str(key): pick() for key in self.keys if pick() < 0.8}
        elsewhere = {key: int(pick() * 3) for key in rates}
        self.book.listener.hear(Demand("ab"[int(pick() * 2)], rates, elsewhere, pick()), self.now)
        self.kind["heard"] += 1

    def advance(self, life: Life, good: bool) -> None:
        """What comes next in the life of a process: as it should, or not."""
        process, roll = life.process, 0.0 if good else self.random.random()
        memory = MEMORIES[self.true[process.key]]
        if life.stage == "ending":
            self.book.gone(process)
            del self.lives[process.id]
        elif life.stage == "starting":
            if roll < 0.7:
                if self.lends:
                    for device in process.devices:
                        if self.ledger.budget(device) is None and self.measures:
                            self.ledger.set_budget(device, self.budget)
                self.book.ready(process, memory, 1.0)
                life.stage = "ending" if process.ending else "idle"
            else:
                reason = STARTS[int(self.random.random() * len(STARTS))]
                self.kind[f"start {reason}"] += 1
                self.book.start_failed(process, ProcessLost("p", reason, "w"), self.now)
                life.stage = "ending"
        elif roll >= 0.8:
            self.lose(life)
        elif life.stage == "given":
            if roll < 0.7:
                life.stage = "begun"
            else:
                self.book.failed(process, JobFailed(process.key, "soft", "no", memory))
                life.stage = "idle"
        elif life.stage == "begun":
            self.book.encoding(process)
            life.stage = "writing"
        elif life.stage == "writing":
            self.book.done(process, memory, VIDEO, 1.0)
            life.stage = "idle"
        if life.stage == "idle" and process.ending:
            life.stage = "ending"

    def lose(self, life: Life) -> None:
        process = life.process
        began = life.stage in ("begun", "writing")
        reasons = INNOCENT if self.random.random() < 0.5 else GUILTY
        lost = ProcessLost("p", reasons[int(self.random.random() * len(reasons))], "w", began=began)
        ticket = self.book.running.get(process.id)
        if ticket is not None and lost.jobs_fault and not ticket.answered:
            self.faults[parameters(ticket.job)] += 1
        charge = self.book.lost(process, lost, self.now)
        self.kind[f"{life.stage} {lost.reason}"] += 1
        if charge == "poisoned":
            assert ticket is not None
            self.innocent_unless(self.faults[parameters(ticket.job)] >= FAULTS)
        life.stage = "ending"

    def end_all_on(self, device: str, reason: Reason) -> None:
        """The weights of a device are lost, or it is taken out."""
        if self.lends:
            self.ledger.set_budget(device, None)
        for life in self.lives.values():
            if device in life.process.devices:
                if life.stage == "starting":
                    self.book.start_failed(life.process, ProcessLost("p", reason, "w"), self.now)
                elif life.stage != "ending":
                    self.book.lost(life.process, ProcessLost("p", reason, "w"), self.now)
                life.stage = "ending"

    # The decision, and what must hold after it.

    def decide(self) -> None:
        for device, _ in self.book.devices.taken_out():
            self.kind["taken out"] += 1
            self.end_all_on(device, "device_lost")
        before = [(ticket.order, ticket) for ticket in self.book.waiting]
        idle: dict[Key, list[Reservation]] = {}
        for process in self.ledger.reservations.values():
            if process.idle and process.hot:
                idle.setdefault(process.key, []).append(process)
        releasing = {device for r in self.ledger.reservations.values() if r.ending for device in r.devices}
        self.wake = None
        started: list[Ticket] = []
        self.helpers = {device: pause for device, pause in self.helpers.items() if pause.until > self.now}
        out = self.helpers | self.book.devices.out(self.now)
        worth = self.book.listener.worth(self.now) or (lambda _: 0.0)
        spared = [r for r in self.ledger.reservations.values() if r.idle]
        gone: list[Reservation] = []
        for action in self.book.next_actions(self.now, self.helpers):
            if isinstance(action, Start):
                life = self.lives[action.process.id]
                if life.stage != "idle":
                    raise Broken(f"a job was given to a process that is {life.stage}")
                life.stage = "given"
                started.append(action.job)  # type: ignore[arg-type]
            elif isinstance(action, Begin):
                starts = self.book.starts.get(action.process.key)
                if out.keys() & set(action.process.devices) or (starts is not None and starts.remaining(self.now)):
                    raise Broken(f"{action.process.key} is started in a pause")
                if self.book.closing and action.warm:
                    raise Broken("something is started ahead after the close")
                if len(set(action.process.devices)) != self.gpus.get(action.process.key, 1):
                    raise Broken(f"{action.process.key} is started on {action.process.devices}")
                for other in self.ledger.reservations.values():
                    if other.key == action.process.key and other is not action.process and not other.ending:
                        self.kind["copies"] += 1
                        if set(other.devices) & set(action.process.devices):
                            raise Broken(f"{other.key} is started where it is")
                self.lives[action.process.id] = Life(action.process)
            elif isinstance(action, Evict):
                life = self.lives[action.process.id]
                if life.stage != "idle":
                    raise Broken(f"a process was evicted that is {life.stage}")
                self.kind["evicted"] += 1
                patience = self.book.limits.patience
                late = any(self.now >= t.since + patience for _, t in before)
                if (
                    (not late or "copy" in action.why)
                    and action.why.startswith("a ")
                    and any(action.process.key == t.key for _, t in before)
                ):
                    raise Broken(f"{action.process.key} was evicted while it is awaited and everybody is patient")
                life.stage = "ending"
                if action.why.startswith("a place"):
                    gone.append(action.process)
            elif isinstance(action, Wake):
                self.wake = action.at
        if len(self.devices) == 1 and gone:  # each key has one process at most
            awaited = {ticket.key for _, ticket in before}
            spared = [r for r in spared if r.idle and r.key not in awaited]
            least = min((worth(r.key), r.used) for r in spared) if spared else (float("inf"), 0)
            if any((worth(r.key), r.used) > least for r in gone):
                raise Broken(f"{gone} went, and {spared} would have been missed less")
        self.check()
        if self.max_processes == 1 and len(self.devices) == 1 and started and not self.helpers:
            served = {r.key for r in self.ledger.reservations.values()}
            for order, older in before:
                late = self.now >= older.since + self.book.limits.patience and older.key not in self.book.starts
                if late and order < started[0].order and not older.answered and older.key not in served:
                    raise Broken(f"job {started[0].number} passed one whose patience is over")
        passed = [(order, idle[older.key]) for order, older in before if older.key in idle and older.process is None]
        for job in started:
            if job.attempts > LOSSES:
                raise Broken(f"job {job.number} is tried for ever")
            for order, older in before:
                waits = older.process is None and not older.answered
                alone = older.alone and len(self.devices) > 1  # it may have to wait where another does not
                if order < job.order and older.key == job.key and waits and not alone:
                    raise Broken(f"job {job.number} was served before {older.number}")
            if job.process is not None and job.process.phase is Phase.GENERATING:
                taken = set(job.process.devices)
                for order, ready in passed:
                    # A gang that waits for one of its devices leaves a second lease of another alone.
                    ready = [r for r in ready if self.concurrency == 1 or len(r.devices) == 1]
                    blocked = [r for r in ready if r.idle and taken & set(r.devices) - releasing]
                    if order < job.order and ready and blocked == ready:
                        raise Broken(f"job {job.number} started before one whose process was ready")

    def check(self) -> None:
        held_leases = 0
        reservations = self.ledger.reservations.values()
        for device in self.devices:
            rows = leases = active = unknown = used = 0
            alone = False
            for process in reservations:
                if device in process.devices:
                    phase = process.phase
                    works = phase in ACTIVE
                    rows += 1
                    leases += phase is Phase.GENERATING
                    active += works
                    unknown += process.held_on(device).unknown
                    ticket = self.book.running.get(process.id)
                    alone = alone or (ticket is not None and ticket.alone and phase is not Phase.ENCODING)
                    used += self.true[process.key][works]
            held_leases += leases
            budget = self.ledger.budget(device)
            if leases > self.concurrency:
                raise Broken(f"{leases} leases on {device}")
            if self.max_processes is not None and rows > self.max_processes:
                raise Broken(f"{rows} processes on {device}")
            if alone and active > 1:
                raise Broken(f"a job that has to be alone on {device} is not")
            if unknown and active > 1:
                raise Broken(f"an unknown phase does not run alone on {device}")
            if not unknown and budget is not None and used > budget and rows > 1:
                raise Broken(f"{used} of {budget} bytes used on {device}")
        making = [t.process for t in self.book.running.values() if t.process is not None]
        made = sum(len(process.devices) for process in making if process.phase is Phase.GENERATING)
        if held_leases != made and not any(process.ending for process in reservations):
            raise Broken("a lease is held by no job")

    # A history.

    def run(self) -> None:
        pick = self.random.random
        closes = pick() < 0.2
        for _ in range(4 + int(pick() * (12 + 2 * len(self.devices)))):
            roll = pick()
            if self.listens and pick() < 0.2:
                self.hear()
            if roll < 0.36 or not self.lives:
                self.arrive()
            elif roll < 0.88:
                lives = list(self.lives.values())
                self.advance(lives[int(pick() * len(lives))], good=False)
            elif roll < 0.93:
                self.cancel()
            elif roll < 0.98:
                self.now += pick() * 4
            elif self.lends and roll < 0.99:
                self.end_all_on(self.random.choice(self.devices), "weights_lost")
            else:
                pause = Pause(self.now + pick() * 4, "no helpers" if pick() < 0.3 else "")
                everywhere = pick() < 0.5
                self.helpers = {d: pause for d in self.devices if everywhere or pick() < 0.5}
            self.decide()
        if closes:
            self.book.close()
            self.arrive()
            if pick() < 0.5:
                self.book.settle_all(lambda: PoolClosed("closed"))
        self.finish()

    def finish(self) -> None:
        """Everything goes well from now on: every job must be answered, and everything must come back."""
        for _ in range(600):
            if all(ticket.answered for ticket in self.tickets) and (self.book.closing or self.book.able()):
                break
            moving = [life for life in self.lives.values() if life.stage != "idle"]
            if moving:
                self.advance(moving[0], good=True)
            elif self.wake is not None:
                self.now = max(self.now, self.wake) + 1e-6
            else:
                raise Broken("jobs wait, or nothing can be made, and nothing can happen: that would be for ever")
            self.decide()
        else:
            raise Broken("jobs wait, or nothing can be made, for ever")
        self.book.close()
        for life in list(self.lives.values()):
            if life.stage == "starting":
                self.book.start_failed(life.process, ProcessLost("p", "killed", "w"), self.now)
            elif life.stage != "ending":
                self.book.lost(life.process, ProcessLost("p", "killed", "w"), self.now)
            self.book.gone(life.process)
        if self.ledger.reservations or self.book.running or self.book.waiting:
            raise Broken("something is left")
        if any(room.leases != self.concurrency for room in self.ledger.rooms().values()):
            raise Broken("a lease is lost")
        for ticket in self.tickets:
            expected = 0 if ticket.number in self.cancelled else 1
            if self.answers[ticket.number] != expected:
                raise Broken(f"job {ticket.number} was answered {self.answers[ticket.number]} times")


def broken(numbers: range, decide: Decide = schedule.decide) -> tuple[int, str] | None:
    """The first history in which something does not hold, and what."""
    for number in numbers:
        try:
            World(number, decide).run()
        except Exception:
            return number, traceback.format_exc()
    return None


if __name__ == "__main__":
    World(int(sys.argv[1])).run()
