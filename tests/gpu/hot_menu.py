"""Makes every shape of a menu hot on this machine's GPU at once, with lent weights, and reports what it took.

``python -m tests.gpu.hot_menu --out DIR`` writes a random-weight checkpoint (the real model's dimensions), compiles
every shape, starts the whole pool ahead on those caches, makes videos of every shape, and kills the weights process in
the middle of a job. report.json is written anew after each part, so that a run that is cut short still reports.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from ltx2_pool.caches import manifest
from ltx2_pool.processes.host import ProcessHost
from ltx2_pool.processes.process import State, Timeouts
from ltx2_pool.serving.capacity import MemoryCapacity
from ltx2_pool.serving.pool import SubprocessPool
from ltx2_pool.words import requests
from ltx2_pool.words.protocol import Ready
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import CacheDirs, Menu, Shape
from tests.gpu.bake_and_verify import ROOT, machine

PROMPT = "a paper lantern drifts over still water at dusk"
TIMEOUTS = Timeouts(spawn=240, weights=240, generation=120, cancel=10, term=10)


class Run:
    """The parts of one run, in order; each adds to `report`."""

    def __init__(self, model: Path, menu: Menu, work: Path, out: Path, jobs: int) -> None:
        self.recipe = Recipe(model_path=str(model))
        self.menu = menu
        self.caches = work / "cache"
        self.videos = work / "videos"
        self.videos.mkdir(parents=True)
        self.out = out
        self.jobs = jobs
        self.began = time.monotonic()
        self.report: dict[str, Any] = {"machine": machine(), "shapes": {s.key: {} for s in menu.shapes}}

    def note(self, what: str) -> None:
        """Say what is done, and save what is known."""
        print(f"{time.monotonic() - self.began:7.1f} s  {what}", flush=True)
        (self.out / "report.json").write_text(json.dumps(self.report, indent=1) + "\n")

    async def compile_all(self) -> dict[Shape, Ready]:
        """A warm-up in a fresh process for each shape, some at a time: fills the caches and measures the memory."""
        host = ProcessHost(self.recipe, TIMEOUTS)
        await host.start()
        slots = asyncio.Semaphore(self.jobs)
        readies: dict[Shape, Ready] = {}

        async def one(shape: Shape) -> None:
            async with slots:
                process = host.process(shape)
                cache, warm_up = CacheDirs.of(self.caches, shape), requests.warm_up(self.menu, shape)
                try:
                    readies[shape] = await host.start_process(process, cache, str(self.videos), warm_up)
                finally:
                    process.kill()
                    await process.exited()
                self.report["shapes"][shape.key]["cold"] = readies[shape].model_dump()
                self.note(f"{shape.key} compiled ({self.jobs} at a time)")

        try:
            began = time.monotonic()
            await host.prepare()
            lending = host.lending
            assert lending is not None
            self.report["weights"] = {**lending.model_dump(), "with_zygote_s": time.monotonic() - began}
            self.note("zygote and weights process are ready")
            await asyncio.gather(*map(one, self.menu.shapes))
            await self.forks(host)
        finally:
            await host.close()
        return readies

    async def forks(self, host: ProcessHost) -> None:
        """Fork to READY without a warm-up, then the first customer's video on the baked cache, and the next."""
        shape = self.menu.shapes[0]
        self.report["forks"] = []
        for _ in range(3):
            process = host.process(shape)
            began = time.monotonic()
            ready = await host.start_process(process, CacheDirs.of(self.caches, shape), str(self.videos))
            entry = {"fork_to_ready_s": time.monotonic() - began, "attach_s": ready.load_s, "videos_s": []}
            for _ in range(3):
                began = time.monotonic()
                process.reserve()
                await process.generate(self.job(shape), lambda _: None)
                entry["videos_s"].append(time.monotonic() - began)
            process.kill()
            await process.exited()
            self.report["forks"].append(entry)
        self.note("forked three times without a warm-up")

    async def serve(self, readies: dict[Shape, Ready]) -> None:
        """The pool as a worker has it: every shape started ahead, K by memory."""
        host = ProcessHost(self.recipe, TIMEOUTS)
        capacity = MemoryCapacity(4 << 30, 1, {shape: ready.memory for shape, ready in readies.items()})
        pool = SubprocessPool(
            host, self.caches, self.videos, capacity=capacity, prewarm=self.menu.shapes, ready_min=1,
            warm_up=lambda shape: requests.warm_up(self.menu, shape),
        )  # fmt: skip
        try:
            began = time.monotonic()
            await pool.start()
            self.report["first_shape_hot_s"] = time.monotonic() - began
            while _still_starting(pool, len(self.menu.shapes)):  # noqa: ASYNC110 - the state of many objects
                await asyncio.sleep(0.1)
            self.report["all_hot_s"] = time.monotonic() - began
            self.report["hot"] = [p["shape"] for p in pool.status()["processes"] if p["state"] == State.READY.value]
            self.note(f"{len(self.report['hot'])} of {len(self.menu.shapes)} shapes are hot at once")
            for shape, process in list(pool._processes.items()):
                assert process.ready is not None
                self.report["shapes"][shape.key]["baked"] = process.ready.model_dump()
            assert host.lender is not None
            before = await host.lender.checksum()
            for shape in self.menu.shapes:
                if shape.key in self.report["hot"]:
                    await self.videos_of(pool, shape)
            self.report["device_used_mib"] = _device_used()
            self.report["weights_unchanged"] = await host.lender.checksum() == before
            self.report["capacity"] = pool.status()["memory"]
            self.note(
                f"weights unchanged: {self.report['weights_unchanged']}; device: {self.report['device_used_mib']}"
            )
            await self.lose_weights(pool, host)
        finally:
            await pool.close()

    async def videos_of(self, pool: SubprocessPool, shape: Shape) -> None:
        seconds, digests = [], set()
        for _ in range(3):
            began = time.monotonic()
            video = await pool.generate(self.job(shape), lambda _: None)
            seconds.append(time.monotonic() - began)
            data = video.path.read_bytes()
            digests.add(hashlib.sha256(data).hexdigest())
        (self.out / f"{shape.key}.mp4").write_bytes(data)
        process = pool._processes[shape]
        assert process.memory is not None
        steady = statistics.median(seconds[1:])
        self.report["shapes"][shape.key] |= {
            "first_s": seconds[0], "steady_s": steady, "first_over_steady": seconds[0] / steady,
            "same_bytes": len(digests) == 1, "memory": process.memory.model_dump(), "phases": video.phases,
        }  # fmt: skip
        self.note(f"{shape.key}: first {seconds[0]:.2f} s, steady {steady:.2f} s")

    async def lose_weights(self, pool: SubprocessPool, host: ProcessHost) -> None:
        """SIGKILL the weights process in the middle of a job: the job must still be answered with the same video."""
        shape = self.menu.shapes[0]
        expected = (await pool.generate(self.job(shape), lambda _: None)).path.read_bytes()
        killed = False

        def kill(_event: object) -> None:
            nonlocal killed
            if not killed:
                killed = True
                assert host.lender is not None
                assert host.lender._process is not None
                host.lender._process.kill()

        began = time.monotonic()
        video = await pool.generate(self.job(shape), kill)
        self.report["weights_killed"] = {
            "seconds": time.monotonic() - began,
            "same_bytes": video.path.read_bytes() == expected,
        }
        self.note(f"the weights process was killed during a job: {self.report['weights_killed']}")

    def job(self, shape: Shape) -> Job:
        menu = self.menu
        return Job(uuid.uuid4().hex, shape, PROMPT, menu.seed, menu.steps, menu.guidance, menu.fps)


def _still_starting(pool: SubprocessPool, shapes: int) -> bool:
    states = [process["state"] for process in pool.status()["processes"]]
    return states.count("ready") < shapes and "spawning" in states


def _device_used() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "no GPU"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.hot_menu", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the report and one MP4 a shape go"
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="use this checkpoint instead of writing one")
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm"), help="where it goes [%(default)s]")
    parser.add_argument("--layers", type=int, default=16, help="transformer layers [%(default)s; the real model: 48]")
    parser.add_argument("--gemma-layers", type=int, default=8, help="[%(default)s; the real model: 48]")
    parser.add_argument("--shapes", type=Path, default=ROOT / "shapes.yaml", metavar="FILE", help="menu [shapes.yaml]")
    parser.add_argument("--jobs", type=int, default=4, help="shapes that compile at once [%(default)s]")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ltx2-gpu-", dir=arguments.scratch) as scratch:
        model = arguments.model
        if model is None:
            model = Path(scratch) / "checkpoint"
            size = ["--size", "large", "--layers", str(arguments.layers), "--gemma-layers", str(arguments.gemma_layers)]
            subprocess.run([sys.executable, "-m", "ltx2_pool.tools.tiny", str(model), *size], check=True)
        run = Run(model, Menu.load(arguments.shapes), Path(scratch), arguments.out, arguments.jobs)
        run.report["layers"] = arguments.layers
        run.report["device"] = manifest.device()
        run.note("the checkpoint is there")

        async def everything() -> None:
            await run.serve(await run.compile_all())

        asyncio.run(everything())
    run.note("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
