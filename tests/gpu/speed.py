"""How fast a hot video is on this machine's GPU, against stock FastVideo, and what its time is made of.

``python -m tests.gpu.speed --out DIR`` writes a random-weight checkpoint of the real model's dimensions, then

- makes the same videos in every way of ``ltx2-benchmark compare --stock`` (:mod:`ltx2_pool.tools.bench.rivals`);
- profiles the engine: how much of the lease the device works, which kernels run, and how far the streamed decoder is
  from FastVideo's own, untiled and in float32.

speed.json is written after each part, so that a run that is cut short still reports.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ltx2_pool.tools.bench import rivals
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import CacheDirs, Shape
from tests.paths import REPOSITORY

SHAPES = ("1920x1088@121f", "768x512@121f")


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
            generator.generate(job, on_phase=lambda _phase, marks=marks: marks.append(time.perf_counter()))
            wall = time.perf_counter() - marks[0]
        events = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        busy, end = 0.0, 0.0
        for begin, stop in sorted((event.time_range.start, event.time_range.end) for event in events):
            busy += max(0.0, stop - max(begin, end))
            end = max(end, stop)
        kernels = sorted(trace.key_averages(), key=lambda event: -event.self_device_time_total)
        found: dict[str, Any] = {
            "wall_s": wall,
            "busy": busy / 1e6 / wall,
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
    smooth = torch.randn(1, channels, 3, 3, 3, device=generator._decoder._enter.weight.device)
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
        print(json.dumps({f"mp4 {shape.key}": moving_picture(shape)}), flush=True)
    quality = {"shape": decoded.key, "psnr_db": psnr, "std": spread, "decode_s": streamed}
    print(json.dumps({"decoder": quality}), flush=True)


def moving_picture(shape: Shape) -> dict[str, float]:
    """Encode a camera's slow pan over a textured scene with a ball in it: nearer to a video than noise is."""
    import numpy as np

    from ltx2_pool.model import mp4

    random = np.random.default_rng(0)
    height, width, count = shape.height, shape.width, shape.num_frames
    scene = np.zeros((height + count, width + 2 * count))
    for scale, weight in ((64, 60), (16, 25), (4, 8), (1, 2)):
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
        with mp4.Encoder(path, job, Recipe(model_path="").video) as encoder:
            encoder.frames(pictures)
            encoder.finish()
        return {"s": time.perf_counter() - began, "bytes": path.stat().st_size}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.speed", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--model", type=Path, metavar="DIR", help="use this checkpoint instead of writing one")
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm"), metavar="DIR")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--gemma-layers", type=int, default=8)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="KEY")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--parts", nargs="+", default=["pool", "profile", "stock", "pool, quantized"], metavar="PART")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=560, help="no part begins after that [%(default)s]")
    parser.add_argument("--profile", metavar="JSON", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shapes = [Shape.parse(key) for key in arguments.shapes]
    began = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"argv": sys.argv[1:], "seconds": {}, "ways": {}}

    def save(part: str, since: float) -> None:
        report["seconds"][part] = round(time.monotonic() - since, 1)
        (arguments.out / "speed.json").write_text(json.dumps(report, indent=1) + "\n")
        print(f"{time.monotonic() - began:6.1f} s: {part} took {report['seconds'][part]} s", flush=True)

    if arguments.profile:
        profile(Recipe.model_validate_json(arguments.profile), shapes, arguments.steps, arguments.scratch)
        return 0
    with tempfile.TemporaryDirectory(prefix="ltx2-speed-", dir=arguments.scratch) as scratch:
        model = arguments.model or Path(scratch) / "checkpoint"
        if arguments.model is None:
            size = ["--size", "large", "--layers", str(arguments.layers), "--gemma-layers", str(arguments.gemma_layers)]
            subprocess.run([sys.executable, "-m", "ltx2_pool.tools.tiny", str(model), *size], check=True)
            save("checkpoint", began)
        recipe = Recipe(model_path=str(model), compile=not arguments.no_compile)
        root = Path(scratch) / "cache"
        for part in arguments.parts:
            since = time.monotonic()
            left = arguments.seconds - (since - began)
            if left < 0:
                break
            try:
                if part == "profile":
                    caches = Path(scratch) / "merged"
                    for key in arguments.shapes:
                        of = CacheDirs.of(root / "pool", Shape.parse(key)).root
                        subprocess.run(["cp", "-r", f"{of}/.", str(caches)] if of.exists() else ["true"], check=True)
                        caches.mkdir(exist_ok=True)
                    command = [sys.executable, "-m", "tests.gpu.speed", "--out", str(arguments.out)]
                    command += ["--profile", recipe.model_dump_json(), "--scratch", str(caches)]
                    command += ["--shapes", *arguments.shapes, "--steps", str(arguments.steps)]
                    lines = Path(scratch) / "profile.jsonl"
                    try:
                        with lines.open("w") as file:  # a pipe would last as long as torch's compilers
                            subprocess.run(command, cwd=REPOSITORY, stdout=file, timeout=max(60.0, left), check=True)
                    finally:
                        for line in lines.read_text().splitlines():
                            if line.startswith("{"):
                                report.setdefault("profile", {}).update(json.loads(line))
                else:
                    rivals.TIMEOUT = left
                    result = rivals.run(
                        recipe, shapes, arguments.steps, arguments.repeat, root, [part], lambda _what: None
                    )
                    report["ways"].update(result["ways"])
            except Exception as error:
                if isinstance(error, rivals.RivalError):
                    report["ways"][part] = error.found
                traceback.print_exc()
                report.setdefault("errors", {})[part] = f"{type(error).__name__}: {error}"[-3000:]
            save(part, since)
        for part in arguments.parts:
            for key in arguments.shapes:
                if (ratio := rivals.ratio(report, part, key)) is not None:
                    report.setdefault("ratios", {})[f"{part} / stock, {key}"] = round(ratio, 3)
        save("all", began)
    print(json.dumps(report, indent=None))
    return len(report.get("errors", {}))


if __name__ == "__main__":
    sys.exit(main())
