"""The ledger: who holds how much of which device, in which phase, and what each phase is known to take.

A process holds one reservation on each of its devices, from the decision to start it until nothing of it is left. What
it holds changes with its phase; a phase of which nobody knows what it takes is *unknown*, and runs alone there. The
right to generate on a device, a lease, is no thing of its own that could be lost: it is a reservation in the phase
GENERATING, and there are as many as `concurrency` says. Nothing here does I/O or reads a clock.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ltx2_pool.words.protocol import Memory
from ltx2_pool.words.shapes import Key

_RAISE = 1.25
"""What is known of a phase grows by at least this when memory ran out in it."""


class Phase(enum.Enum):
    """What a process is doing with its devices."""

    LOADING = "loading"
    """It starts before anybody knows what the weights leave of the device."""
    SPAWNING = "spawning"
    """It starts, or makes its first video, which compiles: alongside the others, without a lease."""
    IDLE = "idle"
    GENERATING = "generating"
    """It makes a video, and holds a lease on each of its devices."""
    ENCODING = "encoding"
    """It writes the file; the devices are the next job's."""

    __hash__ = object.__hash__  # Enum's own is written in Python, and the decision looks phases up all the time


ACTIVE = frozenset((Phase.LOADING, Phase.SPAWNING, Phase.GENERATING, Phase.ENCODING))
"""Phases beside which nothing may be that has to be alone."""


class Need(NamedTuple):
    """What a phase takes on each device."""

    least: int
    """Bytes, if `unknown` at least."""
    unknown: bool = False


UNKNOWN = Need(0, True)


@dataclass(slots=True, eq=False)
class Reservation:
    """One process, as the ledger and the decision see it."""

    id: int
    key: Key
    devices: tuple[str, ...]
    phase: Phase
    held: Need
    """On each device, but for those where it is `loading`."""
    loading: frozenset[str] = frozenset()
    """Devices of which, as it was started, nobody knew what the weights leave."""
    hot: bool = False
    """It has made a video: nothing is left to compile."""
    ending: bool = False
    """It was told to end, or has ended, and its devices are not free yet."""
    alone: bool = False
    """Its job must have the devices to itself."""
    used: int = 0
    """The higher, the more recently it was given a job."""

    def held_on(self, device: str) -> Need:
        """What it holds there."""
        return UNKNOWN if device in self.loading else self.held

    @property
    def idle(self) -> bool:
        """Whether it could take a job."""
        return self.phase is Phase.IDLE and not self.ending

    @property
    def starting(self) -> bool:
        """Whether it has not been ready yet: the next job of its key is its first."""
        return self.phase in (Phase.LOADING, Phase.SPAWNING) and not self.used


@dataclass(slots=True)
class Room:
    """What is left of one device. A decision spends its own copy: starts take, and jobs that wait claim."""

    budget: int | None
    """Bytes for all processes; None: not known yet."""
    leases: int
    """Free ones."""
    places: int | None
    """Processes that may still be started; None: the memory decides alone."""
    held: int = 0
    rows: int = 0
    active: int = 0
    exclusive: int = 0
    """Processes beside which nothing may be active: their phase is unknown, or their job has to be alone."""
    ending: int = 0
    """Bytes that processes on their way out still hold."""
    ending_rows: int = 0
    claimed: int = 0
    """Bytes for which older jobs wait."""
    claimed_active: int = 0
    claimed_alone: int = 0

    def admits(self, need: Need, own: int = 0, *, lease: bool, alone: bool = False, row: bool = False) -> bool:
        """Whether something may begin now that takes `need`, of which it holds `own` bytes already.

        `lease`: it needs one; `alone`: nothing else may be active; `row`: it is a new process.
        """
        if (lease and self.leases <= 0) or self.exclusive or self.claimed_alone:
            return False
        if row and self.places is not None and self.places <= 0:
            return False
        if (alone or need.unknown) and (self.active or self.claimed_active):
            return False
        if self.rows == (0 if row else 1) and not self.claimed_active:
            return True  # the only process there is: the one way to know whether it fits is to try
        if self.budget is None:
            return False
        held = self.held - own + need.least
        return held <= self.budget and held - self.ending + self.claimed <= self.budget

    def take(self, need: Need, own: int = 0, *, lease: bool, alone: bool = False, row: bool = False) -> None:
        """It begins."""
        self.held += need.least - own
        self.active += 1
        self.exclusive += need.unknown or alone
        self.leases -= lease
        if row:
            self.rows += 1
            if self.places is not None:
                self.places -= 1

    def claim(self, need: Need, own: int = 0, *, lease: bool, alone: bool = False) -> None:
        """It has to wait, and no younger job may take what it waits for."""
        self.claimed += max(0, need.least - own)
        self.claimed_active += 1
        self.claimed_alone += need.unknown or alone
        self.leases -= lease

    def release(self, held: int) -> None:
        """An idle process is told to end."""
        self.ending += held
        self.ending_rows += 1


@dataclass(slots=True)
class _Known:
    """What a key was seen to take, in bytes."""

    idle: int
    peak: int | None = None
    encoding: int | None = None
    raised: int = 0
    """What running out of memory says that the peak is at least; sinks again with every video that is made."""


_NOTHING = _Known(0)


class Ledger:
    """Reservations by device, process and phase, within what each device has for us."""

    def __init__(
        self, budgets: Mapping[str, int | None], *, concurrency: int = 1, max_processes: int | None = None
    ) -> None:
        """`budgets`: bytes of each device that processes may hold together, None where that is not known yet.

        `concurrency`: leases on each device. `max_processes`: at most so many processes on each device.
        """
        self._budgets = dict(budgets)
        self._concurrency = concurrency
        self._max_processes = max_processes
        self._known: dict[Key, _Known] = {}
        self._needs: dict[Phase, dict[Key, Need]] = {phase: {} for phase in Phase}
        """What follows from `_known`, as far as somebody has asked."""
        self._uses = 0
        self.reservations: dict[int, Reservation] = {}

    def budget(self, device: str) -> int | None:
        """Bytes that processes may hold there together; None where that is not known."""
        return self._budgets[device]

    @property
    def leases(self) -> int:
        """On all devices together."""
        return self._concurrency * len(self._budgets)

    @property
    def devices(self) -> tuple[str, ...]:
        """In the order in which they were given."""
        return tuple(self._budgets)

    def set_budget(self, device: str, free: int | None, reserve: int = 0) -> None:
        """The device has `free` bytes now, beside what our processes hold on it; None: nobody knows any more."""
        if free is None:
            self._budgets[device] = None
        else:
            entries = [r for r in self.reservations.values() if device in r.devices and not r.ending]
            held = sum(r.held_on(device).least for r in entries)
            self._budgets[device] = max(0, free + held - reserve)

    def reserve(self, number: int, key: Key, devices: tuple[str, ...]) -> Reservation:
        """A process will be started on these devices."""
        loading = frozenset(device for device in devices if self._budgets[device] is None)
        phase = Phase.LOADING if loading else Phase.SPAWNING
        entry = Reservation(number, key, devices, phase, self.need(key, Phase.SPAWNING), loading)
        self.reservations[number] = entry
        return entry

    def enter(self, entry: Reservation, phase: Phase, *, alone: bool = False) -> None:
        """The process is in another phase now; `alone`: with a job that must have the devices to itself."""
        entry.phase = phase
        entry.loading = frozenset()
        entry.alone = alone
        entry.held = self.need(entry.key, phase)
        if phase in ACTIVE:
            self._uses += 1
            entry.used = self._uses

    def release(self, entry: Reservation) -> None:
        """Nothing of the process is left. May be called again."""
        self.reservations.pop(entry.id, None)

    def rooms(self) -> dict[str, Room]:
        """What is left of each device, for a decision to spend."""
        rooms = {
            device: Room(budget, self._concurrency, self._max_processes) for device, budget in self._budgets.items()
        }
        for entry in self.reservations.values():
            active = entry.phase in ACTIVE
            for device in entry.devices:
                room, held = rooms[device], entry.held_on(device)
                room.rows += 1
                room.held += held.least
                room.active += active
                room.exclusive += held.unknown or entry.alone
                room.leases -= entry.phase is Phase.GENERATING
                if room.places is not None:
                    room.places -= 1
                if entry.ending:
                    room.ending += held.least
                    room.ending_rows += 1
        return rooms

    def need(self, key: Key, phase: Phase) -> Need:
        """What the phase takes.

        A shape that was never measured takes at most what a measured one of the same variant takes that is as large
        or larger: memory grows with pixels and frames.
        """
        if (need := self._needs[phase].get(key)) is None:
            need = self._needs[phase][key] = self._need(key, phase)
        return need

    def _need(self, key: Key, phase: Phase) -> Need:
        known = self._known.get(key) or _NOTHING
        if phase is Phase.IDLE:
            return Need(known.idle)
        if phase is Phase.ENCODING and known.encoding is not None:
            return Need(known.encoding)
        peak = known.peak if known.peak is not None else self._bound(key)
        if peak is None or (known.peak is None and known.raised > peak):
            return Need(known.raised, True)
        return Need(max(peak, known.raised))

    def _bound(self, key: Key) -> int | None:
        return min(
            (
                max(known.peak, known.raised)
                for other, known in self._known.items()
                if known.peak is not None and other.variant == key.variant and other.shape.voxels >= key.shape.voxels
            ),
            default=None,
        )

    def still(self, device: str) -> bool:
        """Whether what the processes on a device hold is known, and does not change."""
        return not any(r.phase in ACTIVE or r.ending for r in self.reservations.values() if device in r.devices)

    def alone(self, entry: Reservation) -> bool:
        """Whether nobody else holds anything on its devices."""
        return not any(
            other is not entry and not set(entry.devices).isdisjoint(other.devices)
            for other in self.reservations.values()
        )

    def observe(self, key: Key, memory: Memory, *, made: bool = True) -> None:
        """A process of this key said what it held: in its last phase at most, and now.

        `made`: a video was made; the peak of an attempt says too little.
        """
        known = self._known.setdefault(key, _Known(0))
        before = (known.idle, known.peak, known.encoding, known.raised)
        known.idle = memory.resident + memory.weights
        if made and memory.generated:
            peak = max(memory.peak, memory.resident) + memory.weights
            known.peak = max(peak, known.peak or 0)
            known.encoding = None if memory.encoding is None else memory.encoding + memory.weights
            # Half the way back at each video: a neighbour's memory may have been the reason.
            known.raised = known.peak + (known.raised - known.peak) // 2 if known.raised > known.peak else 0
        if (known.idle, known.peak, known.encoding, known.raised) != before:
            self._forget_needs()

    def ran_out(self, entry: Reservation) -> None:
        """Memory ran out in the process's phase: it takes more than it was thought to, and than there was."""
        known = self._known.setdefault(entry.key, _Known(0))
        held = max(entry.held_on(device).least for device in entry.devices)
        known.raised = int(max(known.peak or 0, known.raised, held) * _RAISE)
        for device in entry.devices:
            others = [
                r.held_on(device).least for r in self.reservations.values() if r is not entry and device in r.devices
            ]
            if others and (budget := self._budgets[device]) is not None:
                known.raised = max(known.raised, budget - sum(others) + 1)
        budgets = [self._budgets[device] or 0 for device in entry.devices]
        if all(budgets):
            known.raised = min(known.raised, *budgets)  # more than all there is says nothing
        self._forget_needs()

    def _forget_needs(self) -> None:
        """They may be others now, also those of keys that were never measured."""
        for needs in self._needs.values():
            needs.clear()

    def describe(self) -> dict[str, Any]:
        """For people; bytes."""
        rooms = self.rooms()
        return {
            "max_size": self._max_processes if self._max_processes is not None else "auto",
            "devices": {
                device: {
                    "budget": room.budget,
                    "held": room.held,
                    "exclusive": room.exclusive,
                    "leases": self._concurrency - room.leases,
                    "processes": room.rows,
                }
                for device, room in rooms.items()
            },
            "known": {
                str(key): {"idle": known.idle, "peak": known.peak, "raised": known.raised or None}
                for key, known in self._known.items()
            },
        }

    def steady(self, keys: Iterable[Key]) -> int:
        """Bytes of processes of these keys side by side, while the most demanding one generates; unknown is 0."""
        idle = above = 0
        for key in keys:
            resident = self.need(key, Phase.IDLE).least
            idle += resident
            above = max(above, self.need(key, Phase.GENERATING).least - resident)
        return idle + above
