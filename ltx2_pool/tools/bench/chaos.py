"""``benchmark.py chaos``: many jobs through the real pool while processes are killed at random, and a ledger.

Every admitted job must end exactly once, in the right video or in a typed error, and nothing may be left behind: no
file descriptor, no process, no thread, no task, no video.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ltx2_pool.processes.host import ProcessHost
from ltx2_pool.processes.process import JobFailed, ProcessLost
from ltx2_pool.serving.breaker import Breaker
from ltx2_pool.serving.capacity import FixedCapacity
from ltx2_pool.serving.pool import Limits, Rejected, SubprocessPool, Video
from ltx2_pool.words.requests import Job, warm_up
from ltx2_pool.words.shapes import Menu, Shape

_IN_FLIGHT = 12
_HELPER_SHARE = 0.1
"""Of the kills that hit the zygote or the weights process, where there are any."""

Check = Callable[[Shape, bytes], bool]
"""Whether these bytes are the right video of the shape."""


@dataclass
class Ledger:
    """What became of every job."""

    admitted: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    """Videos with other bytes than they must have."""
    leaks: list[str] = field(default_factory=list)
    rss_mb: tuple[float, float] = (0, 0)
    """Of this process, after a tenth of the jobs and at the end."""
    seconds: float = 0

    @property
    def lost(self) -> int:
        """Jobs that never ended, or that ended in an error that is not one of the pool's own."""
        return self.admitted - self.ended.total() + sum(n for how, n in self.ended.items() if how.startswith("bug"))

    @property
    def ok(self) -> bool:
        return not (self.lost or self.wrong or self.leaks)


class Chaos:
    """One run over one pool; the seed decides which job meets which kill after what delay, not the timing."""

    def __init__(
        self, host: ProcessHost, menu: Menu, cache_root: Path, run_dir: Path, *, check: Check, hot: bool
    ) -> None:
        self._host = host
        self._menu = menu
        self._run_dir = run_dir
        self._check = check
        self._pool = SubprocessPool(
            host, cache_root, run_dir,
            capacity=FixedCapacity(2),
            limits=Limits(max_queue=_IN_FLIGHT * 2),
            warm_up=(lambda shape: warm_up(menu, shape)) if hot else None,
            # Kills hit starts as well: the pause after three in a row must not be most of the run.
            make_breaker=lambda: Breaker(first=0.02, longest=0.02),
        )  # fmt: skip
        self._ledger = Ledger()
        self._one_kill = asyncio.Lock()

    async def run(self, jobs: int, kill_rate: float, seed: int, progress: Progress) -> Ledger:
        """Returns the ledger; the pool is closed and what it left is counted."""
        dice = random.Random(seed)
        plans = [
            (dice.choice(self._menu.shapes), dice.random() < kill_rate, dice.expovariate(50), dice.random())
            for _ in range(jobs)
        ]
        before = _footprint()
        began = time.monotonic()
        bar = progress.add_task("jobs", total=jobs)
        slots = asyncio.Semaphore(_IN_FLIGHT)
        killers: list[asyncio.Task[None]] = []
        await self._pool.start()

        async def one(number: int, shape: Shape, kill: bool, delay: float, pick: float) -> None:
            async with slots:
                if kill:
                    killers.append(asyncio.create_task(self._kill(delay, pick)))
                await self._one(number, shape)
                progress.advance(bar)
                if number == jobs // 10:
                    self._ledger.rss_mb = (_rss_mb(), 0)

        try:
            async with asyncio.timeout(30 + 120 * jobs):
                await asyncio.gather(*(one(number, *plan) for number, plan in enumerate(plans)))
                await asyncio.gather(*killers)
        finally:
            await self._pool.close()
        self._ledger.rss_mb = (self._ledger.rss_mb[0], _rss_mb())
        self._ledger.seconds = time.monotonic() - began
        self._ledger.leaks = _leaks(before, _footprint()) + [f"video {path.name}" for path in self._run_dir.iterdir()]
        return self._ledger

    async def _one(self, number: int, shape: Shape) -> None:
        # At guidance 1 a negative prompt changes no byte: it only makes each job's parameters its own.
        menu = self._menu
        job = Job(f"job{number}", shape, "a fox", menu.seed, menu.steps, 1.0, menu.fps, negative_prompt=str(number))
        self._ledger.admitted += 1
        try:
            video = await self._pool.generate(job, lambda _event: None)
        except (JobFailed, ProcessLost, Rejected) as error:
            self._ledger.ended[type(error).__name__] += 1
        except Exception as error:
            self._ledger.ended[f"bug: {type(error).__name__}: {error}"] += 1
        else:
            self._ledger.ended["video"] += 1
            self._ledger.wrong += not self._check(shape, _take(video))

    async def _kill(self, delay: float, pick: float) -> None:
        await asyncio.sleep(delay)
        async with self._one_kill:
            while not (victims := self._victims(pick < _HELPER_SHARE)) and self._busy():  # noqa: ASYNC110 - anything
                await asyncio.sleep(0.001)
            if not victims:
                return  # nobody is left to be harmed
            name, pid = victims[int(pick * 1e6) % len(victims)]
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                self._ledger.kills[name] += 1
            # The next kill may hit anything at any moment, but something has to be served in between.
            videos = self._ledger.ended["video"]
            while self._ledger.ended["video"] == videos and self._busy():  # noqa: ASYNC110 - anything
                await asyncio.sleep(0.001)

    def _busy(self) -> bool:
        status = self._pool.status()
        return bool(status["running"] + status["waiting"])

    def _victims(self, helpers_first: bool) -> list[tuple[str, int]]:
        status = self._pool.status()
        helpers = [(name, pid) for name, pid in status["helpers"].items() if pid]
        children = [("shape process", process["pid"]) for process in status["processes"] if process["pid"]]
        return helpers if helpers and helpers_first else children


def _take(video: Video) -> bytes:
    try:
        return video.path.read_bytes()
    finally:
        video.path.unlink()


def same_video_each_time() -> Check:
    """A check that all videos of a shape are the same, byte for byte."""
    first: dict[Shape, str] = {}

    def check(shape: Shape, data: bytes) -> bool:
        digest = hashlib.sha256(data).hexdigest()
        return first.setdefault(shape, digest) == digest

    return check


def _rss_mb() -> float:
    return float(psutil.Process().memory_info().rss / 1e6)


def _footprint() -> dict[str, Counter[str]]:
    descriptors: Counter[str] = Counter()
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            target = str(descriptor.readlink())
            descriptors[target.partition("[")[0] if target.startswith(("pipe", "socket")) else target] += 1
    return {
        "descriptor": descriptors,
        "process": Counter(str(child.pid) for child in psutil.Process().children(recursive=True)),
        "thread": Counter(thread.name for thread in threading.enumerate()),
        "task": Counter(task.get_name() for task in asyncio.all_tasks()),
    }


def _leaks(before: dict[str, Counter[str]], after: dict[str, Counter[str]]) -> list[str]:
    return [
        f"{count} x {kind} {name}"
        for kind in before
        for name, count in (after[kind] - before[kind]).items()
        # The event loop's own: its thread pool, and a descriptor that libuv keeps for when it runs out of them.
        if not name.startswith(("asyncio_", "uvloop_")) and (name, count) != ("/dev/null", 1)
    ]


def show(ledger: Ledger, console: Console) -> None:
    """Print the ledger."""
    table = Table("ledger", "", title=f"{ledger.admitted} jobs, {ledger.kills.total()} kills, {ledger.seconds:.0f} s")
    table.add_row("admitted", str(ledger.admitted))
    for how, number in ledger.ended.most_common():
        table.add_row(f"  ended in: {how}", str(number))
    for whom, number in ledger.kills.most_common():
        table.add_row(f"killed: {whom}", str(number))
    table.add_section()
    table.add_row("lost", str(ledger.lost))
    table.add_row("wrong bytes", str(ledger.wrong))
    table.add_row("left behind", "\n".join(ledger.leaks) or "0")
    table.add_row("memory of the worker, MB", "{:.0f} -> {:.0f}".format(*ledger.rss_mb))
    console.print(table)
