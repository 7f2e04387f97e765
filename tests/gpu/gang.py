"""What several GPUs of one host are good for, in one run: a gang's latency, and the throughput of all of them.

``python -m tests.gpu.gang --out DIR`` writes a random-weight checkpoint of the real model's dimensions, then

- latency: makes the large shape's videos on one device and as a gang of all, in turn: the ratio of the medians, where
  the time goes, how close the pictures are, and whether a gang's are the same bytes each time;
- throughput: makes the small shape's videos at saturation on one device, then on all: the ratio of the rates. As in the
  pool, one video at a time has a device, and the next one begins when the last one is only being encoded.

gang.json is written after each part, so that a run that is cut short still reports. With stand-ins for devices
(``--devices cpu:0,cpu:1``) and a tiny checkpoint it runs on a CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ltx2_pool.caches import bake
from ltx2_pool.processes.host import Process
from ltx2_pool.processes.process import Timeouts
from ltx2_pool.processes.subprocesses import ProcessHost
from ltx2_pool.words import device
from ltx2_pool.words.menu import Menu, Offer
from ltx2_pool.words.protocol import Phase, Step
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job, warm_up
from ltx2_pool.words.shapes import Shape
from tests.gpu.bake_and_verify import machine

TIMEOUTS = Timeouts(spawn=500, weights=500, generation=200, silence=120)
PARTS = ("latency", "throughput")
TURNS = 2
"""Processes of one shape on one device, so that one can encode while the other has the device."""


class Run:
    """All parts of one run; the report is saved after each."""

    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self.arguments = arguments
        self.work = work
        self.model = arguments.model or work / "checkpoint"
        self.devices = tuple(each.id for each in device.select(arguments.devices))
        self.alone = Offer(arguments.large, image=False)
        self.together = Offer(arguments.large, "gang", image=False, gpus=len(self.devices))
        self.small = Offer(arguments.small, image=False)
        self.menu = Menu("ltx2", (self.alone, self.together, self.small), steps=arguments.steps)
        self.videos = work / "videos"
        self.began = time.monotonic()
        self.report: dict[str, Any] = {"argv": sys.argv[1:], "machine": machine(), "devices": len(self.devices)}
        self.host: ProcessHost

    async def everything(self) -> int:
        """Returns how many parts failed."""
        self.videos.mkdir()  # before a process is confined to what is there
        if not self.model.exists():
            layers = ["--layers", str(self.arguments.layers), "--gemma-layers", str(self.arguments.gemma_layers)]
            command = [sys.executable, "-m", "ltx2_pool.tools.tiny", str(self.model), "--size", "large", *layers]
            await asyncio.to_thread(subprocess.run, command, check=True)
            self.note("the checkpoint is written")
        recipe = Recipe(model_path=str(self.model), compile=not self.arguments.no_compile)
        self.host = ProcessHost(
            recipe,
            self.arguments.work or self.work / "cache",
            self.work / "scratch",
            TIMEOUTS,
            offers=self.menu.offers,
            devices=self.devices,
        )
        await self.host.start()
        try:
            await asyncio.gather(*(owner.ready() for owner in self.host.weights.values()))
            self.note("the weights are lent")
            for part in self.arguments.parts:
                try:
                    async with asyncio.timeout(max(1.0, self.left())):
                        await (self.latency() if part == "latency" else self.throughput())
                except Exception as error:
                    traceback.print_exc()
                    self.report.setdefault("errors", {})[part] = f"{type(error).__name__}: {error}"[-3000:]
                self.note(f"{part} is done")
        finally:
            await self.host.close()
        return len(self.report.get("errors", {}))

    def left(self) -> float:
        return float(self.arguments.seconds - (time.monotonic() - self.began))

    def note(self, what: str) -> None:
        print(f"{time.monotonic() - self.began:7.1f} s  {what}", flush=True)
        (self.arguments.out / "gang.json").write_text(json.dumps(self.report, indent=1) + "\n")

    async def hot(self, offer: Offer, devices: Sequence[str]) -> Process:
        """A process that has made its warm-up."""
        process = self.host.process(offer.key, tuple(devices))
        ready = await self.host.start_process(process, warm_up(self.menu, offer))
        self.report.setdefault("start", {}).setdefault(str(offer.key), ready.model_dump())
        self.note(f"{offer.key} is hot on {len(devices)} after {ready.trace_s:.1f} s of compiling")
        return process

    def job(self, offer: Offer, seed: int = 42) -> Job:
        return Job("", offer.shape, bake.PROMPT, seed, self.arguments.steps, 1.0, 24, variant=offer.variant)

    async def make(
        self, process: Process, job: Job, on_phase: Callable[[str], None] = lambda _phase: None
    ) -> dict[str, Any]:
        """One video, and what is to be known of it; its file stays when it is the first of its kind."""
        output = self.videos / f"{uuid.uuid4().hex}.mp4"
        output.touch(0o600)

        def on_event(event: Phase | Step) -> None:
            if isinstance(event, Phase):
                on_phase(event.phase)

        began = time.monotonic()
        done = await process.generate(replace(job, id=output.stem), output, on_event)
        made: dict[str, Any] = {"seconds": time.monotonic() - began, "phases": done.phases}
        made |= {"memory": done.memory.model_dump(), "misses": done.compiled.misses}
        made["sha256"] = hashlib.sha256(output.read_bytes()).hexdigest()
        kept = self.videos / f"{process.key}.mp4"
        output.rename(kept) if not kept.exists() else output.unlink()
        return made

    async def latency(self) -> None:
        alone, together = await asyncio.gather(
            self.hot(self.alone, self.devices[:1]), self.hot(self.together, self.devices)
        )
        async with ending(alone, together):
            found: dict[str, list[dict[str, Any]]] = {"one": [], "gang": []}
            self.report["latency"] = found
            for _ in range(self.arguments.repeat):
                found["one"].append(await self.make(alone, self.job(self.alone)))
                found["gang"].append(await self.make(together, self.job(self.together)))
                self.note("one video each way")
        medians = {way: statistics.median(video["seconds"] for video in videos) for way, videos in found.items()}
        self.report["latency_summary"] = {
            "shape": self.alone.shape.key,
            "medians": medians,
            "gang / one": round(medians["gang"] / medians["one"], 3),
            "phases": {
                way: {name: statistics.median(v["phases"][name] for v in videos) for name in videos[0]["phases"]}
                for way, videos in found.items()
            },
            "same_bytes": {way: len({video["sha256"] for video in videos}) == 1 for way, videos in found.items()},
            "psnr_db": psnr(*(self.videos / f"{offer.key}.mp4" for offer in (self.alone, self.together))),
        }

    async def throughput(self) -> None:
        first = await self.hot(self.small, self.devices[:1])  # the others then find what it compiled
        places = [each for each in self.devices for _ in range(TURNS)][1:]
        processes = [first, *await asyncio.gather(*(self.hot(self.small, [each]) for each in places))]
        async with ending(*processes):
            one = await self.saturated(processes[:TURNS])
            self.note(f"one device: {one['per_s']:.3f} videos a second")
            every = await self.saturated(processes)
        self.report["throughput"] = {
            "shape": self.small.shape.key,
            "one": one,
            "all": every,
            "all / one": round(every["per_s"] / one["per_s"], 3),
        }

    async def saturated(self, processes: Sequence[Process]) -> dict[str, Any]:
        """Keep all devices of these processes busy with so many videos each; counted from when each has made one."""
        left = [self.arguments.videos * len(processes) // TURNS]
        leases = {process.devices: asyncio.Lock() for process in processes}
        ends: list[float] = []
        alone: list[float] = []

        async def serve(process: Process) -> None:
            lease = leases[process.devices]
            while left[0] > 0:
                left[0] -= 1
                await lease.acquire()

                def on_phase(phase: str) -> None:
                    if phase == "encode":
                        lease.release()

                made = await self.make(process, self.job(self.small, seed=left[0]), on_phase)
                ends.append(time.monotonic())
                alone.append(made["seconds"])

        async with asyncio.TaskGroup() as group:
            for process in processes:
                group.create_task(serve(process))
        skipped = len(leases)  # until each device has made its first, not all are busy
        per_s = (len(ends) - skipped) / (ends[-1] - ends[skipped - 1])
        return {"videos": len(ends), "per_s": per_s, "median_s": statistics.median(alone)}


@contextlib.asynccontextmanager
async def ending(*processes: Process) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            await process.exited()


def psnr(one: Path, other: Path) -> float:
    """Of the frames of two files, in dB."""
    import av
    import numpy as np

    total, count = 0.0, 0
    with av.open(str(one)) as first, av.open(str(other)) as second:
        for a, b in zip(first.decode(video=0), second.decode(video=0), strict=True):
            difference = a.to_ndarray().astype(np.float64) - b.to_ndarray()
            total, count = total + float((difference**2).sum()), count + difference.size
    return round(float(10 * np.log10(255**2 * count / max(1e-9, total))), 2)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.gang", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where gang.json goes")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the compile caches here, and use what is there")
    parser.add_argument("--model", type=Path, metavar="DIR", help="use this checkpoint instead of writing one")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--gemma-layers", type=int, default=8)
    parser.add_argument("--devices", default="all", help="as the worker's [all]")
    parser.add_argument("--large", type=Shape.parse, default="1920x1088@121", metavar="KEY", help="[%(default)s]")
    parser.add_argument("--small", type=Shape.parse, default="768x512@121", metavar="KEY", help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=5, help="videos each way of the large shape [%(default)s]")
    parser.add_argument("--videos", type=int, default=20, help="of the small shape for each device [%(default)s]")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=560, help="no part goes on for longer [%(default)s]")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ltx2-gang-") as work:
        run = Run(arguments, Path(work))
        failed = asyncio.run(run.everything())
    print(json.dumps({name: run.report.get(name) for name in ("latency_summary", "throughput", "errors")}, indent=1))
    return failed


if __name__ == "__main__":
    sys.exit(main())
