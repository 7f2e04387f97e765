"""What an exit status, the kernel's counters and a child's own words say about why a process ended."""

from __future__ import annotations

import contextlib
import re
import signal
from pathlib import Path

_CRASHES = frozenset((signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSYS))
"""Signals that a process earns itself; the others come from outside."""

_MACHINES_FAULT = re.compile(
    r"\[Errno (1|12|13|23|24|28|30|122)\]|No space left on device|Permission denied|Operation not permitted"
    r"|Read-only file system|Disk quota exceeded|Too many open files|Cannot allocate memory"
    r"|InvalidCxxCompiler|No working C\+\+ compiler|Failed to find C compiler|CppCompileError.*not found",
    re.IGNORECASE,
)
"""Errors of a compiler that say nothing about the cache: EPERM, ENOMEM, EACCES, ENFILE, EMFILE, ENOSPC, EROFS, EDQUOT,
and no compiler at all."""


def is_machines_fault(error: str) -> bool:
    """Whether a failed compilation is this machine's fault rather than that of damaged cache files."""
    return _MACHINES_FAULT.search(error) is not None


def came_from_outside(status: int) -> bool:
    """Whether that exit status is a signal that somebody else sent."""
    return status < 0 and -status not in _CRASHES


def describe(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def oom_kills(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """How often the kernel has killed for want of memory, in this control group and on this machine.

    Only its growth says something (Linux admin-guide/cgroup-v2.rst: memory.events; mm/vmstat.c: oom_kill).
    """
    total = _counter(proc / "vmstat")
    with contextlib.suppress(OSError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                total += _counter(cgroups / line.removeprefix("0::").lstrip("/") / "memory.events")
    return total


def _counter(file: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in file.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
