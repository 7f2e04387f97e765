"""The seven validation steps of the first systems on this machine's GPU, through the real Dynamo frontend.

``python -m tests.gpu.seven_steps --model DIR --out DIR`` bakes the first shapes of the menu, proves the bake, starts
the frontend and the worker on it with K=2, and goes through the steps; then it starts the worker again with every baked
shape hot and puts load on it. report.json, report.md and contact-sheet.png go to --out; the JSON is written after each
step, so that a run that is cut short still reports.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil

from ltx2_pool.model import mp4
from ltx2_pool.tools import contactsheet
from ltx2_pool.tools.stack import Stack, StackError
from ltx2_pool.words.menu import Menu
from ltx2_pool.words.requests import MAX_SEED
from ltx2_pool.words.shapes import Shape
from tests.e2e.conftest import BENCHMARK, WARMUP, ask, pids, wait
from tests.gpu.bake_and_verify import machine
from tests.paths import REPOSITORY

PROBLEM = (AssertionError, OSError, ValueError, KeyError, subprocess.SubprocessError, StackError, httpx.HTTPError)


class Run:
    """One run; each part adds to `report`."""

    def __init__(self, model: Path, menu: Menu, cache_root: Path, logs: Path, out: Path) -> None:
        self.model, self.menu, self.cache_root, self.logs, self.out = model, menu, cache_root, logs, out
        self.menu_file = logs / "menu.yaml"
        self.menu_file.write_text(
            f"model: {menu.model}\nfps: {menu.fps}\nsteps: {menu.steps}\nguidance: {menu.guidance}\nseed: {menu.seed}\n"
            "shapes:\n" + "".join(f"  - {shape.key.removesuffix('f')}\n" for shape in menu.shapes)
        )
        self.shapes = menu.shapes
        self.began = time.monotonic()
        self.videos: list[tuple[str, bytes]] = []
        self.report: dict[str, Any] = {"machine": machine(), "steps": []}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[dict[str, Any]]:
        """Run the body as a step: what it leaves in the dictionary is reported, and how it ended."""
        entry: dict[str, Any] = {"step": name, "ok": False}
        began = time.monotonic()
        try:
            yield entry
            entry["ok"] = True
        except PROBLEM as error:
            entry["problem"] = f"{type(error).__name__}: {error}"[:1000]
        entry["seconds"] = round(time.monotonic() - began, 2)
        self.report["steps"].append(entry)
        (self.out / "report.json").write_text(json.dumps(self.report, indent=1) + "\n")
        print(f"{time.monotonic() - self.began:7.1f} s  {entry}", flush=True)

    def bake(self, jobs: int) -> None:
        """Bake the shapes, and prove it."""
        where = ["--model", str(self.model), "--shapes", str(self.menu_file), "--cache-root", str(self.cache_root)]
        for name, extra in (("bake", []), ("verify", ["--verify"])):
            with self.step(name) as entry:
                report = self.logs / f"{name}.json"
                command = [*WARMUP, *where, "--jobs", str(jobs), "--report", str(report), *extra]
                subprocess.run(command, check=True, timeout=1800)
                entry["shapes"] = json.loads(report.read_text())["shapes"]

    def stack(self, name: str, **options: str) -> Stack:
        program = (sys.executable, str(REPOSITORY / "tests" / "e2e" / "lenient_worker.py"))
        options.setdefault("LTX2_CACHE_POLICY", "strict")
        return Stack(self.logs / name, self.model, self.menu_file, self.cache_root, program=program, **options)

    def video(self, running: Stack, shape: Shape, caption: str) -> tuple[bytes, float]:
        """One video over HTTP, looked at, with its seconds."""
        began = time.monotonic()
        data = ask(running, shape)
        seconds = time.monotonic() - began
        info = mp4.probe(data)
        assert (info.width, info.height, info.num_frames) == (shape.width, shape.height, shape.num_frames)
        assert info.fps == self.menu.fps
        assert info.audio_channels == 2
        self.videos.append((f"{caption}: {shape.key}, {seconds:.2f} s", data))
        return data, round(seconds, 3)

    def steps_1_to_6(self) -> None:
        a, b, c = self.shapes[:3]
        with self.stack("pool", LTX2_POOL_MODE="1", LTX2_POOL_MAX_SIZE="2", LTX2_POOL_PREWARM="none") as running:
            with self.step("1 smoke") as entry:
                first, entry["cold_s"] = self.video(running, a, "1 smoke")
            with self.step("2 persistence: same process, same bytes") as entry:
                before = pids(running)
                again, entry["hot_s"] = self.video(running, a, "2 persistence")
                assert pids(running) == before
                assert again == first
            with self.step("3 a second shape fills K=2") as entry:
                _, entry["cold_s"] = self.video(running, b, "3 second shape")
                assert pids(running).keys() == {a.key, b.key}
                assert pids(running)[a.key] == before[a.key]
            with self.step("4 a third shape evicts the least recently used, and delays nobody") as entry:
                ask(running, a)
                before = pids(running)
                with ThreadPoolExecutor(1) as other:
                    cold = other.submit(self.video, running, c, "4 third shape")
                    wait(lambda: pids(running).keys() == {a.key, c.key})
                    _, entry["hot_meanwhile_s"] = self.video(running, a, "4 hot meanwhile")
                    entry["cold_was_done"] = cold.done()
                    entry["cold_s"] = cold.result()[1]
                assert pids(running)[a.key] == before[a.key]
                assert not psutil.pid_exists(before[b.key])
            with self.step("5 a soft error keeps the process"):
                before = pids(running)
                answer = running.create(size=a.size, nvext={"num_frames": a.num_frames, "seed": MAX_SEED})
                assert answer.status_code == 400, answer.text
                assert "StageVerificationError" in answer.json()["message"]
                ask(running, a)
                assert pids(running) == before
            with self.step("6 kill -9 in the middle of a job, then respawn: the client gets its video") as entry:
                with ThreadPoolExecutor(1) as other:
                    job = other.submit(self.video, running, a, "6 killed and made again")
                    wait(lambda: "generating" in [p["state"] for p in running.status()["processes"]])
                    os.kill(before[a.key], signal.SIGKILL)
                    again, entry["seconds_with_respawn"] = job.result()
                assert again == first
                assert pids(running)[a.key] != before[a.key]
                assert pids(running)[c.key] == before[c.key]

    def step_7(self) -> None:
        a = self.shapes[0]
        with self.step("7 LTX2_POOL_MODE unset") as entry, self.stack("plain") as running:
            _, entry["compiling_s"] = self.video(running, a, "7 in-process")
            entry["hot_s"] = self.video(running, a, "7 in-process")[1]
            assert running.worker is not None
            assert set(pids(running).values()) == {running.worker.pid}

    def all_hot(self) -> None:
        """Every baked shape hot: the first customer's video against the next ones, then load."""
        options = {"LTX2_POOL_MODE": "1", "LTX2_POOL_READY_MIN": str(len(self.shapes))}
        with self.stack("hot", **options) as running:
            with self.step("all baked shapes hot: first customer against steady") as entry:
                before = pids(running)
                for shape in self.shapes:
                    made = [self.video(running, shape, "hot") for _ in range(3)]
                    steady = statistics.median(seconds for _, seconds in made[1:])
                    entry[shape.key] = {
                        "first_s": made[0][1],
                        "steady_s": steady,
                        "first_over_steady": made[0][1] / steady,
                        "same_bytes": len({hashlib.sha256(data).digest() for data, _ in made}) == 1,
                    }
                assert pids(running) == before
                entry["status"] = running.status()
            with self.step("load: ltx2-benchmark load") as entry:
                urls = {"--url": running.http_port, "--status-url": running.system_port}
                where = [part for name, port in urls.items() for part in (name, f"http://127.0.0.1:{port}")]
                what = ["--concurrency", "1,2,4", "--num-prompts", "12", "--warm-up", "0"]
                command = [*BENCHMARK, "load", *where, "--shapes", str(self.menu_file), *what]
                subprocess.run([*command, "--out", str(self.out / "load")], check=True, timeout=900)
                entry["levels"] = json.loads((self.out / "load" / "summary.json").read_text())["levels"]

    def finish(self) -> bool:
        """Write the tables and the picture; returns whether every step went well."""
        lines = [
            " | ".join(["", *self.report["machine"].values(), ""]).strip(),
            "",
            "| step | | s | |",
            "|---|---|---|---|",
        ]
        for entry in self.report["steps"]:
            rest = {k: v for k, v in entry.items() if k.endswith("_s")}
            text = ", ".join(f"{name} {value}" for name, value in rest.items()) or entry.get("problem", "")
            lines.append(f"| {entry['step']} | {'ok' if entry['ok'] else 'FAILED'} | {entry['seconds']} | {text} |")
        (self.out / "report.md").write_text("\n".join(lines) + "\n")
        print("\n".join(lines))
        if self.videos:
            contactsheet.write(self.out / "contact-sheet.png", self.videos[:10], "LTX-2 through Dynamo /v1/videos")
        return all(entry["ok"] for entry in self.report["steps"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.seven_steps", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint (Diffusers layout)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the reports and pictures go")
    parser.add_argument(
        "--shapes", type=Path, default=REPOSITORY / "shapes.yaml", metavar="FILE", help="menu [shapes.yaml]"
    )
    parser.add_argument(
        "--number", type=int, default=3, metavar="N", help="shapes of the menu, at least 3 [%(default)s]"
    )
    parser.add_argument("--cache-root", type=Path, metavar="DIR", help="use and keep these compile caches")
    parser.add_argument("--jobs", type=int, default=3, metavar="N", help="shapes that compile at once [%(default)s]")
    parser.add_argument("--part", choices=("bake", "serve"), help="only the bake, or only the rest [both]")
    arguments = parser.parse_args()
    if arguments.number < 3:
        parser.error("--number must be 3 or more: step 4 needs a third shape")
    arguments.out.mkdir(parents=True, exist_ok=True)
    menu = Menu.load(arguments.shapes)
    menu = dataclasses.replace(menu, offers=menu.offers[: arguments.number])
    with tempfile.TemporaryDirectory(prefix="ltx2-steps-") as scratch:
        cache_root = arguments.cache_root or Path(scratch) / "cache"
        run = Run(arguments.model, menu, cache_root, Path(scratch), arguments.out)
        if arguments.part != "serve":
            run.bake(arguments.jobs)
        if arguments.part != "bake":
            for part in (run.steps_1_to_6, run.all_hot, run.step_7):
                try:
                    part()
                except PROBLEM as error:
                    with run.step(f"starting the worker ({part.__name__})"):
                        raise error
        return 0 if run.finish() else 1


if __name__ == "__main__":
    sys.exit(main())
