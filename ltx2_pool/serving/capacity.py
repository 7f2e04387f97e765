"""How many shape processes fit: a number that an operator gave, or what the memory allows."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import psutil

from ltx2_pool.words.protocol import Lending, Memory
from ltx2_pool.words.shapes import Shape

logger = logging.getLogger(__name__)


class Capacity(Protocol):
    """Decides which sets of shapes may have a process at the same time."""

    def fits(self, shapes: Collection[Shape]) -> bool:
        """Whether these shapes may all have one. A single one always may: only trying tells."""
        ...

    def lent(self, lending: Lending) -> None:
        """The weights process is there and takes its share."""
        ...

    def observe(self, shape: Shape, memory: Memory) -> None:
        """A process of this shape said what it needs."""
        ...

    def describe(self) -> dict[str, Any]:
        """For people: the limit and what it is made of."""
        ...


class FixedCapacity:
    """At most K processes, whatever they need."""

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size

    def fits(self, shapes: Collection[Shape]) -> bool:
        """As :meth:`Capacity.fits`."""
        return len(shapes) <= self._max_size

    def lent(self, lending: Lending) -> None:
        """The number stands."""

    def observe(self, shape: Shape, memory: Memory) -> None:
        """The number stands."""

    def describe(self) -> dict[str, Any]:
        """As :meth:`Capacity.describe`."""
        return {"max_size": self._max_size}


class MemoryCapacity:
    """As many as fit the device less a reserve.

    An idle process needs its resident memory. On top of that, as many as may generate at once, and one that warms up,
    reach their peaks: the largest ones are assumed. A shape that was never measured is expected to need what a measured
    one does, more in proportion when it has more pixels; before anything is measured only one process starts.
    """

    def __init__(self, reserve: int, busy: int = 1, known: Mapping[Shape, Memory] | None = None) -> None:
        self._reserve = reserve
        self._at_peak = busy + 1
        self._known = dict(known or {})
        self._total = main_memory()
        self._lent = 0

    def lent(self, lending: Lending) -> None:
        """As :meth:`Capacity.lent`."""
        self._total = lending.device_total or self._total
        self._lent = lending.bytes + lending.overhead

    def observe(self, shape: Shape, memory: Memory) -> None:
        """As :meth:`Capacity.observe`. The highest peak counts, and the last resident size."""
        before = self._known.get(shape)
        peak = max(memory.peak, memory.resident, before.peak if before is not None else 0)
        self._known[shape] = memory.model_copy(update={"peak": peak})

    def expected(self, shape: Shape) -> Memory | None:
        """What a process of this shape needs: measured, or guessed from others; None when nothing is known."""
        if (known := self._known.get(shape)) is not None or not self._known:
            return known
        guesses = [(memory, max(1.0, _voxels(shape) / _voxels(other))) for other, memory in self._known.items()]
        return Memory(
            resident=max(int(memory.resident * factor) for memory, factor in guesses),
            peak=max(int(memory.peak * factor) for memory, factor in guesses),
            weights=max(memory.weights for memory, _ in guesses),
        )

    def needed(self, shapes: Collection[Shape]) -> int | None:
        """Bytes for all of these at once; None when nothing is known."""
        expected = [self.expected(shape) for shape in shapes]
        known = [memory for memory in expected if memory is not None]
        if len(known) < len(expected):
            return None
        above = sorted((max(0, memory.peak - memory.resident) for memory in known), reverse=True)
        return sum(memory.resident + memory.weights for memory in known) + sum(above[: self._at_peak])

    @property
    def budget(self) -> int:
        """Bytes that all shape processes may need together."""
        return self._total - self._lent - self._reserve

    def fits(self, shapes: Collection[Shape]) -> bool:
        """As :meth:`Capacity.fits`."""
        if len(shapes) <= 1:
            return True
        needed = self.needed(shapes)
        return needed is not None and needed <= self.budget

    def describe(self) -> dict[str, Any]:
        """As :meth:`Capacity.describe`; bytes."""
        return {
            "max_size": "auto",
            "memory": {
                "total": self._total,
                "weights": self._lent,
                "reserve": self._reserve,
                "budget": self.budget,
                "shapes": {s.key: m.model_dump(include={"resident", "peak"}) for s, m in self._known.items()},
            },
        }


def _voxels(shape: Shape) -> int:
    return shape.width * shape.height * shape.num_frames


def main_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of main memory that processes can still have: what is free, or less where a control group says so."""
    available = psutil.virtual_memory().available
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - used))
