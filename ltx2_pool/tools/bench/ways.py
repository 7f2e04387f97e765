"""One way of ``compare --stock`` to make videos, in this process: what :mod:`ltx2_pool.tools.bench.rivals` starts."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

from ltx2_pool.processes.host import Process
from ltx2_pool.processes.process import Timeouts
from ltx2_pool.processes.subprocesses import ProcessHost
from ltx2_pool.tools.bench import rivals
from ltx2_pool.words.outcomes import ProcessLost
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import CacheDirs, Key, Shape


def _say(what: str, value: object) -> None:
    print(f"{rivals.MARK}{json.dumps([what, value])}", flush=True)


def main() -> None:
    """One way, in this process."""
    asked = json.loads(sys.argv[1])
    recipe, shapes = Recipe(**asked["recipe"]), [Shape.parse(key) for key in asked["shapes"]]
    jobs = [Job(f"{shape.key}", shape, rivals.PROMPT, rivals.SEED, asked["steps"], 1.0, 24) for shape in shapes]
    root = Path(asked["cache_root"])
    if asked["way"] == "pool, quantized":
        recipe = recipe.model_copy(update={"quantization": "auto"})
    way = {"stock": _stock, "in-process": _in_process}.get(asked["way"], _pool)
    asyncio.run(_measure(way(recipe, rivals.cache(root, asked["way"])), jobs, asked["repeat"]))


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


STAGES = {
    "input_validation_stage": "text",
    "prompt_encoding_stage": "text",
    "latent_preparation_stage": "denoise",
    "denoising_stage": "denoise",
    "audio_decoding_stage": "decode",
    "decoding_stage": "decode",
    "PostDecodeFrameProcessStage": "decode",
}
"""FastVideo's stages (pipelines/basic/ltx2/ltx2_pipeline.py, and the last one entrypoints/video_generator.py), as the
phases of our engine."""


@contextlib.asynccontextmanager
async def _stock(recipe: Recipe, root: Path) -> AsyncIterator[Make]:
    from fastvideo.api import schema

    os.environ.update(recipe.environment(CacheDirs(root)), FASTVIDEO_STAGE_LOGGING="1")
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
        # In one stage, as the others: a checkpoint may ask for two (model_index.json: fastvideo_refine_enabled).
        pipeline=schema.PipelineSelection(workload_type="t2v", preset_overrides={"refine": {"enabled": False}}),
    )
    if torch.cuda.is_available():
        generator = VideoGenerator.from_config(config)
    else:
        from fastvideo.api.compat import generator_config_to_fastvideo_args

        from ltx2_pool.model import engine, executor

        engine.prepare_platform()
        torch.cuda.synchronize = lambda device=None: None  # what measures the stages waits for a GPU
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
        parts = {"generation": float(result.generation_time or 0)}
        for stage, measured in (result.logging_info.stages if result.logging_info else {}).items():
            part = STAGES[stage]  # with another stage, it would be another video
            parts[part] = parts.get(part, 0.0) + float(measured["execution_time"])
        return parts

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
    processes: dict[Shape, Process] = {}
    with tempfile.TemporaryDirectory(prefix="ltx2-rivals-") as scratch:
        host = ProcessHost(recipe, root, Path(scratch), Timeouts(spawn=900, weights=900, silence=300))

        async def make(job: Job) -> dict[str, float]:
            if job.shape not in processes:
                process = host.process(Key(job.shape))
                began = time.monotonic()
                ready = await host.start_process(process, (dataclasses.replace(job, id="warm-up"),))
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


if __name__ == "__main__":
    main()
