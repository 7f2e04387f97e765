"""Which devices are in service: one that faults and faults is taken out, and tried again after a growing pause. Pure.

A fault says that a device is bad, or that a key or a job is; where it happens tells which. Faults in a row, with no
video in between, count against the device, unless the same key has faulted on another device as well: then it is the
key's. The last device in service is never taken out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from ltx2_pool.serving.actions import Pause
from ltx2_pool.serving.breaker import THRESHOLD, Pauses
from ltx2_pool.words.shapes import Key

_HOPELESS = 30.0
"""Seconds of a helpers' pause from which on jobs are refused in place of waiting for it."""


class Devices:
    """What counts against each device, and until when it is out of service."""

    def __init__(self, names: Sequence[str], pauses: Pauses) -> None:
        self._pauses = pauses
        self._faults: dict[str, list[Key]] = {name: [] for name in names}
        """In a row, by the key that met them."""
        self._outages: dict[str, int] = dict.fromkeys(names, 0)
        """In a row."""
        self._out: dict[str, Pause] = {}
        self._places: dict[Key, set[tuple[str, ...]]] = {}
        """Where a key has faulted since its last video."""
        self._taken_out: list[str] = []
        self.suspects: set[str] = set()
        """Devices on which something faulted; whoever looks at them takes them off."""
        self.helpless: frozenset[str] = frozenset()
        """Devices on which what all starts need does not start: they are in nobody's service either."""

    def shun(self, key: Key, devices: tuple[str, ...]) -> None:
        """What the key's start needed did not start there: elsewhere it may."""
        self._places.setdefault(key, set()).add(devices)

    def faulted(self, key: Key, devices: tuple[str, ...], now: float, what: str) -> None:
        """A process of the key faulted on these devices, or did not start there."""
        self.shun(key, devices)
        self.suspects.update(devices)
        if any(set(devices).isdisjoint(other) for other in self._places[key]):
            for name, keys in self._faults.items():
                self._faults[name] = [each for each in keys if each != key]
            return
        for name in devices:
            self._faults[name].append(key)
            if len(self._faults[name]) >= THRESHOLD:
                self.take_out(name, now, what)

    def take_out(self, name: str, now: float, why: str) -> None:
        """Out of service with it, if another one is in service; until a pause is over."""
        if name in self.out(now) or not self.in_service(now) - {name}:
            return
        pause = min(self._pauses.first * 2.0 ** min(self._outages[name], 32), self._pauses.longest)
        self._outages[name] += 1
        self._out[name] = Pause(now + pause, f"unavailable: {name} is out of service: {(why.splitlines() or [''])[0]}")
        self._faults[name] = self._faults[name][-(THRESHOLD - 1) :]  # the next fault takes it out again
        self._taken_out.append(name)

    def well(self, key: Key, devices: Sequence[str]) -> None:
        """A video of the key was made there."""
        self._places.pop(key, None)
        for name in devices:
            self._faults[name].clear()
            self._outages[name] = 0

    def in_service(self, now: float) -> set[str]:
        """Those on which something can be started."""
        return self._faults.keys() - self.out(now).keys() - self.helpless

    def out(self, now: float) -> dict[str, Pause]:
        """Those that are out of service."""
        return {name: pause for name, pause in self._out.items() if pause.until > now}

    @property
    def avoided(self) -> Mapping[Key, Collection[str]]:
        """Where each key had better not be started."""
        return {key: {name for place in places for name in place} for key, places in self._places.items()}

    def taken_out(self) -> list[tuple[str, str]]:
        """Those that were taken out since this was asked last, and why: what runs there has to end."""
        taken, self._taken_out = self._taken_out, []
        return [(name, self._out[name].refuse) for name in taken]


def helpers_out(devices: Sequence[str], pause: Callable[[str], float], now: float) -> dict[str, Pause]:
    """Devices on which what all starts need does not start, by `pause`: seconds until it is tried."""
    why = "unavailable: the zygote or the weights process does not start"
    return {name: Pause(now + left, why if left > _HOPELESS else "") for name in devices if (left := pause(name))}
