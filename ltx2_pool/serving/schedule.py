"""The decision: which job starts, which process is started, which is evicted. Pure; :mod:`pool` carries it out.

Jobs are looked at in their order. One whose process is idle starts, if a lease and the memory are there. One whose key
has no process gets one where there is room, or room is made: the least recently used idle processes go, those that
somebody waits for only when the job's patience is over. What a job has to wait for it *claims*, and no younger job may
take it. A process that works is never evicted, and a start needs no lease, so hot shapes flow on beside it.

So a job waits for what runs, for the jobs before it, for its own start, and for those that pass it while it is patient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ltx2_pool.serving.ledger import Ledger, Need, Phase, Reservation, Room
from ltx2_pool.words.shapes import Key


@dataclass(slots=True, eq=False)
class Waiting:
    """A job that waits, as the decision sees it."""

    number: int
    key: Key
    since: float
    """When its patience began, by the clock of `State.now`."""
    turn: int = 0
    """Its place among the users' jobs (:class:`Turns`)."""
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
    helpers: Pause | None = None
    """What all starts need does not start."""
    ahead: Sequence[Key] = ()
    """What to start before anybody asks, in that order."""
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
    why: str


@dataclass(frozen=True, slots=True)
class Wake:
    """Decide again at that time, if nothing has happened before."""

    at: float


Action = Start | Spawn | Evict | Refuse | Wake


class Turns:
    """Start-time fair queueing over users, each job of cost one (Goyal, Vin, Cheng: Start-time Fair Queuing, 1996).

    A job's turn is one after its user's last, or after the turn that was last served: whoever asks seldom is served
    beside whoever has fifty jobs waiting, and nobody gains by having been idle.
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


def decide(state: State) -> list[Action]:
    """What to do now. Every action of the list can be carried out, and they can be in this order."""
    return _Decision(state).run()


class _Decision:
    """One pass over the jobs; holds what is spent and claimed on the way."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._ledger = state.ledger
        self._rooms = state.ledger.rooms()
        self._processes = {r.key: r for r in state.ledger.reservations.values() if not r.ending}
        self._awaited: dict[Key, float] = {}
        """Since when somebody waits for the key."""
        for job in state.jobs:
            self._awaited[job.key] = min(job.since, self._awaited.get(job.key, job.since))
        self._wanted: set[Key] = set()
        """Keys of older jobs: their processes stay."""
        self._going: set[int] = set()
        """Processes evicted in this pass."""
        self._room_awaited = False
        """An older job waits for a place; younger ones must not take what becomes free."""
        self._wake: float | None = None
        self._actions: list[Action] = []

    def run(self) -> list[Action]:
        for job in self._state.jobs:
            if job.key not in self._wanted:
                process = self._processes.get(job.key)
                if process is None or process.id in self._going:
                    self._find_room(job)
                elif process.idle:
                    self._start(job, process)
                else:
                    self._wanted.add(job.key)
        if not self._room_awaited:
            self._start_ahead()
        if self._wake is not None:
            self._actions.append(Wake(self._wake))
        return self._actions

    def _start(self, job: Waiting, process: Reservation) -> None:
        """The job's process is idle: start, or claim what is missing."""
        self._wanted.add(job.key)
        phase = Phase.GENERATING if process.hot else Phase.SPAWNING
        need, own = self._ledger.need(job.key, phase), process.held.least
        rooms = [self._rooms[device] for device in process.devices]
        lease = process.hot
        if all(room.admits(need, own, lease=lease, alone=job.alone) for room in rooms):
            for room in rooms:
                room.take(need, own, lease=lease, alone=job.alone)
            self._actions.append(Start(job, process, phase))
            return
        for device in process.devices:
            self._make_room(job, device, need.least, process)
        for room in rooms:
            room.claim(need, own, lease=lease, alone=job.alone)

    def _find_room(self, job: Waiting) -> None:
        """No process serves the job's key: start one, make room for one, or claim it."""
        pause = self._pause(job.key)
        if pause is not None:
            if pause.refuse:
                self._actions.append(Refuse(job, pause.refuse))
                return
            self._wake_at(pause.until)
            return
        self._wanted.add(job.key)
        if self._room_awaited:
            return
        need = self._ledger.need(job.key, Phase.SPAWNING)
        device = self._place(job.key, need, job.alone)
        if device is not None:
            self._spawn(job.key, device, need, warm=False, why="a job waits")
            return
        options = []
        for number, device in enumerate(self._ledger.devices):
            victims = self._victims(job, device, need)
            if victims is not None:
                options.append((len(victims), self._rooms[device].active, number, device, victims))
        if not options:
            # Nothing that may go now is enough. If patience is all that is missing, the others may pass meanwhile.
            if self._state.now < (patient := self._patient_until(job)):
                self._wake_at(patient)
                return
            device = min(self._ledger.devices, key=lambda device: self._rooms[device].active)
            self._evict(self._candidates(job, device), device, job)  # they are needed, and more that work now
        else:
            _, _, _, device, victims = min(options)
            self._evict(victims, device, job)
        self._room_awaited = True
        self._rooms[device].claim(need, lease=False, alone=job.alone, row=True)

    def _make_room(self, job: Waiting, device: str, need: int, process: Reservation) -> None:
        """Where the job's idle process would lack memory even beside idle ones only, some of those must go."""
        room = self._rooms[device]
        stay = [r for r in self._on(device) if r is not process]
        idle = self._idle(stay)
        victims: list[Reservation] = []
        for victim in sorted((r for r in stay if r.idle and r.key not in self._wanted), key=self._precious):
            if room.budget is not None and idle + need <= room.budget:
                break
            idle -= self._idle([victim])
            victims.append(victim)
        self._evict(victims, device, job, "memory for a video of")

    def _place(self, key: Key, need: Need, alone: bool = False) -> str | None:
        """The device with the most room among those where a process of this key may start now."""
        best, most = None, -1
        for device, room in self._rooms.items():
            if room.admits(need, lease=False, alone=alone, row=True) and self._lasts(device, key, ()):
                left = room.budget - room.held if room.budget is not None else 0
                if left > most:
                    best, most = device, left
        return best

    def _lasts(self, device: str, key: Key, without: Sequence[Reservation]) -> bool:
        """Whether the key's process would not only start there, but could stay while the others take jobs."""
        room = self._rooms[device]
        others = [r.key for r in self._on(device) if r not in without]
        return room.budget is None or not others or self._ledger.steady([*others, key]) <= room.budget

    def _victims(self, job: Waiting, device: str, need: Need) -> list[Reservation] | None:
        """The idle processes that must go so that one of the job's key can start once the working ones are done.

        None: those that may go are not enough.
        """
        room = self._rooms[device]
        victims: list[Reservation] = []
        candidates = iter(self._candidates(job, device))
        while True:
            stays = [r for r in self._on(device) if r not in victims]
            places = room.places is None or room.places + room.ending_rows + len(victims) > room.claimed_rows
            idle = self._idle(stays)
            fits = not stays or (room.budget is not None and idle + room.claimed + need.least <= room.budget)
            if places and fits and self._lasts(device, job.key, victims):
                return victims
            victim = next(candidates, None)
            if victim is None:
                return None
            victims.append(victim)

    def _candidates(self, job: Waiting, device: str) -> list[Reservation]:
        """The idle processes that may go for the job, in the order in which they should."""
        idle = [r for r in self._on(device) if r.idle and r.key not in self._wanted]
        idle.sort(key=self._precious)
        if self._state.now < self._patient_until(job):
            return [r for r in idle if r.key not in self._awaited]
        return idle

    def _idle(self, processes: Sequence[Reservation]) -> int:
        """Bytes that they hold between two jobs."""
        return sum(self._ledger.need(r.key, Phase.IDLE).least for r in processes)

    def _patient_until(self, job: Waiting) -> float:
        """Until when the jobs of hot shapes may pass the first one that waits for the job's key."""
        return self._awaited[job.key] + self._state.patience

    def _precious(self, process: Reservation) -> tuple[bool, int]:
        """The least first."""
        return process.key in self._awaited, process.used

    def _on(self, device: str) -> list[Reservation]:
        """The processes that stay on a device."""
        return [r for r in self._processes.values() if device in r.devices and r.id not in self._going]

    def _evict(self, victims: Sequence[Reservation], device: str, job: Waiting, what: str = "a place for") -> None:
        for victim in victims:
            self._going.add(victim.id)
            for each in victim.devices:
                self._rooms[each].release(victim.held.least)
            self._actions.append(Evict(victim, f"{what} {job.key} on {device}"))

    def _spawn(self, key: Key, device: str, need: Need, *, warm: bool, why: str) -> None:
        room: Room = self._rooms[device]
        room.take(need, lease=False, row=True)
        self._actions.append(Spawn(key, (device,), warm, why))

    def _start_ahead(self) -> None:
        """While nobody waits for room, one of the keys to start ahead is started, on room that is free."""
        if self._wanted or any(r.phase in (Phase.LOADING, Phase.SPAWNING) for r in self._ledger.reservations.values()):
            return
        for key in self._state.ahead:
            if key in self._processes:
                continue
            if (pause := self._pause(key)) is not None:
                self._wake_at(pause.until)
            elif (device := self._place(key, need := self._ledger.need(key, Phase.SPAWNING))) is not None:
                self._spawn(key, device, need, warm=True, why="started ahead")
                return

    def _pause(self, key: Key) -> Pause | None:
        for pause in (self._state.helpers, self._state.pauses.get(key)):
            if pause is not None and pause.until > self._state.now:
                return pause
        return None

    def _wake_at(self, at: float) -> None:
        self._wake = at if self._wake is None else min(self._wake, at)
