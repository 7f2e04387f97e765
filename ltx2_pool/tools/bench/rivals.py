"""``ltx2-benchmark compare --stock``: FastVideo's own generator, and this project's ways to run it, on one checkpoint.

Each way runs in a process of its own, one after the other on the same device, and makes the same videos:

- *stock*: FastVideo's ``VideoGenerator`` with its own executor, compiled, and no file written;
- *in-process*: the engine of ``LTX2_POOL_MODE=0``;
- *pool*: a shape process that borrows its weights; and the same with ``--enable-optimizations``.

All of ours end with the MP4 in a file. On a CPU, for which FastVideo's executor is unfinished, stock runs in ours.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from ltx2_pool.processes.process import Timeouts
from ltx2_pool.processes.shape import ShapeProcess
from ltx2_pool.processes.subprocesses import ProcessHost
from ltx2_pool.words.outcomes import ProcessLost
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import CacheDirs, Key, Shape

WAYS = ("stock", "in-process", "pool", "pool, quantized")
PROMPT = "a red fox runs through fresh snow at dawn"
TIMEOUT = 1800.0
"""Seconds for one way."""


class RivalError(Exception):
    """One of the ways could not make its videos. The message ends with what its process printed."""

    found: dict[str, Any]
    """What was measured until then, as :func:`run` returns it."""


def run(
    recipe: Recipe,
    shapes: Sequence[Shape],
    steps: int,
    repeat: int,
    cache_root: Path,
    ways: Sequence[str],
    tell: Callable[[str], None],
    together: bool = False,
) -> dict[str, Any]:
    """The figures of every way, by shape. Raises RivalError, with what was found until then.

    `together`: all of them load and compile at the same time, and take turns only at what is steady. Faster, on a
    device with the memory for all; what comes before is then measured in each other's company.
    """
    result: dict[str, Any] = {"shapes": [shape.key for shape in shapes], "steps": steps, "repeat": repeat, "ways": {}}
    with contextlib.ExitStack() as stack, concurrent.futures.ThreadPoolExecutor(len(ways)) as threads:
        started: list[_Rival] = []
        try:
            for way in ways:
                asked = {
                    "way": way,
                    "recipe": recipe.model_dump(),
                    "shapes": result["shapes"],
                    "steps": steps,
                    "repeat": repeat,
                    "cache_root": str(cache_root),
                }
                started.append(stack.enter_context(_Rival(way, asked, tell)))
                if not together:
                    started[-1].read("ready")
                    started[-1].measure()
            if together:
                for _ in threads.map(lambda rival: rival.read("ready"), started):
                    pass
                for rival in started:
                    rival.measure()
        except RivalError as error:
            error.found = result
            raise
        finally:
            result["ways"] = {rival.way: rival.found for rival in started}
            stack.close()  # before the threads are waited for
    return result


class _Rival:
    """One way's process."""

    def __init__(self, way: str, asked: dict[str, Any], tell: Callable[[str], None]) -> None:
        self.way = way
        self.found: dict[str, Any] = {}
        self._tell = tell
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed when the process is
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ltx2_pool.tools.bench.rivals", json.dumps(asked)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        self._overdue = threading.Timer(TIMEOUT, self._process.kill)
        self._overdue.start()

    def __enter__(self) -> _Rival:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._overdue.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def measure(self) -> None:
        """Let it make its steady videos, now that the device is its own, and end it. Raises RivalError."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        self.read("done")
        self.__exit__()

    def read(self, until: str) -> None:
        """Take what it reports until then. Raises RivalError."""
        assert self._process.stdout is not None
        # Not to the end of the file: what it has started, torch's compilers for one, may keep the pipe for longer.
        for line in self._process.stdout:
            if not line.startswith(_MARK):
                continue
            what, value = json.loads(line.removeprefix(_MARK))
            if what == until:
                return
            if what == "doing":
                self._tell(f"{self.way}: {value}")
            else:
                self.found.setdefault(what, {}).update(value)
        status = self._process.wait()
        self._log.seek(0)
        raise RivalError(f"{self.way} ended with status {status}:\n{self._log.read()[-3000:]}")


_MARK = "@rival "


def _say(what: str, value: object) -> None:
    print(f"{_MARK}{json.dumps([what, value])}", flush=True)


def main() -> None:
    """One way, in this process."""
    asked = json.loads(sys.argv[1])
    recipe, shapes = Recipe(**asked["recipe"]), [Shape.parse(key) for key in asked["shapes"]]
    jobs = [Job(f"{shape.key}", shape, PROMPT, 7, asked["steps"], 1.0, 24) for shape in shapes]
    root = Path(asked["cache_root"])
    if asked["way"] == "pool, quantized":
        recipe = recipe.model_copy(update={"quantization": "auto"})
    way = {"stock": _stock, "in-process": _in_process}.get(asked["way"], _pool)
    asyncio.run(_measure(way(recipe, root / asked["way"].replace(", ", "-")), jobs, asked["repeat"]))


Make = Callable[[Job], Awaitable[dict[str, float]]]
"""Make one video; returns the seconds of what it consists of, as far as they are known."""


async def _measure(way: contextlib.AbstractAsyncContextManager[Make], jobs: Sequence[Job], repeat: int) -> None:
    began = time.monotonic()
    _say("doing", "loading")
    async with way as make:
        _say("load", {"s": time.monotonic() - began})
        for job in jobs:
            _say("doing", f"{job.shape.key}: the first video")
            began = time.monotonic()
            await make(job)
            _say(job.shape.key, {"first_s": time.monotonic() - began})
        _say("ready", {})
        sys.stdin.readline()
        for job in jobs:
            steady, parts = [], []
            for number in range(repeat):
                _say("doing", f"{job.shape.key}: video {number + 1} of {repeat}")
                began = time.monotonic()
                parts.append(await make(job))
                steady.append(time.monotonic() - began)
            _say(job.shape.key, {"steady_s": steady, "parts": _medians(parts)})
        _say("done", {})


@contextlib.asynccontextmanager
async def _stock(recipe: Recipe, root: Path) -> AsyncIterator[Make]:
    from fastvideo.api import schema

    os.environ.update(recipe.environment(CacheDirs(root)))
    import torch
    from fastvideo import VideoGenerator

    config = schema.GeneratorConfig(
        model_path=str(_distilled(recipe.model_path, root)),
        engine=schema.EngineConfig(
            num_gpus=1,
            offload=schema.OffloadConfig(
                dit=False, dit_layerwise=False, text_encoder=False, image_encoder=False, vae=False, pin_cpu_memory=False
            ),
            compile=schema.CompileConfig(enabled=recipe.compile, backend="inductor", dynamic=False),
        ),
        pipeline=schema.PipelineSelection(workload_type="t2v"),
    )
    if torch.cuda.is_available():
        generator = VideoGenerator.from_config(config)
    else:
        from fastvideo.api.compat import generator_config_to_fastvideo_args

        from ltx2_pool.model import engine, executor

        engine.prepare_platform()
        generator = VideoGenerator(
            generator_config_to_fastvideo_args(config), executor.InProcessExecutor, log_stats=False
        )

    async def make(job: Job) -> dict[str, float]:
        result = generator.generate(
            schema.GenerationRequest(
                prompt=job.prompt,
                negative_prompt="",
                sampling=schema.SamplingConfig(
                    width=job.shape.width,
                    height=job.shape.height,
                    num_frames=job.shape.num_frames,
                    fps=job.fps,
                    num_inference_steps=job.steps,
                    guidance_scale=job.guidance,
                    seed=job.seed,
                ),
                output=schema.OutputConfig(save_video=False, return_frames=False),
            )
        )
        return {"generation": float(result.generation_time or 0)}

    yield make


def _distilled(model: str, root: Path) -> Path:
    """The checkpoint under a name by which FastVideo knows that a step is one pass through the transformer.

    It decides by the directory: without "distilled", four passes are the default (registry.py,
    pipelines/basic/ltx2/presets.py). All others here make one.
    """
    root.mkdir(parents=True, exist_ok=True)
    link = root / "LTX2-Distilled"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(model).resolve())
    return link


@contextlib.asynccontextmanager
async def _in_process(recipe: Recipe, root: Path) -> AsyncIterator[Make]:
    os.environ.update(recipe.environment(CacheDirs(root)))
    from ltx2_pool.model import engine, mp4

    generator = engine.build_generator(recipe)
    with tempfile.TemporaryDirectory(prefix="ltx2-rivals-") as scratch:

        async def make(job: Job) -> dict[str, float]:
            phases: list[tuple[str, float]] = []

            def enter(phase: str) -> None:
                phases.append((phase, time.monotonic()))

            with mp4.Encoder(Path(scratch) / "video.mp4", job, recipe.video) as encoder:
                generator.generate(job, encoder, enter)
                enter("encode")
                encoder.finish()
            enter("")
            return {name: after - begin for (name, begin), (_, after) in itertools.pairwise(phases)}

        yield make


@contextlib.asynccontextmanager
async def _pool(recipe: Recipe, root: Path) -> AsyncIterator[Make]:
    processes: dict[Shape, ShapeProcess] = {}
    with tempfile.TemporaryDirectory(prefix="ltx2-rivals-") as scratch:
        host = ProcessHost(recipe, root, Path(scratch), Timeouts(spawn=900, weights=900, silence=300))

        async def make(job: Job) -> dict[str, float]:
            if job.shape not in processes:
                process = host.process(Key(job.shape))
                began = time.monotonic()
                ready = await host.start_process(process, dataclasses.replace(job, id="warm-up"))
                _say(job.shape.key, {"ready_s": time.monotonic() - began, "trace_s": ready.trace_s})
                processes[job.shape] = process
                await video(job, "first_hot_s")
            return await video(job, "last_hot_s")

        async def video(job: Job, name: str) -> dict[str, float]:
            output = Path(scratch) / "video.mp4"
            output.unlink(missing_ok=True)
            output.touch(0o600)
            began = time.monotonic()
            done = await processes[job.shape].generate(job, output, lambda _event: None)
            figures = {name: time.monotonic() - began, "mp4_bytes": output.stat().st_size}
            _say(job.shape.key, {**figures, **{f"bytes_{k}": v for k, v in done.memory.model_dump().items()}})
            return dict(done.phases)

        try:
            await host.start()
            await host.prepare()
            yield make
        except ProcessLost as lost:
            sys.exit(str(lost))
        finally:
            for process in processes.values():
                process.kill()
                await process.exited()
            await host.close()


def _medians(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(part[name] for part in parts) for name in (parts[0] if parts else ())}


def ratio(result: dict[str, Any], way: str, shape: str, baseline: str = "stock") -> float | None:
    """Median steady seconds of a way over those of another; None where one of them was not measured."""
    try:
        a, b = (statistics.median(result["ways"][name][shape]["steady_s"]) for name in (way, baseline))
    except KeyError:
        return None
    return float(a / b)


if __name__ == "__main__":
    main()
