"""The faults of a chaos run: of processes, and of the machine as the worker meets it. Each begins, lasts, and ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from ltx2_pool.processes.zygote import ZygoteSpawner
from ltx2_pool.serving import files
from ltx2_pool.serving.pool import Pool

_T = TypeVar("_T")
STEP = 0.002
"""Seconds between two looks at the pool."""


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong for `seconds`, or once."""

    name: str
    begin: Callable[[Target], contextlib.AbstractContextManager[bool]]
    """Entered while it lasts; yields whether there was anything to harm."""
    share: int
    """How often it is chosen, relative to the others."""
    seconds: float = 0.0
    of_files: bool = False
    """Jobs that it meets may end in an error of their file, which is then true."""


@dataclass
class Target:
    """What is harmed."""

    pool: Pool
    run_dir: Path
    videos: Path
    """Where the pool keeps videos, below `run_dir`."""
    pick: Callable[[], float]
    struck: set[int] = field(default_factory=set)
    """Processes that were harmed: of a gang, all."""
    spared: dict[str, int] = field(default_factory=dict)
    """Jobs that the last fault must not harm, by the processes that make them: others."""

    def strike(self, number: int, *states: str, ranks: bool = False) -> bool:
        """Send that signal to a shape process in one of these states, in any without: to one that makes videos alone,
        or to any rank of a gang. Whether there was one.
        """
        processes = [p for p in self.pool.status()["processes"] if not states or p["state"] in states]
        pids = [pid for p in processes for pid in p["pids"] if pid and (len(p["pids"]) > 1) is ranks]
        if not pids:
            return False
        pid = self.one(pids)
        self._spare(lambda process: pid not in process["pids"])
        return _signal(pid, number)

    def strike_helper(self, kind: str) -> str | None:
        """Kill a helper of that kind, and return its name; None: there was none."""
        helpers = self.pool.status()["helpers"]
        names = [name for name, pid in helpers.items() if pid and name.startswith(kind)]
        if not names:
            return None
        name = self.one(names)
        device = name.removeprefix("weights ")  # one device: all borrow
        self._spare(lambda process: not (name == "weights" or device in process["devices"]))
        return name if _signal(helpers[name], signal.SIGKILL) else None

    def one(self, things: Sequence[_T]) -> _T:
        """One of these, at random."""
        return things[int(self.pick() * len(things))]

    def _spare(self, whether: Callable[[dict[str, Any]], bool]) -> None:
        self.spared.clear()
        for process in self.pool.status()["processes"]:
            if not whether(process):
                self.struck.update(process["pids"])
            elif process["job"] and self.struck.isdisjoint(process["pids"]):
                self.spared[process["job"]] = process["pid"]


def _signal(pid: int, number: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


@contextlib.contextmanager
def kill_a_process(target: Target) -> Iterator[bool]:
    yield target.strike(signal.SIGKILL)


@contextlib.contextmanager
def kill_while_encoding(target: Target) -> Iterator[bool]:
    yield target.strike(signal.SIGKILL, "encoding")


@contextlib.contextmanager
def stop_a_process(target: Target) -> Iterator[bool]:
    """It is not continued: whoever waits for it has to notice."""
    yield target.strike(signal.SIGSTOP)


@contextlib.contextmanager
def kill_a_rank(target: Target) -> Iterator[bool]:
    yield target.strike(signal.SIGKILL, ranks=True)


@contextlib.contextmanager
def kill_a_rank_while_encoding(target: Target) -> Iterator[bool]:
    """One that has nothing to do then, or rank 0."""
    yield target.strike(signal.SIGKILL, "encoding", ranks=True)


@contextlib.contextmanager
def kill_a_rank_as_it_starts(target: Target) -> Iterator[bool]:
    yield target.strike(signal.SIGKILL, "loading", "spawning", ranks=True)


@contextlib.contextmanager
def stop_a_rank(target: Target) -> Iterator[bool]:
    yield target.strike(signal.SIGSTOP, ranks=True)


def kill_a_helper(kind: str) -> Callable[[Target], contextlib.AbstractContextManager[bool]]:
    """Of that kind."""
    return lambda target: contextlib.nullcontext(target.strike_helper(kind) is not None)


@contextlib.contextmanager
def no_descriptors(target: Target) -> Iterator[bool]:
    """EMFILE for everything that needs another descriptor, for real."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield True
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def no_processes(target: Target) -> Iterator[bool]:
    """EAGAIN for every start. Injected: root has no limit of processes."""

    def refuse(*_: Any, **__: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    async def refuse_a_fork(*_: Any, **__: Any) -> None:
        refuse()

    with mock.patch.object(subprocess, "Popen", refuse), mock.patch.object(ZygoteSpawner, "launch", refuse_a_fork):
        yield True


@contextlib.contextmanager
def no_space(target: Target) -> Iterator[bool]:
    """ENOSPC for every new file. Injected: to fill a disk would harm others."""

    def refuse(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with mock.patch.object(files, "make_empty", refuse):
        yield True


@contextlib.contextmanager
def directory_gone(target: Target) -> Iterator[bool]:
    shutil.rmtree(target.videos, ignore_errors=True)
    yield True


@contextlib.contextmanager
def file_in_its_place(target: Target) -> Iterator[bool]:
    shutil.rmtree(target.videos, ignore_errors=True)
    target.videos.touch()
    try:
        yield True
    finally:
        target.videos.unlink()


@contextlib.contextmanager
def directory_read_only(target: Target) -> Iterator[bool]:
    """Binds everybody but root."""
    if not target.videos.is_dir():
        yield False
        return
    target.videos.chmod(0o500)
    try:
        yield True
    finally:
        with contextlib.suppress(FileNotFoundError):
            target.videos.chmod(0o700)


@contextlib.contextmanager
def weights_do_not_start(target: Target) -> Iterator[bool]:
    """The weights process of a device dies, and its successors do not come up."""
    name = target.strike_helper("weights")
    if name is None:
        yield False
        return
    os.environ["LTX2_IMAGINARY"] = f"{name.replace(' ', ' on ')}=eof"
    try:
        yield True
    finally:
        del os.environ["LTX2_IMAGINARY"]


OF_PROCESSES = (
    Fault("a shape process is killed", kill_a_process, 20),
    Fault("one is killed while it encodes", kill_while_encoding, 4),
    Fault("a weights process is killed", kill_a_helper("weights"), 2),
    Fault("the zygote is killed", kill_a_helper("zygote"), 2),
    Fault("the guard is killed", kill_a_helper("guard"), 1),
    Fault("a shape process is stopped", stop_a_process, 2),
)
OF_GANGS = (
    Fault("a rank of a gang is killed", kill_a_rank, 12),
    Fault("a rank is killed while the gang starts", kill_a_rank_as_it_starts, 6),
    Fault("a rank is killed while the gang encodes", kill_a_rank_while_encoding, 4),
    Fault("a rank of a gang is stopped", stop_a_rank, 2),
)
OF_THE_MACHINE = (
    Fault("no descriptors (EMFILE)", no_descriptors, 3, 0.2, of_files=True),
    Fault("no processes (EAGAIN)", no_processes, 3, 0.2),
    Fault("no space (ENOSPC)", no_space, 3, 0.05, of_files=True),
    Fault("the run directory vanishes", directory_gone, 3, of_files=True),
    Fault("a file is in its place", file_in_its_place, 2, 0.05, of_files=True),
    Fault("the run directory is read-only", directory_read_only, 2, 0.05, of_files=True),
)
OF_HELPERS = (Fault("the weights do not start", weights_do_not_start, 1, 1.0),)


async def inflict(fault: Fault, target: Target) -> bool:
    """Let the fault begin, last and end; returns whether it harmed anything."""
    with fault.begin(target) as harmed:
        await asyncio.sleep(fault.seconds)
    return harmed
