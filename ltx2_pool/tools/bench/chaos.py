"""``benchmark.py chaos``: many jobs through the real pool while things go wrong at random, and a ledger.

Every admitted job must end exactly once, in the right video or in an error that is true, no job may be refused for what
was not its fault, none may lose its process to a fault of another, and nothing may be left behind: no descriptor,
process, thread, task or video. Some clients leave, and some jobs are such that they must fail. With several devices,
some are made by gangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ltx2_pool.serving.pool import Pool
from ltx2_pool.tools.bench.faults import STEP, Fault, Target, inflict
from ltx2_pool.words.menu import Menu, Offer
from ltx2_pool.words.outcomes import JobFailed, NoRoom, OnEvent, ProcessLost, Rejected, Video
from ltx2_pool.words.protocol import Phase
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import Key

_IN_FLIGHT = 12
_LEAVING = 0.04
"""Share of the jobs whose client leaves."""
_VIDEO, _LEFT, _DUE, _FILE = "video", "its client left", "the error that is due", "a true error of its file"


@dataclass(frozen=True)
class Asked:
    """What a job asks for."""

    prompt: str
    due: tuple[type[Exception], ...] = ()
    """It can only end in one of these."""
    harmful: bool = False
    """It ends processes."""
    negative: str = ""
    """Its negative prompt: at guidance 1 it only makes the job's parameters its own, if each has another."""


Check = Callable[[Key, bytes], bool]
"""Whether these bytes are the right video of the key."""
Ask = Callable[[int, Offer], Asked]
"""What the job with that number asks of an entry of the menu."""


@dataclass
class Ledger:
    """What became of every job."""

    admitted: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    of_gangs: Counter[str] = field(default_factory=Counter)
    """Of these, those that a gang made."""
    faults: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    """Videos with other bytes than they must have, or of jobs that must fail."""
    refused: Counter[str] = field(default_factory=Counter)
    """Jobs without a video though nothing was wrong with them or with their file, by what they were told."""
    hurt: int = 0
    """Times that a job lost its process to a fault of another one: of another device's weights process, of a helper."""
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
        return not (self.lost or self.wrong or self.refused or self.hurt or self.leaks)


class Chaos:
    """One run over one pool; the seed decides which job meets which fault after what delay, not the timing."""

    def __init__(
        self, pool: Pool, menu: Menu, run_dir: Path, videos: Path, faults: Sequence[Fault], check: Check, ask: Ask
    ) -> None:
        """`videos` is where the pool keeps them, below `run_dir`."""
        self._pool = pool
        self._menu = menu
        self._faults = faults
        self._check = check
        self._ask = ask
        self._run_dir = run_dir
        self._videos = videos
        self._ledger = Ledger()
        self._begun: Counter[str] = Counter()
        """How often each job was begun that harms nobody."""
        self._makers: dict[str, int] = {}
        """The process in which it was begun last."""
        self._one_fault = asyncio.Lock()
        self._file_fault_at = float("-inf")
        self._file_fault_on = False

    async def run(self, jobs: int, rate: float, seed: int, progress: Progress) -> Ledger:
        """Push the jobs through, with `rate` faults for each."""
        order = random.Random(seed)
        before = _footprint()
        began = time.monotonic()
        await self._pool.start()
        target = Target(self._pool, self._run_dir, self._videos, random.Random(seed + 1).random)
        bar = progress.add_task("jobs", total=jobs)
        free = asyncio.Semaphore(_IN_FLIGHT)

        async def one(number: int, offer: Offer, patience: float | None) -> None:
            try:
                await self._one(number, offer, patience)
            finally:
                free.release()
            progress.advance(bar)
            if number >= jobs // 10 and not self._ledger.rss_mb[0]:
                with contextlib.suppress(OSError):  # there may be no descriptor now
                    self._ledger.rss_mb = (_rss_mb(), 0)

        async with asyncio.TaskGroup() as group:
            for number in range(jobs):
                await free.acquire()
                patience = order.random() if order.random() < _LEAVING else None
                group.create_task(one(number, order.choice(self._menu.offers), patience))
                if order.random() < rate:
                    fault = order.choices(self._faults, [fault.share for fault in self._faults])[0]
                    group.create_task(self._fault(fault, target, order.random() * 0.2))
        await self._pool.close()
        self._ledger.rss_mb = (self._ledger.rss_mb[0], _rss_mb())
        self._ledger.seconds = time.monotonic() - began
        left = [f"video {path.name}" for path in self._videos.iterdir()] if self._videos.is_dir() else []
        left += [f"room on {name}" for name, row in self._pool.status()["devices"].items() if row["processes"]]
        self._ledger.leaks = _leaks(before, _footprint()) + left
        return self._ledger

    async def _one(self, number: int, offer: Offer, patience: float | None) -> None:
        menu, ledger, asked = self._menu, self._ledger, self._ask(number, offer)
        job = Job(
            *(f"job{number}", offer.shape, asked.prompt, menu.seed, menu.steps, 1.0, menu.fps, asked.negative),
            variant=offer.variant,
            refine=offer.refine,
        )

        def on_event(event: object) -> None:
            if isinstance(event, Phase) and event.phase == "text" and not asked.harmful:
                self._begun[job.id] += 1
                self._makers[job.id] = next(p["pid"] for p in self._pool.status()["processes"] if p["job"] == job.id)

        began = time.monotonic()
        ledger.admitted += 1
        try:
            video = await self._wait(job, on_event, patience)
            if video is not None:
                ledger.wrong += not self._check(job.key, _take(video)) or bool(asked.due)
        except (JobFailed, ProcessLost, Rejected, OSError) as error:
            of_its_file = isinstance(error, NoRoom | JobFailed | OSError)
            if isinstance(error, asked.due):
                how = _DUE
            elif of_its_file and (self._file_fault_on or self._file_fault_at >= began):
                how = _FILE
            else:
                how = type(error).__name__
                ledger.refused[f"{how}: {str(error).splitlines()[0]}"] += 1
        except Exception as error:
            how = f"bug: {type(error).__name__}: {error}"
        else:
            how = _VIDEO if video is not None else _LEFT
        ledger.ended[how] += 1
        ledger.of_gangs[how] += offer.gpus > 1

    async def _wait(self, job: Job, on_event: OnEvent, patience: float | None) -> Video | None:
        """The job's video; None when its client has left, after `patience` seconds if it has any."""
        making = asyncio.create_task(self._pool.generate(job, on_event))
        if not (await asyncio.wait([making], timeout=patience))[0]:
            making.cancel()
            await asyncio.wait([making])
        return None if making.cancelled() else making.result()

    async def _fault(self, fault: Fault, target: Target, delay: float) -> None:
        await asyncio.sleep(delay)
        async with self._one_fault:
            if not self._busy():
                return  # nobody is left to be harmed
            self._file_fault_on = fault.of_files
            begun, makers = self._begun.copy(), self._makers.copy()
            target.spared.clear()
            try:
                if await inflict(fault, target):
                    self._ledger.faults[fault.name] += 1
            finally:
                if fault.of_files:
                    self._file_fault_at = time.monotonic()
                self._file_fault_on = False
            # The next fault may hit anything at any moment, but something has to be served in between.
            videos = self._ledger.ended[_VIDEO]
            while self._ledger.ended[_VIDEO] == videos and self._busy():  # noqa: ASYNC110 - anything
                await asyncio.sleep(STEP)
            self._ledger.hurt += sum(
                self._begun[job] > begun[job] for job, pid in target.spared.items() if makers.get(job) == pid
            )

    def _busy(self) -> bool:
        status = self._pool.status()
        return bool(status["running"] + status["waiting"])


def _take(video: Video) -> bytes:
    try:
        return video.path.read_bytes()
    finally:
        with contextlib.suppress(OSError):
            video.path.unlink()


def same_video_each_time() -> Check:
    """A check that all videos of a key are the same, byte for byte."""
    first: dict[Key, str] = {}

    def check(key: Key, data: bytes) -> bool:
        digest = hashlib.sha256(data).hexdigest()
        return first.setdefault(key, digest) == digest

    return check


def a_fox(_number: int, _offer: Offer) -> Asked:
    """All videos of a key are the same then."""
    return Asked("a fox")


def imaginary_jobs(seed: int, scratch: Path) -> Ask:
    """Jobs for the imaginary engine: some end their first process, in any phase and in a gang any rank, or run it out
    of memory; some can only fail.

    Processes make files in `scratch`, a directory that is there before them.
    """
    pick = random.Random(seed + 2)
    once = (
        "crash",
        "die in text",
        "die in denoise",
        "die in decode",
        "die in encode",
        "oom",
        "kill in encode",
        "fatal",
    )
    always: dict[str, tuple[type[Exception], ...]] = {
        "refused": (JobFailed,),
        "soft": (JobFailed, ProcessLost),  # of a gang, all ranks: that may be a fault of the exchange between them
        "die in denoise": (ProcessLost,),
        "exit 3": (ProcessLost,),
    }

    def ask(number: int, offer: Offer) -> Asked:
        roll = pick.random()
        if roll < 0.05:
            harm = f"{pick.choice(once)} once {scratch / str(number)}"
            if offer.gpus > 1:
                harm = f"rank {pick.randrange(offer.gpus)}: {harm} | long 8"
            return Asked(harm, harmful=True, negative=str(number))
        if roll < 0.08:
            prompt = pick.choice(list(always))
            return Asked(prompt, always[prompt], harmful=True, negative=str(number))
        return Asked("long 8" if roll < 0.3 else "fine", negative=str(number))

    return ask


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
    gangs = ledger.of_gangs.total()
    table = Table("ledger", "", title=f"{ledger.admitted} jobs, {ledger.faults.total()} faults, {ledger.seconds:.0f} s")
    if gangs:
        table.add_column("of gangs")

    def of_gangs(number: int) -> list[str]:
        return [str(number)] if gangs else []

    table.add_row("admitted", str(ledger.admitted), *of_gangs(gangs))
    for how, number in ledger.ended.most_common():
        table.add_row(f"  ended in: {how}", str(number), *of_gangs(ledger.of_gangs[how]))
    table.add_section()
    for what, number in ledger.faults.most_common():
        table.add_row(what, str(number))
    table.add_section()
    table.add_row("lost", str(ledger.lost))
    table.add_row("wrong bytes", str(ledger.wrong))
    table.add_row("innocent refused", "\n".join(f"{n} x {what}" for what, n in ledger.refused.items()) or "0")
    table.add_row("hurt by a fault elsewhere", str(ledger.hurt))
    table.add_row("left behind", "\n".join(ledger.leaks) or "0")
    table.add_row("memory of the worker, MB", "{:.0f} -> {:.0f}".format(*ledger.rss_mb))
    console.print(table)
