"""How fast a hot video is on this machine's GPU, against stock FastVideo, and what its time is made of.

``python -m tests.gpu.speed --out DIR`` writes a random-weight checkpoint of the real model's dimensions, then

- makes the same videos in every way of ``ltx2-benchmark compare --stock`` (:mod:`ltx2_pool.tools.bench.rivals`);
- profiles the engine: how much of the lease the device works, which kernels run, and how far the streamed decoder is
  from FastVideo's own, untiled and in float32;
- compares latents and frames of the quantized transformer with those in bfloat16.

speed.json is written after each part, so that a run that is cut short still reports.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ltx2_pool.tools.bench import rivals
from ltx2_pool.words.recipe import Recipe, VideoPreset, VideoSettings
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import CacheDirs, Key, Shape
from tests.gpu.bake_and_verify import machine
from tests.paths import REPOSITORY

PARTS = ("rivals", "profile", "precision")
SHAPES = ("1920x1088@121f", "768x512@121f")


def _mark(marks: list[float], _phase: str) -> None:
    marks.append(time.perf_counter())


def profile(recipe: Recipe, shapes: Sequence[Shape], steps: int, cache_root: Path) -> None:
    """Print one JSON line for each shape. In a process of its own."""
    os.environ.update(recipe.environment(CacheDirs(cache_root)))
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from ltx2_pool.model import decoder, engine

    generator = engine.build_generator(recipe)
    for shape in shapes:
        job = Job("profile", shape, rivals.PROMPT, 7, steps, 1.0, 24)
        for _ in range(2):
            generator.generate(job)
        if not torch.cuda.is_available():
            continue
        marks: list[float] = []
        with profiler(activities=[ProfilerActivity.CUDA], acc_events=True) as trace:
            generator.generate(job, on_phase=functools.partial(_mark, marks))
            wall = time.perf_counter() - marks[0]
        walls = []
        for _ in range(5):
            marks.clear()
            generator.generate(job, on_phase=functools.partial(_mark, marks))
            walls.append(time.perf_counter() - marks[0])
        events = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        spans = sorted((event.time_range.start, event.time_range.end, event.name[:60]) for event in events)
        busy, (first, end, last) = 0.0, (spans[0][0], spans[0][0], "")
        gaps: list[tuple[float, float, str, str]] = []
        for begin, stop, name in spans:
            if begin > end:
                gaps.append((round((begin - end) / 1e3, 2), round((end - first) / 1e3), last, name))
            busy += max(0.0, stop - max(begin, end))
            end, last = (stop, name) if stop > end else (end, last)
        kernels = sorted(trace.key_averages(), key=lambda event: -event.self_device_time_total)
        found: dict[str, Any] = {
            "traced_wall_s": wall,
            "wall_s": statistics.median(walls),
            "busy_s": busy / 1e6,
            "busy": busy / 1e6 / statistics.median(walls),
            "gaps_ms_at_ms": sorted(gaps, reverse=True)[:12],
            "idle_ms_each_50_ms": [
                round(sum(length for length, at, *_ in gaps if at // 50 == part), 1)
                for part in range(int((end - first) / 50e3) + 1)
            ],
            "kernels": [[e.key[:90], e.count, round(e.self_device_time_total / 1e3, 1)] for e in kernels[:25]],
        }
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        generator.generate(job)
        found["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
        print(json.dumps({shape.key: found}), flush=True)
    decoded = min(shapes, key=lambda shape: shape.width * shape.height)
    vae = generator.modules["vae"]
    channels = vae.config["vae"].get("latent_channels", 128)
    torch.manual_seed(0)
    size = ((decoded.num_frames - 1) // 8 + 1, decoded.height // 32, decoded.width // 32)
    smooth = torch.randn(1, channels, 3, 3, 3, device=next(vae.parameters()).device)
    latents = torch.nn.functional.interpolate(smooth, size=size, mode="trilinear", align_corners=True).bfloat16()
    with torch.no_grad():
        ours = torch.cat([part.cpu() for part in generator._frames(latents)]).float()
        began = time.perf_counter()
        for _ in generator._frames(latents):
            pass
        engine._synchronize()
        streamed = time.perf_counter() - began
        vae.decoder.float()
        theirs = decoder.planes(vae.decoder(latents.float())).cpu().float()
    error = float(((ours - theirs) ** 2).mean())
    psnr = 99.0 if not error else 10 * float(torch.log10(torch.tensor(255.0**2 / error)))
    spread = float(theirs.std())
    for shape in shapes:
        for preset in ("veryfast", "superfast"):
            print(json.dumps({f"mp4 {shape.key} {preset}": moving_picture(shape, preset)}), flush=True)
    quality = {"shape": decoded.key, "psnr_db": psnr, "std": spread, "decode_s": streamed}
    print(json.dumps({"decoder": quality}), flush=True)


def moving_picture(shape: Shape, preset: VideoPreset) -> dict[str, float]:
    """Encode a camera's slow pan over a textured scene with a ball in it: nearer to a video than noise is."""
    import numpy as np

    from ltx2_pool.model import mp4

    random = np.random.default_rng(0)
    height, width, count = shape.height, shape.width, shape.num_frames
    scene = np.zeros((height + count, width + 2 * count))
    for scale, weight in ((64, 60), (16, 25), (4, 8), (1, 6)):
        rough = random.standard_normal((scene.shape[0] // scale + 2, scene.shape[1] // scale + 2))
        large = np.kron(rough, np.ones((scale, scale)))
        for axis in (0, 1):  # three box filters are near a Gaussian
            for _ in range(3):
                large = (large + np.roll(large, max(1, scale // 2), axis)) / 2
        scene += weight * large[: scene.shape[0], : scene.shape[1]]
    scene = (scene + 128).clip(16, 235).astype(np.uint8)
    y, x = np.mgrid[:height, :width]
    pictures = np.full((count, height * 3 // 2, width), 128, np.uint8)
    for n in range(count):
        pictures[n, :height] = scene[n // 2 : n // 2 + height, 2 * n : 2 * n + width]
        ball = (x - width * n / count) ** 2 + (y - height / 2) ** 2 < (height / 8) ** 2
        pictures[n, :height][ball] = 200
    job = Job("mp4", shape, rivals.PROMPT, 7, 5, 1.0, 24)
    with tempfile.TemporaryDirectory(prefix="ltx2-speed-") as scratch:
        path = Path(scratch) / "video.mp4"
        began = time.perf_counter()
        with mp4.Encoder(path, job, VideoSettings(preset=preset)) as encoder:
            encoder.frames(pictures)
            encoder.finish()
        return {"s": time.perf_counter() - began, "bytes": path.stat().st_size}


def precision(recipe: Recipe, shape: Shape, steps: int) -> None:
    """Print how far a quantized transformer's latents and frames are from bfloat16's, after each step."""
    os.environ.update(recipe.environment())
    import torch

    from ltx2_pool.model import engine

    job = Job("precision", shape, rivals.PROMPT, 7, steps, 1.0, 24)
    made: dict[str, list[torch.Tensor]] = {}
    frames: dict[str, list[torch.Tensor]] = {}
    for name, chosen in (("exact", recipe), ("quantized", recipe.model_copy(update={"quantization": "auto"}))):
        generator = engine.build_generator(chosen.model_copy(update={"compile": False}))
        latents = made.setdefault(name, [])

        def note(_module: object, _args: object, given: dict[str, Any], into: list[Any] = latents) -> None:
            into.append(given["hidden_states"].float().cpu())

        decode = generator._frames

        def last(given: torch.Tensor, into: list[Any] = latents, decode: Any = decode) -> Any:
            into.append(given.float().cpu())
            return decode(given)

        generator._frames = last  # type: ignore[method-assign, assignment]
        generator.modules["transformer"].register_forward_pre_hook(note, with_kwargs=True)
        generator.generate(job)
        device = next(generator.modules["vae"].parameters()).device
        with torch.no_grad():
            frames[name] = [torch.cat([p.cpu() for p in decode(x.to(device).bfloat16())]).float() for x in latents[1:]]
        del generator, decode, last
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def psnr(a: torch.Tensor, b: torch.Tensor, peak: float) -> float:
        error = float(((a - b) ** 2).mean())
        return 99.0 if not error else round(10 * float(torch.log10(torch.tensor(peak**2 / error))), 2)

    found = {
        "shape": shape.key,
        "latents_db": [
            psnr(a, b, float(a.max() - a.min())) for a, b in zip(made["exact"][1:], made["quantized"][1:], strict=True)
        ],
        "frames_db": [psnr(a, b, 255.0) for a, b in zip(frames["exact"], frames["quantized"], strict=True)],
    }
    print(json.dumps({"precision": found}), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.speed", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keep checkpoint and caches here, and use what is there"
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="use this checkpoint instead of writing one")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--gemma-layers", type=int, default=8)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="KEY")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument(
        "--ways",
        nargs="+",
        default=["stock+pool", "pool, quantized", "in-process"],
        metavar="WAY[+WAY]",
        help="those joined by + load and compile together, and take turns after that [%(default)s]",
    )
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=560, help="no part goes on for longer [%(default)s]")
    parser.add_argument("--in-process", metavar="PART:JSON", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shapes = [Shape.parse(key) for key in arguments.shapes]
    if arguments.in_process:
        part, _, text = arguments.in_process.partition(":")
        recipe = Recipe.model_validate_json(text)
        if part == "profile":
            profile(recipe, shapes, arguments.steps, arguments.work)
        else:
            precision(recipe, shapes[-1], arguments.steps)
        os._exit(0)  # everything is printed; taking two loaded pipelines down in order takes longer than the part
    with contextlib.ExitStack() as stack:
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ltx2-speed-")))
        return Run(arguments, shapes, work).everything()


class Run:
    """All parts of one run; the report is saved after each."""

    def __init__(self, arguments: argparse.Namespace, shapes: Sequence[Shape], work: Path) -> None:
        self.arguments = arguments
        self.shapes = shapes
        self.work = work
        self.model = arguments.model or work / "checkpoint"
        self.recipe = Recipe(model_path=str(self.model), compile=not arguments.no_compile)
        self.began = time.monotonic()
        self.report: dict[str, Any] = {"argv": sys.argv[1:], "machine": machine(), "seconds": {}}

    def everything(self) -> int:
        self.arguments.out.mkdir(parents=True, exist_ok=True)
        if not self.model.exists():
            self.part("checkpoint", self.checkpoint)
        for part in self.arguments.parts:
            self.part(part, self.rivals if part == "rivals" else functools.partial(self.apart, part))
        print(json.dumps(self.report, indent=None))
        return len(self.report.get("errors", {}))

    def part(self, name: str, run: Callable[[], None]) -> None:
        since = time.monotonic()
        if self.left() > 10:
            try:
                run()
            except Exception as error:
                traceback.print_exc()
                self.report.setdefault("errors", {})[name] = f"{type(error).__name__}: {error}"[-3000:]
        self.report["seconds"][name] = round(time.monotonic() - since, 1)
        (self.arguments.out / "speed.json").write_text(json.dumps(self.report, indent=1) + "\n")
        print(f"{time.monotonic() - self.began:6.1f} s: {name} took {self.report['seconds'][name]} s", flush=True)

    def left(self) -> float:
        return float(self.arguments.seconds - (time.monotonic() - self.began))

    def checkpoint(self) -> None:
        layers, gemma_layers = str(self.arguments.layers), str(self.arguments.gemma_layers)
        size = ["--size", "large", "--layers", layers, "--gemma-layers", gemma_layers]
        subprocess.run([sys.executable, "-m", "ltx2_pool.tools.tiny", str(self.model), *size], check=True)

    def rivals(self) -> None:
        rivals.TIMEOUT = self.left()
        asked = (self.arguments.steps, self.arguments.repeat, self.work / "cache")
        videos = rivals.Videos(self.recipe, self.shapes, *asked)
        found = rivals.run(videos, [ways.split("+") for ways in self.arguments.ways], self.tell)
        for way, why in found.pop("problems").items():
            print(why, file=sys.stderr, flush=True)
            self.report.setdefault("errors", {})[way] = why[-3000:]
        self.report["rivals"] = found
        self.report["ratios"] = {
            f"{way} / stock, {shape.key}": round(ratio, 3)
            for way in found["ways"]
            for shape in self.shapes
            if way != "stock" and (ratio := rivals.ratio(found, way, shape.key)) is not None
        }

    def tell(self, what: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s: {what}", flush=True)

    def apart(self, part: str) -> None:
        """In a process of its own, on the pool's caches as far as there are any."""
        caches = self.work / "merged"
        caches.mkdir(exist_ok=True)
        for shape in self.shapes:
            of = CacheDirs.of(self.work / "cache/pool", Key(shape)).root
            if of.exists():
                subprocess.run(["cp", "-r", f"{of}/.", str(caches)], check=True)
        command = [sys.executable, "-m", "tests.gpu.speed", "--out", str(self.arguments.out), "--work", str(caches)]
        command += ["--in-process", f"{part}:{self.recipe.model_dump_json()}"]
        command += ["--shapes", *self.arguments.shapes, "--steps", str(self.arguments.steps)]
        lines = self.work / f"{part}.jsonl"
        try:
            with lines.open("w") as file:  # a pipe would last as long as torch's compilers
                subprocess.run(command, cwd=REPOSITORY, stdout=file, timeout=self.left(), check=True)
        finally:
            for line in lines.read_text().splitlines():
                if line.startswith("{"):
                    self.report.setdefault(part, {}).update(json.loads(line))


if __name__ == "__main__":
    sys.exit(main())
