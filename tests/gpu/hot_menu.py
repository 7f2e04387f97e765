"""Makes every shape of a menu hot on this machine's GPU at once, with lent weights, and reports what it took.

``python -m tests.gpu.hot_menu --out DIR`` writes a random-weight checkpoint (the real model's dimensions), compiles
every shape, starts the whole pool ahead on those caches, makes videos of every shape, and kills the weights process in
the middle of a job. report.json is written after each part, so that a run that is cut short still reports.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from ltx2_pool.processes.process import Timeouts
from ltx2_pool.processes.subprocesses import ProcessHost
from ltx2_pool.serving.book import Book
from ltx2_pool.serving.ledger import Ledger
from ltx2_pool.serving.pool import Pool
from ltx2_pool.words import device, requests
from ltx2_pool.words.menu import Menu
from ltx2_pool.words.protocol import Ready
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import Key, Shape
from tests.gpu.bake_and_verify import machine
from tests.paths import REPOSITORY

PROMPT = "a paper lantern drifts over still water at dusk"
ASKED = ("768x512@121f", "1920x1088@121f")
"""Shapes that are measured more often than the others."""
TIMEOUTS = Timeouts(spawn=240, weights=240, generation=120, cancel=10, term=10)


class Run:
    """The parts of one run, in order; each adds to `report`."""

    def __init__(
        self, model: Path, menu: Menu, work: Path, out: Path, jobs: int, with_forks: bool, caches: Path | None = None
    ) -> None:
        self.recipe = Recipe(model_path=str(model))
        self.device = device.visible()[0]
        self.menu = menu
        self.caches = caches or work / "cache"
        self.scratch = work / "scratch"
        self.videos = work / "videos"
        self.videos.mkdir(parents=True)
        self.out = out
        self.jobs = jobs
        self.with_forks = with_forks
        self.began = time.monotonic()
        self.report: dict[str, Any] = {"machine": machine(), "shapes": {s.key: {} for s in menu.shapes}}

    def note(self, what: str) -> None:
        """Say what is done, and save what is known."""
        print(f"{time.monotonic() - self.began:7.1f} s  {what}", flush=True)
        (self.out / "report.json").write_text(json.dumps(self.report, indent=1) + "\n")

    def host(self) -> ProcessHost:
        devices = (self.device.id,)
        return ProcessHost(self.recipe, self.caches, self.scratch, TIMEOUTS, offers=self.menu.offers, devices=devices)

    async def compile_all(self) -> dict[Shape, Ready]:
        """A warm-up in a fresh process for each shape, some at a time: fills the caches and measures the memory."""
        host = self.host()
        await host.start()
        slots = asyncio.Semaphore(self.jobs)
        readies: dict[Shape, Ready] = {}

        async def one(shape: Shape) -> None:
            async with slots:
                process = host.process(Key(shape))
                try:
                    videos = requests.warm_up(self.menu, self.menu.offer(Key(shape)))
                    readies[shape] = await host.start_process(process, videos)
                finally:
                    process.kill()
                    await process.exited()
                self.report["shapes"][shape.key]["cold"] = readies[shape].model_dump()
                self.note(f"{shape.key} compiled ({self.jobs} at a time)")

        try:
            began = time.monotonic()
            await host.prepare()
            lending = host.lending(self.device.id)
            assert lending is not None
            self.report["weights"] = {**lending.model_dump(), "with_zygote_s": time.monotonic() - began}
            self.note("zygote and weights process are ready")
            await asyncio.gather(*map(one, self.menu.shapes))
            if self.with_forks:
                await self.forks(host)
        finally:
            await host.close()
        return readies

    async def forks(self, host: ProcessHost) -> None:
        """Fork to READY without a warm-up, then the first customer's video on the baked cache, and the next."""
        shape = self.menu.shapes[0]
        self.report["forks"] = []
        for _ in range(3):
            process = host.process(Key(shape))
            began = time.monotonic()
            ready = await host.start_process(process)
            videos_s: list[float] = []
            entry = {"fork_to_ready_s": time.monotonic() - began, "attach_s": ready.load_s, "videos_s": videos_s}
            for _ in range(3):
                job = self.job(shape)
                output = self.videos / f"{job.id}.mp4"
                output.touch()
                began = time.monotonic()
                await process.generate(job, output, lambda _: None)
                videos_s.append(time.monotonic() - began)
            process.kill()
            await process.exited()
            self.report["forks"].append(entry)
        self.note("forked three times without a warm-up")

    async def serve(self, readies: dict[Shape, Ready]) -> None:
        """The pool as a worker has it: every shape started ahead, K by memory."""
        here, host = self.device, self.host()
        keys = [Key(shape) for shape in self.menu.shapes]
        ledger = Ledger({here.id: None})
        for shape, ready in readies.items():
            ledger.observe(Key(shape), ready.memory)
        pool = Pool(
            host,
            Book(ledger, keys=keys, ahead=keys),
            self.videos,
            devices=(here,),
            memory_reserve=4 << 30,
            warm_up=lambda key: requests.warm_up(self.menu, self.menu.offer(key)),
            ready_min=1,
        )
        cached = self.cached()
        try:
            began = time.monotonic()
            await pool.start()
            self.report["first_shape_hot_s"] = time.monotonic() - began
            while _still_starting(pool, len(self.menu.shapes)):  # noqa: ASYNC110 - the state of many objects
                await asyncio.sleep(0.1)
            self.report["all_hot_s"] = time.monotonic() - began
            self.report["hot"] = [p["shape"] for p in pool.status()["processes"] if p["state"] == "ready"]
            self.note(f"{len(self.report['hot'])} of {len(self.menu.shapes)} shapes are hot at once")
            assert host.weights
            before = await host.weights[self.device.id].checksum()
            for shape in self.menu.shapes:
                if shape.key in self.report["hot"]:
                    await self.videos_of(pool, shape)
            self.report["device_free"] = here.free()
            self.report["weights_unchanged"] = await host.weights[self.device.id].checksum() == before
            self.report["status"] = pool.status()
            self.note(f"weights unchanged: {self.report['weights_unchanged']}; free: {here.free() >> 20} MiB")
            await self.beside_a_spawn(pool)
            await self.lose_weights(pool, host)
            self.report["new_cache_files"] = sorted(map(str, self.cached() - cached))
            self.note(f"{len(self.report['new_cache_files'])} new files in the compile caches since they were filled")
        finally:
            await pool.close()

    async def videos_of(self, pool: Pool, shape: Shape) -> None:
        seconds, digests = [], set()
        for _ in range(4 if shape.key in ASKED else 2):
            began = time.monotonic()
            video = await pool.generate(self.job(shape), lambda _: None)
            seconds.append(time.monotonic() - began)
            data = video.path.read_bytes()
            digests.add(hashlib.sha256(data).hexdigest())
        (self.out / f"{shape.key}.mp4").write_bytes(data)
        (memory,) = (p["memory"] for p in pool.status()["processes"] if p["shape"] == shape.key)
        steady = statistics.median(seconds[1:])
        self.report["shapes"][shape.key] |= {
            "first_s": seconds[0],
            "steady_s": steady,
            "seconds": seconds,
            "first_over_steady": seconds[0] / steady,
            "sha256": sorted(digests),
            "memory": memory,
            "phases": video.phases,
        }
        self.note(f"{shape.key}: first {seconds[0]:.2f} s, steady {steady:.2f} s")

    async def beside_a_spawn(self, pool: Pool) -> None:
        """Kill one shape's process; videos of another until it is back, which makes the same bytes as before."""
        hot, other = (Shape.parse(key) for key in ASKED)
        os.kill(self.pid(pool, other), signal.SIGKILL)
        began = time.monotonic()
        seconds: list[float] = []
        while not seconds or not _ready(pool, other):
            since = time.monotonic()
            await pool.generate(self.job(hot), lambda _: None)
            seconds.append(time.monotonic() - since)
        back = time.monotonic() - began
        steady = self.report["shapes"][hot.key]["steady_s"]
        again = hashlib.sha256((await pool.generate(self.job(other), lambda _: None)).path.read_bytes()).hexdigest()
        self.report["beside_a_spawn"] = {
            "hot": hot.key,
            "spawned": other.key,
            "seconds": seconds,
            "back_s": back,
            "median_over_steady": statistics.median(seconds) / steady,
            "same_bytes": [again] == self.report["shapes"][other.key]["sha256"],
        }
        self.note(f"beside a spawn: {self.report['beside_a_spawn']}")

    async def lose_weights(self, pool: Pool, host: ProcessHost) -> None:
        """SIGKILL the weights process in the middle of a job: that is answered with the same video, and processes can
        be started again."""
        shape = Shape.parse(ASKED[0])
        killed = 0.0

        def kill(_event: object) -> None:
            nonlocal killed
            if not killed:
                killed = time.monotonic()
                weights = host.pids["weights"]
                assert weights is not None
                os.kill(weights, signal.SIGKILL)

        before, began = self.pid(pool, shape), time.monotonic()
        video = await pool.generate(self.job(shape), kill)
        found = {
            "seconds": time.monotonic() - began,
            "same_bytes": [hashlib.sha256(video.path.read_bytes()).hexdigest()]
            == self.report["shapes"][shape.key]["sha256"],
            "same_process": self.pid(pool, shape) == before,
        }
        self.report["weights_killed"] = found
        assert host.weights
        await host.weights[self.device.id].checksum()
        found["weights_again_s"] = time.monotonic() - killed
        since = time.monotonic()
        os.kill(before, signal.SIGKILL)
        while self.pid(pool, shape) == before or not _ready(pool, shape):  # noqa: ASYNC110 - the state of many objects
            await asyncio.sleep(0.05)
        found["shape_started_on_them_s"] = time.monotonic() - since
        self.note(f"the weights process was killed during a job: {found}")

    def pid(self, pool: Pool, shape: Shape) -> int:
        """Of the shape's process; 0 while there is none."""
        return next((int(p["pid"] or 0) for p in pool.status()["processes"] if p["shape"] == shape.key), 0)

    def cached(self) -> set[Path]:
        return {path for path in self.caches.rglob("*") if path.is_file()}

    def job(self, shape: Shape) -> Job:
        menu = self.menu
        return Job(uuid.uuid4().hex, shape, PROMPT, menu.seed, menu.steps, menu.guidance, menu.fps)


def _ready(pool: Pool, shape: Shape) -> bool:
    return any(p["shape"] == shape.key and p["state"] == "ready" for p in pool.status()["processes"])


def _still_starting(pool: Pool, shapes: int) -> bool:
    states = [process["state"] for process in pool.status()["processes"]]
    return states.count("ready") < shapes and not {"loading", "spawning"}.isdisjoint(states)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.hot_menu", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the report and one MP4 a shape go"
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="use this checkpoint instead of writing one")
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm"), help="where it goes [%(default)s]")
    parser.add_argument("--layers", type=int, default=16, help="transformer layers [%(default)s; the real model: 48]")
    parser.add_argument("--gemma-layers", type=int, default=8, help="[%(default)s; the real model: 48]")
    parser.add_argument(
        "--shapes", type=Path, default=REPOSITORY / "shapes.yaml", metavar="FILE", help="menu [shapes.yaml]"
    )
    parser.add_argument("--jobs", type=int, default=4, help="shapes that compile at once [%(default)s]")
    parser.add_argument("--cache-root", type=Path, metavar="DIR", help="use the compile caches that are there")
    parser.add_argument("--forks", action="store_true", help="measure three starts without a warm-up as well")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ltx2-gpu-", dir=arguments.scratch) as scratch:
        model = arguments.model
        if model is None:
            model = Path(scratch) / "checkpoint"
            size = ["--size", "large", "--layers", str(arguments.layers), "--gemma-layers", str(arguments.gemma_layers)]
            subprocess.run([sys.executable, "-m", "ltx2_pool.tools.tiny", str(model), *size], check=True)
        run = Run(
            model,
            Menu.load(arguments.shapes),
            Path(scratch),
            arguments.out,
            arguments.jobs,
            arguments.forks,
            arguments.cache_root,
        )
        run.report["layers"] = arguments.layers
        run.report["device"] = run.device.name
        run.note("the checkpoint is there")

        async def everything() -> None:
            await run.serve(await run.compile_all())

        asyncio.run(everything())
    run.note("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
