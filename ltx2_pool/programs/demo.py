#!/usr/bin/env python3
"""Four videos over two shapes, through the real Dynamo frontend, from a pool of shape-pinned processes."""

from __future__ import annotations

import argparse
import base64
import contextlib
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ltx2_pool.words.extras import extra
from ltx2_pool.words.menu import Menu
from ltx2_pool.words.shapes import Shape

with extra("tools"):
    from PIL import Image
    from rich.console import Console
    from rich.table import Table

    from ltx2_pool.tools import contactsheet, stack, terminal
    from ltx2_pool.tools.bench import kinds
    from ltx2_pool.tools.drawing import clips

SHAPES = stack.TINY_MENU
PROMPTS = (
    "a red ball moves to the right over navy",
    "a yellow triangle rises over black fading into teal",
    "a white pole slides left over brown",
)
"""As ltx2_pool.tools.drawing.clips has them: what the tiny checkpoint can draw."""
PICTURED = clips.Scene("green", "triangle", "down", "grey", "grey")
"""The last video starts from the first frame of this one."""


@dataclass(frozen=True)
class Made:
    shape: Shape
    state: str
    prompt: str
    seconds: float
    data: bytes
    path: Path


class DemoError(Exception):
    """What went wrong, for a person."""


def main() -> int:
    parser = argparse.ArgumentParser(prog=Path(sys.argv[0]).name, description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where the videos go (default %(default)s)")
    parser.add_argument("--work", type=Path, default=Path(".work"), help="checkpoint and caches (default %(default)s)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything started is stopped
    console = terminal.console()
    logs = Path(tempfile.mkdtemp(prefix="ltx2-demo-"))
    try:
        _demo(console, arguments.out, arguments.work, logs)
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    except (DemoError, stack.StackError) as error:
        print(f"demo failed: {error}\n(logs: {logs})", file=sys.stderr)
        return 1
    shutil.rmtree(logs)
    return 0


def _demo(console: Console, out: Path, work: Path, logs: Path) -> None:
    menu = Menu.load(SHAPES)
    first, second = menu.shapes[:2]
    with console.status("writing the tiny checkpoint (real LTX-2 classes)"):
        model = stack.checkpoint(work)
    console.print(f"checkpoint  {model.relative_to(work.parent)}")
    pool = {
        "LTX2_POOL_MODE": "1",
        "LTX2_POOL_MAX_SIZE": "2",
        "LTX2_POOL_GPU_CONCURRENCY": "2",
        "LTX2_POOL_PREWARM": "none",
    }
    with contextlib.ExitStack() as cleanup:
        with console.status("starting the Dynamo frontend and the worker"):
            running = cleanup.enter_context(stack.Stack(logs, model, SHAPES, work / "cache", **pool))
        console.print(f"serving     {running.model_name} at http://127.0.0.1:{running.http_port}/v1/videos, K=2")
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        began = time.monotonic()
        with console.status(f"asking for {first.key} and {second.key}: two shape processes start and compile"):
            both = cleanup.enter_context(ThreadPoolExecutor(2))
            cold = zip((first, second), PROMPTS[:2], strict=True)
            made = list(both.map(lambda asked: _make(running, asked[0], "cold", asked[1], out, menu.fps), cold))
        console.print(f"cold        two shapes at once in {time.monotonic() - began:.1f} s")
        made.append(_make(running, first, "hot", PROMPTS[2], out, menu.fps))
        frames = clips.render(PICTURED, first.width, first.height, first.num_frames)
        picture = kinds.uri(kinds.file_of(Image.fromarray(frames[0]), "PNG"))
        with console.status("asking for a video that starts from a picture: its graph compiles"):
            fields = {"input_reference": picture}
            made.append(_make(running, first, "picture", PICTURED.caption(), out, menu.fps, **fields))
    sheet = out / "contact-sheet.png"
    contactsheet.write(
        sheet,
        [(f"“{m.prompt}”  {m.shape.key}  {m.state}  {m.seconds:.2f} s", m.data) for m in made],
        "A tiny LTX-2 through Dynamo /v1/videos",
    )
    table = Table("shape", "state", "seconds", "bytes", "file", title="videos")
    for m in made:
        table.add_row(m.shape.key, m.state, f"{m.seconds:.2f}", f"{len(m.data):,}", str(m.path.relative_to(out.parent)))
    console.print(table)
    console.print(f"contact sheet: {sheet.relative_to(out.parent)}")


def _make(running: stack.Stack, shape: Shape, state: str, prompt: str, out: Path, fps: int, **fields: str) -> Made:
    from ltx2_pool.model import mp4

    began = time.monotonic()
    answer = running.create(prompt, size=shape.size, nvext={"num_frames": shape.num_frames}, **fields)
    seconds = time.monotonic() - began
    if answer.status_code != 200:
        raise DemoError(f"{shape.key}: HTTP {answer.status_code} {answer.text}\n{running.log_tail('worker')}")
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    info = mp4.probe(data)
    found = (info.width, info.height, info.num_frames, info.fps, info.audio_channels)
    if found != (shape.width, shape.height, shape.num_frames, fps, 2):
        raise DemoError(f"{shape.key}: the MP4 has (width, height, frames, fps, audio channels) {found}")
    path = out / f"{shape.key.replace('@', '_')}-{state}.mp4"
    path.write_bytes(data)
    return Made(shape, state, prompt, seconds, data, path)


if __name__ == "__main__":
    sys.exit(main())
