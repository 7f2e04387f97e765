"""``ltx2-benchmark compare --stock``: FastVideo's own generator, and this project's ways to run it, on one checkpoint.

Each way runs in a process of its own, one after the other on the same device, and makes the same videos:

- *stock*: FastVideo's ``VideoGenerator`` with its own executor, compiled, and no file written;
- *in-process*: the engine of ``LTX2_POOL_MODE=0``;
- *pool*: a shape process that borrows its weights; and the same with ``--enable-optimizations``.

All of ours end with the MP4 in a file. On a CPU, for which FastVideo's executor is unfinished, stock runs in ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ltx2_pool.processes.process import Timeouts
from ltx2_pool.processes.subprocesses import ProcessHost
from ltx2_pool.words.outcomes import ProcessLost
from ltx2_pool.words.protocol import Done
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import CacheDirs, Key, Shape

WAYS = ("stock", "in-process", "pool", "pool, quantized")
PROMPT = "a red fox runs through fresh snow at dawn"
TIMEOUT = 1800.0
"""Seconds for one way."""


class RivalError(Exception):
    """One of the ways could not make its videos. The message ends with what its process printed."""

    def __init__(self, message: str, found: dict[str, Any]) -> None:
        super().__init__(message)
        self.found = found
        """What it had measured until then."""


def run(
    recipe: Recipe,
    shapes: Sequence[Shape],
    steps: int,
    repeat: int,
    cache_root: Path,
    ways: Sequence[str],
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """The figures of every way, by shape. Raises RivalError."""
    found: dict[str, Any] = {}
    for way in ways:
        tell(f"{way}: starting")
        found[way] = _apart(way, recipe, shapes, steps, repeat, cache_root, tell)
    return {"shapes": [shape.key for shape in shapes], "steps": steps, "repeat": repeat, "ways": found}


def _apart(
    way: str,
    recipe: Recipe,
    shapes: Sequence[Shape],
    steps: int,
    repeat: int,
    cache_root: Path,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    asked = {
        "way": way,
        "recipe": recipe.model_dump(),
        "shapes": [shape.key for shape in shapes],
        "steps": steps,
        "repeat": repeat,
        "cache_root": str(cache_root),
    }
    command = [sys.executable, "-m", "ltx2_pool.tools.bench.rivals", json.dumps(asked)]
    found: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        assert process.stdout is not None
        overdue = threading.Timer(TIMEOUT, process.kill)
        overdue.start()
        try:
            for line in process.stdout:
                if not line.startswith(_MARK):
                    continue
                what, value = json.loads(line.removeprefix(_MARK))
                if what == "done":  # what it has started, torch's compilers for one, may keep the pipe for longer
                    return found
                if what == "doing":
                    tell(f"{way}: {value}")
                else:
                    found.setdefault(what, {}).update(value)
            log.seek(0)
            raise RivalError(f"{way} ended with status {process.wait()}:\n{log.read()[-3000:]}", found)
        finally:
            overdue.cancel()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)


_MARK = "@rival "


def _say(what: str, value: object) -> None:
    print(f"{_MARK}{json.dumps([what, value])}", flush=True)


def main() -> None:
    """One way, in this process."""
    asked = json.loads(sys.argv[1])
    recipe, shapes = Recipe(**asked["recipe"]), [Shape.parse(key) for key in asked["shapes"]]
    jobs = [Job(f"{shape.key}", shape, PROMPT, 7, asked["steps"], 1.0, 24) for shape in shapes]
    root = Path(asked["cache_root"])
    if asked["way"] == "stock":
        _measure(_stock(recipe, root), jobs, asked["repeat"])
    elif asked["way"] == "in-process":
        _measure(_in_process(recipe, root), jobs, asked["repeat"])
    else:
        if asked["way"] == "pool, quantized":
            recipe = recipe.model_copy(update={"quantization": "auto"})
        asyncio.run(_pool(recipe, jobs, asked["repeat"], root / asked["way"].replace(", ", "-")))
    _say("done", {})


Make = Callable[[Job], dict[str, float]]
"""Make one video; returns the seconds of what it consists of, as far as they are known."""


def _measure(makes: Iterator[Make], jobs: Sequence[Job], repeat: int) -> None:
    began = time.monotonic()
    _say("doing", "loading")
    make = next(makes)
    _say("load", {"s": time.monotonic() - began})
    for job in jobs:
        _say("doing", job.shape.key)
        began = time.monotonic()
        make(job)
        first = time.monotonic() - began
        steady, parts = [], []
        for _ in range(repeat):
            began = time.monotonic()
            parts.append(make(job))
            steady.append(time.monotonic() - began)
        _say(job.shape.key, {"first_s": first, "steady_s": steady, "parts": _medians(parts)})


def _stock(recipe: Recipe, root: Path) -> Iterator[Make]:
    from fastvideo.api import schema

    cache = CacheDirs(root / "stock")
    os.environ.update(recipe.environment(cache))
    import torch
    from fastvideo import VideoGenerator

    config = schema.GeneratorConfig(
        model_path=recipe.model_path,
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

    def make(job: Job) -> dict[str, float]:
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
    generator.shutdown()


def _in_process(recipe: Recipe, root: Path) -> Iterator[Make]:
    os.environ.update(recipe.environment(CacheDirs(root / "in-process")))
    from ltx2_pool.model import engine, mp4

    generator = engine.build_generator(recipe)
    with tempfile.TemporaryDirectory(prefix="ltx2-rivals-") as scratch:

        def make(job: Job) -> dict[str, float]:
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


async def _pool(recipe: Recipe, jobs: Sequence[Job], repeat: int, root: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="ltx2-rivals-") as scratch:
        host = ProcessHost(recipe, root, Path(scratch), Timeouts(spawn=900, weights=900, silence=300))
        await host.start()
        try:
            _say("doing", "loading")
            began = time.monotonic()
            await host.prepare()
            _say("load", {"s": time.monotonic() - began})
            for job in jobs:
                _say("doing", f"{job.shape.key}: starting")
                process = host.process(Key(job.shape))
                output = Path(scratch) / "video.mp4"
                try:
                    began = time.monotonic()
                    ready = await host.start_process(process, Job(**{**vars(job), "id": "warm-up"}))
                    ready_s = time.monotonic() - began
                    seconds: list[float] = []
                    made: list[Done] = []
                    for number in range(repeat + 1):
                        _say("doing", f"{job.shape.key}: video {number + 1}")
                        output.unlink(missing_ok=True)
                        output.touch(0o600)
                        began = time.monotonic()
                        made.append(await process.generate(job, output, lambda _event: None))
                        seconds.append(time.monotonic() - began)
                finally:
                    process.kill()
                    await process.exited()
                figures = {
                    "ready_s": ready_s,
                    "trace_s": ready.trace_s,
                    "first_s": seconds[0],
                    "steady_s": seconds[1:],
                    "parts": _medians([done.phases for done in made[1:]]),
                    "bytes_at_most": max(done.memory.peak for done in made),
                    "bytes_between_jobs": made[-1].memory.resident,
                    "mp4_bytes": output.stat().st_size,
                }
                _say(job.shape.key, figures)
        except ProcessLost as lost:
            sys.exit(str(lost))
        finally:
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
