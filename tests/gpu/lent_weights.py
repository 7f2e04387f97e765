"""Lends a big random-weight LTX-2 on this machine's GPU, lets borrowers misbehave, and reports what it does to others.

``python -m tests.gpu.lent_weights --out DIR`` writes the checkpoint (the real model's dimensions, as many layers as
asked for), then shows:

- a bake with lent weights and one with private weights, side by side; both verified with lent weights;
- for read-only mappings and for CUDA IPC: seconds to attach, and device memory of each borrower;
- a borrower that writes to a lent weight: what becomes of it, of a video that another makes meanwhile, and of the
  checksum of the weights;
- SIGKILL for ten borrowers, and the device memory that is left.

report.json is written after each step, so that a run that is cut short still reports. The exit status is the
number of steps that went wrong. Without a GPU the same happens in main memory, where a write is the writer's own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from socket import socket
from typing import Any

import pynvml

from ltx2_pool.caches.bake import PROMPT
from ltx2_pool.processes.guard import Guard
from ltx2_pool.processes.process import Timeouts
from ltx2_pool.processes.shape import ShapeProcess
from ltx2_pool.processes.subprocesses import ProcessHost
from ltx2_pool.processes.zygote import ZygoteSpawner
from ltx2_pool.words.menu import Menu
from ltx2_pool.words.outcomes import ProcessLost
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import CacheDirs, Key
from tests.paths import REPOSITORY

WRITE = "write to a weight"
"""A prompt that does it first."""
MEASURED = "measured: "
MIB = 1 << 20
_numbers = itertools.count()


def serve(connection_fd: int, desk_fd: int | None = None) -> None:
    """What a fork calls: the real child, which says how long it attached, and obeys `WRITE`."""
    import torch

    from ltx2_pool.model import child, engine, vmm, weights

    generate, borrow, attach = engine.Generator.generate, weights.borrow, vmm.attach
    seconds: dict[str, float] = {}

    def timed_attach(*arguments: Any) -> int:
        began = time.monotonic()
        base = attach(*arguments)
        seconds["map_s"] = round(time.monotonic() - began, 5)
        return base

    def timed_borrow(desk: socket) -> dict[str, Any]:
        began = time.monotonic()
        if torch.cuda.is_available():
            torch.empty(1, device="cuda")
            torch.cuda.synchronize()
        started = time.monotonic()
        modules = borrow(desk)
        seconds["context_s"] = round(started - began, 4)
        seconds["borrow_s"] = round(time.monotonic() - started, 4)
        print(f"{MEASURED}{json.dumps(seconds)}", flush=True)
        return modules

    def misbehaving(self: engine.Generator, job: Job, *rest: Any) -> Any:
        if job.prompt == WRITE:
            parameters = self.modules["transformer"].parameters()
            next(weight for weight in parameters if weight.dim() > 1).data.fill_(1)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        return generate(self, job, *rest)

    for owner, name, other in (
        (vmm, "attach", timed_attach),
        (weights, "borrow", timed_borrow),
        (engine.Generator, "generate", misbehaving),
    ):
        setattr(owner, name, other)
    child.serve(connection_fd, *(() if desk_fd is None else (desk_fd,)))


def serve_by_ipc(connection_fd: int, desk_fd: int | None = None) -> None:
    """As `serve`, where read-only mappings are not supported."""
    from ltx2_pool.model import vmm

    vmm.obstacle = lambda device: "this run compares with it"
    serve(connection_fd, desk_fd)


class Run:
    """One run; each part adds to `report`."""

    def __init__(self, model: Path, menu: Path, work: Path, out: Path, until: float) -> None:
        self.model, self.menu_file, self.work, self.out, self.until = model, menu, work, out, until
        self.menu = Menu.load(menu)
        self.shape = self.menu.shapes[0]
        (work / "videos").mkdir()  # before there are children, which may write to what is there
        self.began = time.monotonic()
        self.report: dict[str, Any] = {"machine": _machine(), "steps": {}}
        self.on_device = _used() is not None

    def left(self) -> float:
        """Seconds."""
        return max(1.0, self.until - time.monotonic())

    @contextlib.contextmanager
    def step(self, name: str, *, needed: bool = False) -> Iterator[dict[str, Any]]:
        """Run the body as a step: what it leaves in the dictionary is reported, and how it ended.

        Raises only what goes wrong in a step that is `needed` for the next.
        """
        entry: dict[str, Any] = {"ok": False}
        began = time.monotonic()
        problem = None
        try:
            yield entry
            entry["ok"] = True
        except Exception as error:
            traceback.print_exc()
            problem = error
            entry["problem"] = f"{type(error).__name__}: {error}"[:1500]
        entry["seconds"] = round(time.monotonic() - began, 2)
        self.report["steps"][name] = entry
        self.save()
        print(f"{time.monotonic() - self.began:7.1f} s  {name}: {json.dumps(entry)}", flush=True)
        if needed and problem is not None:
            raise problem

    def save(self) -> None:
        """Write what is known."""
        (self.out / "report.json").write_text(json.dumps(self.report, indent=1) + "\n")

    def warm_up(self, name: str, weights: dict[str, str], *extra: str) -> None:
        """warmup.py for each cache root, at the same time: a fresh program with its own helpers."""
        with self.step(name) as entry:
            running = {}
            for root, how in weights.items():
                report = self.out / f"{name}-{root}.json"
                command = [
                    sys.executable,
                    str(REPOSITORY / "warmup.py"),
                    "--model",
                    str(self.model),
                    "--shapes",
                    str(self.menu_file),
                    "--only",
                    self.shape.key,
                    "--cache-root",
                    str(self.work / root),
                    "--report",
                    str(report),
                    *extra,
                ]
                environment = {**os.environ, "LTX2_POOL_WEIGHTS": how}
                running[root] = report, subprocess.Popen(command, cwd=REPOSITORY, env=environment)
            try:
                for _, program in running.values():
                    program.wait(self.left())
            finally:
                for _, program in running.values():
                    program.terminate()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        program.wait(30)
            for root, (report, program) in running.items():
                (shape,) = json.loads(report.read_text())["shapes"]
                entry[root] = {"weights": weights[root], **shape}
                assert program.returncode == 0, f"{root}: {shape['problems']}"

    async def lend(self, name: str, program: str) -> None:
        """Everything that is seen with one kind of lending."""
        async with self._host(program) as host:
            with self.step(f"{name}: start", needed=True) as entry:
                await asyncio.wait_for(host.prepare(), self.left())
                lending, lender = host.lending("cpu"), host.weights["cpu"]._process
                assert lending is not None
                assert lender is not None
                entry["lending"] = lending.model_dump()
                entry["said"] = [line for line in lender.tail if "CUDA IPC" in line]
                assert bool(entry["said"]) == (self.on_device and program == "serve_by_ipc")
                entry["checksum"] = checksum = await asyncio.wait_for(host.weights["cpu"].checksum(), self.left())
                entry["device_mib"] = _settled()
            with self.step(f"{name}: borrowers", needed=True) as entry:
                victim, sibling = [await self._borrower(host, entry) for _ in range(2)]
                first = await self._video(sibling)
                entry["as_baked"] = first == self._baked()
                assert entry["as_baked"]
            with self.step(f"{name}: a write", needed=True) as entry:
                writable = program == "serve_by_ipc" or not self.on_device
                meanwhile = asyncio.create_task(self._video(sibling))
                try:
                    await self._video(victim, WRITE)
                    entry["writer"] = "made its video"
                except ProcessLost as lost:
                    entry["writer"] = f"{lost.reason}: {lost.what}"
                entry["sibling_meanwhile_same"] = await meanwhile == first
                entry["sibling_afterwards_same"] = await self._video(sibling) == first
                entry["sibling_alive"] = sibling.alive
                after = await asyncio.wait_for(host.weights["cpu"].checksum(), self.left())
                entry["checksum_same"] = after == checksum
                same = all(entry[word] for word in entry if word.startswith("sibling") or word == "checksum_same")
                assert same or (writable and self.on_device)
                assert writable == (entry["writer"] == "made its video")
            for process in (victim, sibling):
                process.kill()
                await asyncio.wait_for(process.exited(), 60)
            with self.step(f"{name}: SIGKILL for ten borrowers") as entry:
                before = _settled()
                ten = await asyncio.gather(*(self._start(host) for _ in range(10)))
                entry["device_mib"] = {"before": before, "with_ten": _settled()}
                for process in ten:
                    assert process.pid is not None
                    os.kill(process.pid, signal.SIGKILL)
                for process in ten:
                    await asyncio.wait_for(process.exited(), 60)
                entry["device_mib"]["after"] = _settled(before)
                entry["checksum_same"] = await asyncio.wait_for(host.weights["cpu"].checksum(), self.left()) == after
                assert entry["checksum_same"]
                if before is not None:
                    assert abs(entry["device_mib"]["after"] - before) < 8

    @contextlib.asynccontextmanager
    async def _host(self, program: str) -> AsyncIterator[ProcessHost]:
        recipe = Recipe(model_path=str(self.model))
        guard = Guard()
        spawner = ZygoteSpawner(recipe.environment(), guard, program=f"tests.gpu.lent_weights:{program}")
        timeouts = Timeouts(spawn=180, weights=180, generation=120, silence=120)
        idle = _settled()
        host = ProcessHost(recipe, self.work / "lent", self.work, timeouts, spawner=spawner)
        await host.start()
        try:
            yield host
        finally:
            await asyncio.wait_for(host.close(), 120)
            await asyncio.to_thread(guard.close)
        with self.step(f"{program}: closed") as entry:
            entry["device_mib"] = {"before": idle, "after": _settled(idle)}
            if idle is not None:
                assert abs(entry["device_mib"]["after"] - idle) < 8

    async def _start(self, host: ProcessHost) -> ShapeProcess:
        process = host.process(Key(self.shape))
        assert isinstance(process, ShapeProcess)
        cache = CacheDirs.of(self.work / "lent", Key(self.shape))
        await asyncio.wait_for(host.start_process(process, (), cache), self.left())
        return process

    async def _borrower(self, host: ProcessHost, entry: dict[str, Any]) -> ShapeProcess:
        before = _settled()
        process = await self._start(host)
        said = [line.removeprefix(MEASURED) for line in process.tail if line.startswith(MEASURED)]
        measured = json.loads(said[-1]) if said else {}
        measured["ready_s"] = round(time.monotonic() - process.began, 3)
        measured["resident_mib"] = process.memory.resident // MIB if process.memory is not None else None
        after = _settled()
        measured["device_mib"] = None if before is None or after is None else after - before
        entry.setdefault("each", []).append(measured)
        return process

    async def _video(self, process: ShapeProcess, prompt: str = PROMPT) -> str:
        menu = self.menu
        path = self.work / "videos" / f"{next(_numbers)}.mp4"
        path.touch()
        job = Job(path.stem, self.shape, prompt, menu.seed, menu.steps, menu.guidance, menu.fps)
        await asyncio.wait_for(process.generate(job, path, lambda _: None), self.left())
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def _baked(self) -> str:
        return str(self.report["steps"]["bake"]["lent"]["video_sha256"])


def _nvml(query: str, default: Any) -> Any:
    """Of the first device; `default` without one."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return default
    try:
        if query == "driver":
            return pynvml.nvmlSystemGetDriverVersion()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        return (
            pynvml.nvmlDeviceGetName(handle)
            if query == "device"
            else pynvml.nvmlDeviceGetMemoryInfo(handle).used // MIB
        )
    finally:
        pynvml.nvmlShutdown()


def _machine() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton", "fastvideo", "transformers")}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": _nvml("device", "cpu"),
        "driver": _nvml("driver", ""),
        **versions,
    }


def _used() -> int | None:
    return _nvml("used", None)  # type: ignore[no-any-return]


def _settled(target: int | None = None, seconds: float = 8.0) -> int | None:
    """MiB of the device in use, once it is near `target`, or no longer changes."""
    last, end = _used(), time.monotonic() + seconds
    while last is not None and time.monotonic() < end:
        time.sleep(0.3)
        now = _used()
        if now is not None and (now == last if target is None else abs(now - target) < 8):
            return now
        last = now
    return last


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu.lent_weights", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where report.json goes")
    parser.add_argument("--model", type=Path, metavar="DIR", help="use this checkpoint instead of writing one")
    parser.add_argument(
        "--scratch", type=Path, default=Path("/dev/shm"), help="where the checkpoint goes [%(default)s]"
    )
    parser.add_argument("--size", choices=("tiny", "large"), default="large", help="[%(default)s]")
    parser.add_argument("--layers", type=int, default=16, help="transformer layers [%(default)s; the real model: 48]")
    parser.add_argument("--gemma-layers", type=int, default=8, help="[%(default)s; the real model: 48]")
    parser.add_argument("--shape", default="768x512@121", metavar="KEY", help="[%(default)s]")
    parser.add_argument("--limit", type=float, default=480, metavar="SECONDS", help="for all of it [%(default)g]")
    arguments = parser.parse_args()
    until = time.monotonic() + arguments.limit
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="ltx2-gpu-", dir=arguments.scratch) as scratch,
        # Not in /dev/shm: children are kept from writing beside their caches, and FastVideo needs to there.
        tempfile.TemporaryDirectory(prefix="ltx2-gpu-") as elsewhere,
    ):
        work = Path(elsewhere)
        menu = work / "menu.yaml"
        menu.write_text(f"model: ltx2-random\nsteps: 5\nshapes:\n  - {arguments.shape}\n")
        model = arguments.model or Path(scratch) / "checkpoint"
        run = Run(model, menu, work, arguments.out, until)
        if arguments.model is None:
            with run.step("checkpoint", needed=True):
                size = ["--size", arguments.size]
                if arguments.size == "large":
                    size += ["--layers", str(arguments.layers), "--gemma-layers", str(arguments.gemma_layers)]
                command = [sys.executable, "-m", "ltx2_pool.tools.tiny", str(model), *size]
                subprocess.run(command, check=True, timeout=run.left(), cwd=REPOSITORY)
        run.warm_up("bake", {"lent": "shared", "private": "private"})
        run.warm_up("verify", {"lent": "shared", "private": "shared"}, "--verify")
        for name, program in (("read-only", "serve"), ("CUDA IPC", "serve_by_ipc")):
            with run.step(name):
                asyncio.run(run.lend(name, program))
    return sum(not step["ok"] for step in run.report["steps"].values())


if __name__ == "__main__":
    sys.exit(main())
