#!/usr/bin/env python3
"""Benchmarks and endurance runs that anyone can repeat; without a model, on the tiny random-weight one."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from pathlib import Path

import uvloop
from rich.console import Console
from rich.progress import Progress

from ltx2_pool import stack
from ltx2_pool.bench import chaos, spawn
from ltx2_pool.host import ProcessHost
from ltx2_pool.process import ExecSpawner, ProcessLost, Timeouts
from ltx2_pool.recipe import Recipe
from ltx2_pool.shapes import Menu, MenuError

ROOT = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmark.py", description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / ".work", help="tiny checkpoint and caches [%(default)s]")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = commands.add_parser("spawn", help="spawn to READY: fork of the zygote against a fresh interpreter")
    _model_options(one)
    one.add_argument("--repeat", type=int, default=3, metavar="N", help="processes each way [%(default)s]")
    one.add_argument(
        "--max-ratio", type=float, metavar="X", help="exit 1 when zygote / exec is above, for instance 0.05"
    )
    one.add_argument("--out", type=Path, metavar="FILE", help="write the measurements as JSON")
    two = commands.add_parser("chaos", help="jobs through the pool while processes are killed at random")
    _model_options(two)
    two.add_argument("--jobs", type=int, default=1000, metavar="N", help="[%(default)s]")
    two.add_argument("--kill-rate", type=float, default=0.2, metavar="P", help="kills for each job [%(default)s]")
    two.add_argument("--seed", type=int, default=0, metavar="N", help="[%(default)s]")
    two.add_argument("--real", action="store_true", help="the real pipeline; without, children that make no video")
    three = commands.add_parser("fuzz", help="request bodies of every kind of wrong, through the real frontend")
    _model_options(three)
    three.add_argument("--bodies", type=int, default=10_000, metavar="N", help="[%(default)s]")
    three.add_argument("--seed", type=int, default=0, metavar="N", help="[%(default)s]")
    arguments = parser.parse_args()
    console = Console()
    try:
        menu = Menu.load(arguments.shapes)
        return {"spawn": _spawn, "chaos": _chaos, "fuzz": _fuzz}[arguments.command](arguments, menu, console)
    except (MenuError, ProcessLost, OSError) as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="DIR", help="checkpoint [a tiny one, written on first use]")
    parser.add_argument("--shapes", type=Path, default=ROOT / "tiny.yaml", metavar="FILE", help="menu [tiny.yaml]")
    parser.add_argument("--cache-root", type=Path, metavar="DIR", help="compile caches [<work>/cache]")


def _recipe(arguments: argparse.Namespace, console: Console) -> Recipe:
    if arguments.model is None:
        with console.status("writing the tiny checkpoint"):
            arguments.model = stack.checkpoint(arguments.work)
    return Recipe(model_path=str(arguments.model.resolve()))


def _spawn(arguments: argparse.Namespace, menu: Menu, console: Console) -> int:
    recipe = _recipe(arguments, console)
    cache_root = arguments.cache_root or arguments.work / "cache"
    results = uvloop.run(spawn.run(recipe, menu.shapes[0], cache_root, arguments.repeat, console))
    spawn.show(results, console, arguments.out)
    ratio = results["ways"]["zygote, shared weights"]["ratio"]
    if arguments.max_ratio is not None and ratio > arguments.max_ratio:
        print(f"benchmark.py: zygote / exec is {ratio:.3f}, above {arguments.max_ratio:g}", file=sys.stderr)
        return 1
    return 0


def _chaos(arguments: argparse.Namespace, menu: Menu, console: Console) -> int:
    timeouts = Timeouts(spawn=120, weights=120, generation=60, cancel=5, term=5)
    if arguments.real:
        host = ProcessHost(_recipe(arguments, console), timeouts)
        check = chaos.same_video_each_time()
    else:
        fake = [sys.executable, str(ROOT / "tests" / "pool" / "fake_child.py")]
        host = ProcessHost(Recipe(model_path="none"), timeouts, weights="private", spawner=ExecSpawner(fake))

        def check(shape: object, data: bytes) -> bool:
            return data.startswith(f"{shape} by ".encode())

    cache_root = arguments.cache_root or arguments.work / "cache"
    with tempfile.TemporaryDirectory(prefix="ltx2-chaos-") as run_dir, Progress(console=console) as progress:

        async def run() -> chaos.Ledger:
            one = chaos.Chaos(host, menu, cache_root, Path(run_dir), check=check, hot=arguments.real)
            return await one.run(arguments.jobs, arguments.kill_rate, arguments.seed, progress)

        ledger = uvloop.run(run())
    chaos.show(ledger, console)
    return 0 if ledger.ok else 1


def _fuzz(arguments: argparse.Namespace, menu: Menu, console: Console) -> int:
    from ltx2_pool.bench import fuzz  # needs hypothesis, which an image does not have

    model = Path(_recipe(arguments, console).model_path)
    with contextlib.ExitStack() as cleanup:
        logs = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="ltx2-fuzz-")))
        with console.status("starting the frontend and the worker, every shape hot"):
            running = cleanup.enter_context(
                stack.Stack(
                    logs, model, arguments.shapes, arguments.cache_root or arguments.work / "cache",
                    LTX2_POOL_MODE="1", LTX2_POOL_READY_MIN=str(len(menu.shapes)),
                )
            )  # fmt: skip
        progress = cleanup.enter_context(Progress(console=console))
        bar = progress.add_task("bodies", total=arguments.bodies)
        try:
            statuses = fuzz.run(running, menu, arguments.bodies, arguments.seed, lambda: progress.advance(bar))
        except AssertionError as error:
            print(f"benchmark.py: {error}", file=sys.stderr)
            return 1
    for status, number in sorted(statuses.items()):
        console.print(f"{number:6} answered {status}")
    console.print("0 processes lost")
    return 0


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(main())
