"""The decision: which job starts, which process is started, which is evicted. Pure; :mod:`pool` carries it out.

Jobs are looked at in their order. One whose key has an idle process starts, if a lease and the memory are there. One
whose key has no process gets one where there is room, or room is made: the idle processes go that save the fleet least
here, of equals the least recently used; those that somebody waits for only when the job's patience is over. What a job
has to wait for it *claims*, and no younger job may take it. A process that works is never evicted, and a start needs no
lease, so hot shapes flow on beside it.

A key whose processes cannot take a job that waits gets another, a *copy*, on a device that has a lease to spare and no
process of the key: at once where there is room; in the place of idle processes that nobody waits for, copies before a
key's last one, when the job's patience is over.

A gang needs all of its devices at once. It takes or claims them together, and holds none while it waits: nothing is
locked, and it is passed on none of the devices that it waits for. Those are the ones that fewest work on. While they
are claimed that number only falls, so the choice settles: at the latest when what works on them is done.

So a job waits for what runs, for the jobs before it, for its own start, and for those that pass it while it is patient.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ltx2_pool.serving.actions import Action, Evict, Pause, Refuse, Spawn, Start, State, Waiting, Wake
from ltx2_pool.serving.ledger import Need, Phase, Reservation
from ltx2_pool.words.shapes import Key


def decide(state: State) -> list[Action]:
    """What to do now. Every action of the list can be carried out, and they can be in this order."""
    return _Decision(state).run()


class _Decision:
    """One pass over the jobs; holds what is spent and claimed on the way."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._ledger = state.ledger
        self._rooms = state.ledger.rooms()
        self._processes: dict[Key, list[Reservation]] = {}
        for process in state.ledger.reservations.values():
            if not process.ending:
                self._processes.setdefault(process.key, []).append(process)
        self._awaited: dict[Key, float] = {}
        """Since when somebody waits for the key."""
        for job in state.jobs:
            self._awaited[job.key] = min(job.since, self._awaited.get(job.key, job.since))
        self._open = [d for d in self._ledger.devices if d not in state.out or state.out[d].until <= state.now]
        """Devices on which something can be started."""
        self._taken: set[int] = set()
        """Processes that an older job starts in, or waits for: they stay."""
        self._going: set[int] = set()
        """Processes evicted in this pass."""
        self._spawned: dict[Key, set[str]] = {}
        """Devices on which a key's processes are started in this pass."""
        self._claimed: set[str] = set()
        """Devices where an older job waits for a place; younger ones must not take what becomes free."""
        self._somebody_waits = False
        self._wake: float | None = None
        self._actions: list[Action] = []

    def run(self) -> list[Action]:
        done: set[Key] = set()
        for job in self._state.jobs:
            if job.key not in done and not self._look_at(job):
                done.add(job.key)
        if not self._somebody_waits:
            self._start_ahead()
        for device in self._ledger.devices:
            if device not in self._open:  # it may be wanted then, and is no longer said to be out
                self._wake_at(self._state.out[device].until)
        if self._wake is not None:
            self._actions.append(Wake(self._wake))
        return self._actions

    def _look_at(self, job: Waiting) -> bool:
        """Do what can be done for the job now. Whether there may be something for a younger one of its key."""
        processes = self._of(job.key)
        if not processes and job.key not in self._spawned:
            return self._find_room(job)
        self._somebody_waits = True
        free = [r for r in processes if r.id not in self._taken]
        idle = [r for r in free if r.idle]
        if idle and self._start(job, idle):
            return True
        starting = next((r for r in free if r.starting), None)
        if starting is not None:
            self._taken.add(starting.id)
            return True
        return self._copy(job, processes) or bool(idle)

    def _start(self, job: Waiting, idle: list[Reservation]) -> bool:
        """The job's key has idle processes: start in one, or claim what is missing for that."""
        idle.sort(key=lambda r: (not r.hot, self._load(r.devices), r.id))
        need = self._ledger.need(job.key, Phase.GENERATING)
        for process in idle:
            own, lease = process.held.least, process.hot
            rooms = [self._rooms[device] for device in process.devices]
            if all(room.admits(need, own, lease=lease, alone=job.alone) for room in rooms):
                for room in rooms:
                    room.take(need, own, lease=lease, alone=job.alone)
                self._taken.add(process.id)
                self._actions.append(Start(job, process, Phase.GENERATING if process.hot else Phase.SPAWNING))
                return True
        process = idle[0]
        self._taken.add(process.id)
        for device in process.devices:
            self._make_room(job, device, need.least, process)
        for device in process.devices:
            self._rooms[device].claim(need, process.held.least, lease=process.hot, alone=job.alone)
        return False

    def _find_room(self, job: Waiting) -> bool:
        """No process serves the job's key: start one, make room for one, or claim it."""
        key, now = job.key, self._state.now
        count = self._count(key)
        pause = self._pause(key)
        if pause is not None:
            if pause.refuse:
                self._actions.append(Refuse(job, pause))
                return True
            self._wake_at(pause.until)
            return False
        self._somebody_waits = True
        devices = [device for device in self._usable(key) if device not in self._claimed]
        if len(devices) < count:
            return False
        if place := self._place(key, devices, job.alone):
            self._spawn(key, place, warm=False, why="a job waits")
            return True
        need = self._ledger.need(key, Phase.SPAWNING)
        options = {}
        for device in devices:
            victims = self._victims(job, device, need, self._candidates(job, device))
            if victims is not None:
                options[device] = victims
        if len(options) >= count:
            place = tuple(sorted(options, key=lambda d: (*self._cost(options[d]), self._load([d])))[:count])
        elif now < (patient := self._patient_until(job)):
            # Nothing that may go now is enough. If patience is all that is missing, the others may pass meanwhile.
            self._wake_at(patient)
            return False
        else:  # what may go there goes: it is needed, and more that works now
            place = tuple(sorted(devices, key=lambda d: self._load([d]))[:count])
            options = {device: self._candidates(job, device) for device in place}
        for device in place:
            self._evict(options[device], device, job)
        for device in place:
            self._rooms[device].claim(need, lease=False, alone=job.alone)
        self._claimed.update(place)
        return False

    def _copy(self, job: Waiting, processes: Sequence[Reservation]) -> bool:
        """None of the key's processes can take the job: start another, once one of them has shown that it works."""
        there = {device for r in self._processes.get(job.key, ()) for device in r.devices}
        there |= self._spawned.get(job.key, set())
        devices = [
            device
            for device in self._usable(job.key)
            if device not in there and device not in self._claimed and self._rooms[device].leases > 0
        ]
        if len(devices) < self._count(job.key) or not any(r.hot for r in processes):
            return False
        if (pause := self._pause(job.key)) is not None:
            self._wake_at(pause.until)
            return False
        if place := self._place(job.key, devices):
            self._spawn(job.key, place, warm=False, why="more jobs wait than its processes can take")
            return True
        if self._state.now < (patient := self._patient_until(job)):
            self._wake_at(patient)
            return False
        need = self._ledger.need(job.key, Phase.SPAWNING)
        options = {}
        for device in devices:
            unawaited = [r for r in self._candidates(job, device) if r.key not in self._awaited]
            if (victims := self._victims(job, device, need, unawaited)) is not None:
                options[device] = victims
        if len(options) >= self._count(job.key):
            for device in sorted(options, key=lambda d: (*self._cost(options[d]), self._load([d])))[
                : self._count(job.key)
            ]:
                self._evict(options[device], device, job, "a copy of")
        return False

    def _make_room(self, job: Waiting, device: str, need: int, process: Reservation) -> None:
        """Where the job's idle process would lack memory even beside idle ones only, some of those must go."""
        room = self._rooms[device]
        stay = [r for r in self._on(device) if r is not process]
        idle = self._idle(stay)
        victims: list[Reservation] = []
        for victim in sorted((r for r in stay if r.idle and r.id not in self._taken), key=self._precious):
            if room.budget is not None and idle + need <= room.budget:
                break
            idle -= self._idle([victim])
            victims.append(victim)
        self._evict(victims, device, job, "memory for a video of")

    def _place(self, key: Key, devices: Sequence[str], alone: bool = False) -> tuple[str, ...]:
        """The devices, of these, on which a process of this key is best started now; empty when there are too few."""
        fit = [device for device in devices if self._fits(key, device, alone)]
        best = sorted(fit, key=self._crowd)[: self._count(key)]
        return tuple(device for device in fit if device in best) if len(best) == self._count(key) else ()

    def _fits(self, key: Key, device: str, alone: bool) -> bool:
        need = self._ledger.need(key, Phase.SPAWNING)
        fits = self._rooms[device].admits(need, lease=False, alone=alone, row=True)
        return fits and self._lasts(device, key, ())

    def _crowd(self, device: str) -> tuple[bool, int, int]:
        """How unwelcome one more process is on a device."""
        room = self._rooms[device]
        return room.leases <= 0, room.rows, room.held - (room.budget or 0)

    def _load(self, devices: Collection[str]) -> int:
        """How much works on devices, or is to work there before."""
        return sum(self._rooms[device].active + self._rooms[device].claimed_active for device in devices)

    def _lasts(self, device: str, key: Key, without: Sequence[Reservation]) -> bool:
        """Whether the key's process would not only start there, but could stay while the others take jobs."""
        room = self._rooms[device]
        others = [r.key for r in self._on(device) if r not in without]
        return room.budget is None or not others or self._ledger.steady([*others, key]) <= room.budget

    def _victims(
        self, job: Waiting, device: str, need: Need, candidates: Sequence[Reservation]
    ) -> list[Reservation] | None:
        """The first of these idle processes, as many as must go so that one of the job's key can start once the working
        ones are done. None: all are not enough.
        """
        room = self._rooms[device]
        victims: list[Reservation] = []
        left = iter(candidates)
        while True:
            stays = [r for r in self._on(device) if r not in victims]
            places = room.places is None or room.places + room.ending_rows + len(victims) > 0
            idle = self._idle(stays)
            fits = not stays or (room.budget is not None and idle + room.claimed + need.least <= room.budget)
            if places and fits and self._lasts(device, job.key, victims):
                return victims
            victim = next(left, None)
            if victim is None:
                return None
            victims.append(victim)

    def _candidates(self, job: Waiting, device: str) -> list[Reservation]:
        """The idle processes that may go for the job, in the order in which they should."""
        idle = [r for r in self._on(device) if r.idle and r.id not in self._taken]
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

    def _precious(self, process: Reservation) -> tuple[bool, bool, float, int]:
        """The least first."""
        worth = self._state.worth(process.key) if self._state.worth is not None else 0.0
        return process.key in self._awaited, self._last(process), worth, process.used

    def _last(self, process: Reservation) -> bool:
        """Whether its key has no other."""
        return len(self._of(process.key)) == 1

    def _cost(self, victims: Sequence[Reservation]) -> tuple[int, int]:
        """What is lost with them."""
        return sum(map(self._last, victims)), len(victims)

    def _of(self, key: Key) -> list[Reservation]:
        """The key's processes that stay."""
        return [r for r in self._processes.get(key, ()) if r.id not in self._going]

    def _on(self, device: str) -> list[Reservation]:
        """The processes that stay on a device."""
        return [r for each in self._processes.values() for r in each if device in r.devices and r.id not in self._going]

    def _count(self, key: Key) -> int:
        """Of the devices that a process of the key needs."""
        return self._state.gpus.get(key, 1)

    def _usable(self, key: Key) -> list[str]:
        """Where a process of the key may be started: not where it fared badly, if it need not."""
        avoid = self._state.avoid.get(key, ())
        better = [device for device in self._open if device not in avoid]
        return better if len(better) >= self._count(key) else self._open

    def _evict(self, victims: Sequence[Reservation], device: str, job: Waiting, what: str = "a place for") -> None:
        for victim in victims:
            if victim.id not in self._going:  # a gang may be in the way on several devices
                self._going.add(victim.id)
                for each in victim.devices:
                    self._rooms[each].release(victim.held.least)
                self._actions.append(Evict(victim, f"{what} {job.key} on {device}"))

    def _spawn(self, key: Key, devices: tuple[str, ...], *, warm: bool, why: str) -> None:
        for device in devices:
            self._rooms[device].take(self._ledger.need(key, Phase.SPAWNING), lease=False, row=True)
        self._spawned.setdefault(key, set()).update(devices)
        self._actions.append(Spawn(key, devices, warm, why))

    def _start_ahead(self) -> None:
        """While nobody waits, keys to start ahead are started on room that is free, one on a device at a time."""
        quiet = set(self._ledger.devices)
        for process in self._ledger.reservations.values():
            if process.phase in (Phase.LOADING, Phase.SPAWNING):
                quiet.difference_update(process.devices)
        ahead = self._state.ahead
        if (worth := self._state.worth) is not None:
            ahead = sorted(ahead, key=lambda key: -worth(key))
        for key in ahead[: self._state.most_ahead]:
            if not quiet:
                return
            if self._of(key):
                continue
            if (pause := self._pause(key)) is not None:
                self._wake_at(pause.until)
                continue
            if place := self._place(key, [device for device in self._usable(key) if device in quiet]):
                self._spawn(key, place, warm=True, why="started ahead")
                quiet.difference_update(place)
            elif (count := self._count(key)) > 1:  # its devices are not quiet at once unless younger keys leave them
                could = [device for device in self._usable(key) if self._could(key, device)]
                if len(could) >= count:
                    quiet.difference_update(sorted(could, key=self._crowd)[:count])

    def _could(self, key: Key, device: str) -> bool:
        """Whether a process of the key would have room there once what starts there has started."""
        places = self._rooms[device].places
        return (places is None or places > 0) and self._lasts(device, key, ())

    def _pause(self, key: Key) -> Pause | None:
        """Why no process of the key can be started now."""
        missing = self._count(key) - len(self._open)
        if missing > 0:
            back = sorted(
                (self._state.out[d] for d in self._ledger.devices if d not in self._open), key=lambda p: p.until
            )
            if missing > len(back):
                devices = f"{self._count(key)} devices, and this worker has {len(self._ledger.devices)}"
                return Pause(float("inf"), f"unavailable: it needs {devices}")
            patient = [pause for pause in back if not pause.refuse]  # of those, jobs wait for the end
            return (patient if len(patient) >= missing else back)[missing - 1]
        pause = self._state.pauses.get(key)
        return pause if pause is not None and pause.until > self._state.now else None

    def _wake_at(self, at: float) -> None:
        self._wake = at if self._wake is None else min(self._wake, at)
