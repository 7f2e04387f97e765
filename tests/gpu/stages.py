"""One stage against two, and text against a picture, in one run: what each takes on this machine's device.

``python -m tests.gpu.stages --model DIR --out DIR`` starts one process for each way with lent weights, makes it hot,
and makes videos in turn: from text in one stage, from a picture in one stage, both in two stages, and with three steps
in the second. report.json has every video, its phases and the processes' memory; report.md the medians. Works with a
tiny checkpoint on a CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from ltx2_pool.caches import bake
from ltx2_pool.processes.process import Timeouts
from ltx2_pool.processes.subprocesses import ProcessHost
from ltx2_pool.words.menu import Menu, Offer
from ltx2_pool.words.pictures import Picture
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job, warm_up
from ltx2_pool.words.shapes import Shape
from tests.gpu.bake_and_verify import machine

TIMEOUTS = Timeouts(spawn=400, weights=300, generation=200, silence=120)
PICTURE = (Picture("the bake's"),)


async def measure(model: Path, shape: Shape, steps: int, repeat: int, out: Path, work: Path) -> dict[str, Any]:
    """The report; it is written after each part as well."""
    one, two = Offer(shape), Offer(shape, variant="two-stages", refine=2)
    menu = Menu("ltx2", (one, two), steps=steps)
    host = ProcessHost(Recipe(model_path=str(model)), work / "cache", work / "scratch", TIMEOUTS, offers=menu.offers)
    report: dict[str, Any] = {"machine": machine(), "shape": shape.key, "steps": steps, "start": {}, "videos": {}}
    began = time.monotonic()

    def note(what: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {what}", flush=True)
        (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")

    videos = work / "videos"
    videos.mkdir()  # before a process is confined to what is there
    await host.start()
    processes: dict[Any, Any] = {}
    try:
        await host.prepare()
        note("the weights are lent")
        for offer in menu.offers:
            process = processes[offer.key] = host.process(offer.key)
            ready = await host.start_process(process, warm_up(menu, offer))
            report["start"][str(offer.key)] = ready.model_dump()
            note(f"{offer.key} is hot: {ready.trace_s:.1f} s of compiling, {ready.memory.resident / 1e9:.2f} GB")
        text = Job("", shape, bake.PROMPT, 42, steps, 1.0, 24)
        in_two = dataclasses.replace(text, variant=two.variant, refine=2)
        ways = {
            "text, one stage": text,
            "picture, one stage": dataclasses.replace(text, pictures=PICTURE),
            "text, two stages": in_two,
            "picture, two stages": dataclasses.replace(in_two, pictures=PICTURE),
            "text, two stages, three steps": dataclasses.replace(in_two, refine=3),
        }
        for number in range(repeat):
            for way, job in ways.items():
                made = await _video(processes[job.key], job, menu.offer(job.key), videos)
                report["videos"].setdefault(way, []).append(made)
            note(f"video {number + 1} of {repeat} each way")
    finally:
        for process in processes.values():
            process.kill()
            await process.exited()
        await host.close()
    report["medians"] = {way: statistics.median(v["seconds"] for v in made) for way, made in report["videos"].items()}
    note("done")
    return report


async def _video(process: Any, job: Job, offer: Offer, videos: Path) -> dict[str, Any]:
    job = dataclasses.replace(job, id=uuid.uuid4().hex)
    output = videos / f"{job.id}.mp4"
    output.touch(0o600)
    pixels = [bake.picture(offer.picture_sizes)] if job.pictures else []
    began = time.monotonic()
    try:
        done = await process.generate(job, output, lambda _event: None, pixels)
    finally:
        for descriptor in pixels:
            os.close(descriptor)
        output.unlink()
    seconds = time.monotonic() - began
    misses = done.compiled.misses + done.compiled.graph_hits
    return {"seconds": seconds, "phases": done.phases, "memory": done.memory.model_dump(), "compiled": misses}


def table(report: dict[str, Any]) -> str:
    """The medians in Markdown."""
    base = report["medians"]["text, one stage"]
    lines = [
        f"{report['machine']['device']}, {report['shape']}, {report['steps']} steps, {report['machine']['date']}",
        "",
        "| way | seconds | of text in one stage | text | denoise | refine | decode | encode | resident GB | peak GB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for way, median in report["medians"].items():
        videos = report["videos"][way]
        phases = {
            name: statistics.median(v["phases"].get(name, 0.0) for v in videos)
            for name in ("text", "denoise", "refine", "decode", "encode")
        }
        memory = videos[-1]["memory"]
        peak = max(v["memory"]["peak"] for v in videos)
        parts = " | ".join(f"{seconds:.2f}" for seconds in phases.values())
        resident = memory["resident"] / 1e9
        lines.append(f"| {way} | {median:.2f} | {median / base:.3f} | {parts} | {resident:.2f} | {peak / 1e9:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.stages", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a checkpoint with an upsampler")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the reports go")
    parser.add_argument("--shape", type=Shape.parse, default="1920x1088@121", metavar="KEY", help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=5, help="of the first stage [%(default)s]")
    parser.add_argument("--repeat", type=int, default=5, help="videos each way [%(default)s]")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ltx2-stages-") as work:
        report = asyncio.run(
            measure(arguments.model, arguments.shape, arguments.steps, arguments.repeat, arguments.out, Path(work))
        )
    (arguments.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.out / "report.md").write_text(table(report))
    print(table(report))
    return 0 if not any(v["compiled"] for made in report["videos"].values() for v in made) else 1


if __name__ == "__main__":
    sys.exit(main())
