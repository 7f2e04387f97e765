"""``benchmark.py soak``: a long run through gateway, frontend, router and worker, with faults; what is left of it.

Every accepted job must end once, in its own video or in an error that is true; every wrong request must be told so; and
what the programs hold (descriptors, memory, files, processes) must be as flat at the end as after the first tenth.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from ltx2_pool.tools.fleetstack import FleetStack
from ltx2_pool.words.menu import Menu
from ltx2_pool.words.shapes import Shape

IN_FLIGHT = 8
EVERY = 2.0
"""Seconds between two samples."""
FAULTS = {"a process is killed": 0.05, "a helper is killed": 0.01, "cancelled": 0.02, "a bad request": 0.02}
"""What happens to a job, and to which share of them; nothing to the others."""
SAME = 50
"""Every so many jobs, one is asked for a second time: it must have the same bytes."""
TRUE_FAILURES = ("server_error", "timeout")
GROWTH = 0.05
"""By which a program's memory may grow from the second tenth of the run to the last."""
SPARE = 8
"""Descriptors, and processes, by which those of a tenth may differ: connections come and go."""


@dataclass(frozen=True)
class Sample:
    """What one program held at one moment; the worker's processes and files are its children's as well."""

    at: float
    """Seconds since the run began."""
    jobs: int
    """That had ended."""
    program: str
    bytes: int
    descriptors: int
    processes: int
    zombies: int
    files: int


@dataclass
class Record:
    """What became of the jobs, and what was held meanwhile."""

    jobs: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    seconds: float = 0

    def check(self) -> None:
        """Add what is not as flat as it must be to the problems."""
        if self.ended.total() != self.jobs:
            self.problems.append(f"{self.jobs - self.ended.total()} of {self.jobs} jobs did not end")
        for program in dict.fromkeys(sample.program for sample in self.samples):
            early, late = self.tenth(program, 1), self.tenth(program, 9)
            if not (early and late):
                continue
            for what, allowed in (
                ("bytes", GROWTH * median(s.bytes for s in early)),
                ("descriptors", SPARE),
                ("processes", SPARE),
                ("files", 4 * IN_FLIGHT),
            ):
                before, after = (median(getattr(s, what) for s in part) for part in (early, late))
                if after - before > allowed:
                    self.problems.append(f"the {program}'s {what} grew from {before:,.0f} to {after:,.0f}")
            if min(s.zombies for s in late):
                self.problems.append(f"the {program} has zombies at the end")

    def tenth(self, program: str, number: int) -> list[Sample]:
        """By jobs, counted from 0: the one of number 1 is the first in which all that is loaded for good is there."""
        low, high = number * self.jobs / 10, (number + 1) * self.jobs / 10
        return [s for s in self.samples if s.program == program and low <= s.jobs <= high]


class Soak:
    """One run; the seed decides what happens to which job."""

    def __init__(
        self,
        gateway: str,
        worker: str,
        menu: Menu,
        programs: Mapping[str, int],
        directories: Mapping[str, Path],
        seed: int,
    ) -> None:
        """URLs of the gateway and of the worker's system port; pids, and directories whose files count, by program."""
        self._worker, self._menu = worker, menu
        self._programs = {name: psutil.Process(pid) for name, pid in programs.items()}
        self._directories = directories
        self._order, self._random = random.Random(seed), random.Random(seed + 1)
        self._record = Record()
        self._http = httpx.AsyncClient(base_url=gateway, timeout=60)
        self._status = httpx.AsyncClient(base_url=worker, timeout=10)
        self._began = time.monotonic()

    async def run(self, jobs: int, on_end: Callable[[], None]) -> Record:
        """Push the jobs through. Raises httpx.HTTPError when the gateway answers no more."""
        record = self._record
        record.jobs = jobs
        free = asyncio.Semaphore(IN_FLIGHT)
        sampling = asyncio.create_task(self._sample())

        async def one(number: int, shape: Shape, fault: str) -> None:
            try:
                record.ended[await self._one(number, shape, fault)] += 1
            finally:
                free.release()
                on_end()

        names = [*FAULTS, ""]
        weights = [*FAULTS.values(), 1 - sum(FAULTS.values())]
        async with self._http, self._status:
            try:
                async with asyncio.TaskGroup() as group:
                    for number in range(jobs):
                        await free.acquire()
                        if sampling.done():
                            sampling.result()  # why it ended
                        shape = self._order.choice(self._menu.shapes)
                        group.create_task(one(number, shape, self._order.choices(names, weights)[0]))
                left = (await self._http.get("/v1/videos", params={"limit": "100"})).json()["data"]
                record.problems += [f"{job['id']} is still there, {job['status']}" for job in left]
                self._look()
            finally:
                sampling.cancel()
        record.seconds = time.monotonic() - self._began
        record.check()
        return record

    # Jobs.

    async def _one(self, number: int, shape: Shape, fault: str) -> str:
        """How the job ended."""
        prompt = f"job {number}"
        body = {"prompt": prompt, "size": shape.size, "nvext": {"num_frames": shape.num_frames, "seed": number}}
        if fault == "a bad request":
            wrong: list[dict[str, Any]] = [{"size": "1x1"}, {"prompt": ""}, {"seconds": "x"}, {"model": "nobody's"}]
            answer = await self._http.post("/v1/videos", json={**body, **self._random.choice(wrong)})
            self._count(fault)
            if answer.status_code not in (400, 404):
                self._record.problems.append(f"job {number}, a wrong one, is answered {answer.status_code}")
            return f"refused: {answer.status_code}"
        id = await self._create(body)
        if fault == "cancelled":
            await asyncio.sleep(self._random.random() * 0.5)
            await self._delete(id)
            self._count(fault)
            return "deleted by its client"
        if fault:
            await asyncio.sleep(self._random.random() * 0.2)
            await self._kill(fault)
        how, data = await self._outcome(id, prompt, number)
        if data and number % SAME == 0:
            twin = await self._create(body)
            _, again = await self._outcome(twin, prompt, number)
            if again and again != data:
                self._record.problems.append(f"job {number} has other bytes the second time")
            await self._delete(twin)
        await self._delete(id)
        return how

    async def _create(self, body: Mapping[str, Any]) -> str:
        while True:
            answer = await self._http.post("/v1/videos", json=body)
            if answer.status_code != 429:
                id: str = answer.raise_for_status().json()["id"]
                return id
            await asyncio.sleep(0.2)

    async def _outcome(self, id: str, prompt: str, number: int) -> tuple[str, bytes]:
        while True:
            answer = await self._http.get(f"/v1/videos/{id}")
            job = answer.raise_for_status().json()
            if job["status"] not in ("queued", "in_progress"):
                break
            await asyncio.sleep(int(answer.headers["openai-poll-after-ms"]) / 1000)
        if job["status"] == "completed":
            data = (await self._http.get(f"/v1/videos/{id}/content")).content
            if hashlib.sha256(prompt.encode()).hexdigest()[:16].encode() in data:
                return "its video", data
            self._record.problems.append(f"job {number} has a video of another prompt, {len(data)} bytes")
            return "a wrong video", data
        code = (job.get("error") or {}).get("code")
        if code not in TRUE_FAILURES:
            self._record.problems.append(f"job {number} ended as {job}")
        return f"failed: {code}", b""

    async def _delete(self, id: str) -> None:
        answer = await self._http.delete(f"/v1/videos/{id}")
        if answer.status_code not in (200, 404):
            self._record.problems.append(f"{id} cannot be deleted: {answer.status_code} {answer.text[:200]}")

    # Faults.

    async def _kill(self, fault: str) -> None:
        status = (await self._status.get("/engine/video/status")).json()
        if fault == "a helper is killed":
            pids = [pid for pid in status["helpers"].values() if pid]
        else:
            pids = [process["pid"] for process in status["processes"] if process["pid"]]
        if not pids:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._random.choice(pids), signal.SIGKILL)
            self._count(fault)

    def _count(self, fault: str) -> None:
        self._record.faults[fault] += 1

    # What is held.

    async def _sample(self) -> None:
        while True:
            self._look()
            await asyncio.sleep(EVERY)

    def _look(self) -> None:
        now, ended = time.monotonic() - self._began, self._record.ended.total()
        for name, process in self._programs.items():
            family = [process, *process.children(recursive=True)]
            zombies = 0
            for one in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    zombies += one.status() == psutil.STATUS_ZOMBIE
            walked = os.walk(self._directories[name]) if name in self._directories else ()
            files = sum(len(found) for _, _, found in walked)  # directories come and go meanwhile
            held = process.memory_info().rss, process.num_fds(), len(family) - 1, zombies, files
            self._record.samples.append(Sample(now, ended, name, *held))


def run(
    work: Path, model: Path, shapes: Path, cache_root: Path, jobs: int, seed: int, on_end: Callable[[], None]
) -> Record:
    """The whole of it on this machine: one gateway, frontend, router and worker. Raises StackError, HTTPError."""
    settings = {"LTX2_POOL_MODE": "1", "LTX2_RUN_DIR": str(work / "run")}
    with FleetStack(work / "logs", model, shapes, cache_root, workers=1, routers=1, **settings) as running:
        running.system_port = running.worker_ports[0]
        gateway = running.start_gateway(work / "state", "--shapes", str(shapes))
        assert running.frontend is not None
        programs = {
            "gateway": next(iter(running.gateways.values())).pid,
            "frontend": running.frontend.pid,
            "router": running.routers[0].pid,
            "worker": running.workers[0].pid,
        }
        directories = {"gateway": work / "state/videos", "worker": work / "run"}
        worker = f"http://127.0.0.1:{running.system_port}"

        async def push() -> Record:
            return await Soak(gateway, worker, Menu.load(shapes), programs, directories, seed).run(jobs, on_end)

        return asyncio.run(push())


def show(record: Record, console: Console) -> None:
    """Print what became of the jobs, and what each program held early and late."""
    table = Table("", "", title=f"{record.jobs:,} jobs, {record.faults.total()} faults, {record.seconds:.0f} s")
    for how, number in record.ended.most_common():
        table.add_row(f"ended in: {how}", f"{number:,}")
    table.add_section()
    for what, number in record.faults.most_common():
        table.add_row(what, f"{number:,}")
    table.add_section()
    table.add_row("lost, wrong, or left behind", "\n".join(record.problems[:20]) or "0")
    console.print(table)


def write(record: Record, about: Mapping[str, Any], out: Path) -> list[Path]:
    """The report as JSON, and a picture of what was held. Raises OSError."""
    from ltx2_pool.tools.bench import plots

    out.mkdir(parents=True, exist_ok=True)
    report = {**about, "seconds": round(record.seconds, 1), "jobs": record.jobs, "ended": record.ended}
    report |= {"faults": record.faults, "problems": record.problems, "held": _summary(record)}
    path = out / "soak.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    return [path, plots.held(record.samples, out / "soak.png")]


def _summary(record: Record) -> dict[str, dict[str, list[float | None]]]:
    """By program and kind: medians of each tenth of the jobs, where it was sampled."""
    kinds = [name for name in asdict(record.samples[0]) if name not in ("at", "jobs", "program")]
    return {
        program: {kind: [_median(record.tenth(program, number), kind) for number in range(10)] for kind in kinds}
        for program in dict.fromkeys(sample.program for sample in record.samples)
    }


def _median(samples: list[Sample], kind: str) -> float | None:
    return round(median(getattr(sample, kind) for sample in samples)) if samples else None
