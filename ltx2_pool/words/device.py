"""Devices: what there is to run on, what it is called, and how much of it is free. Nothing here starts CUDA."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Device:
    """One GPU, one MIG instance of one, or the CPU."""

    id: str
    """``cpu``, or the UUID that the driver gives it (``GPU-...``, ``MIG-...``): the same whatever order tools count in."""
    name: str
    capability: str
    """CUDA compute capability, for instance ``9.0``; the architecture of a CPU."""
    total: int = 0
    """Bytes of its memory; 0 for the CPU."""

    @property
    def is_gpu(self) -> bool:
        return self.id != "cpu"

    def free(self) -> int:
        """Bytes that are free now, for everybody: of the device, of main memory for the CPU."""
        return main_memory()


def visible() -> tuple[Device, ...]:
    """The devices that a process started here would see, in CUDA's order; the CPU alone without a GPU."""
    return (Device("cpu", "cpu", platform.machine()),)


def main_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of main memory that processes can still have: what is free, or less where a control group says so."""
    available = psutil.virtual_memory().available
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - used))
