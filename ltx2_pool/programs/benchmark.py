#!/usr/bin/env python3
"""Benchmarks and endurance runs that anyone can repeat; without a model, on the tiny random-weight one."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import uvloop
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from ltx2_pool.processes.host import ProcessHost
from ltx2_pool.processes.process import ExecSpawner, ProcessLost, Timeouts
from ltx2_pool.tools import stack, terminal
from ltx2_pool.tools.bench import advice, chaos, compare, image, load, spawn
from ltx2_pool.tools.bench.client import Client, Watch
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.shapes import Menu, MenuError, Shape


def main() -> int:
    arguments = _parser().parse_args()
    console = terminal.console()
    try:
        status: int = arguments.run(arguments, console)
        return status
    except httpx.HTTPError as error:
        print(f"benchmark.py: no answer from {error.request.url}: {error}", file=sys.stderr)
        return 2
    except (MenuError, ProcessLost, stack.StackError, advice.AdviceError, compare.CompareError, OSError) as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmark.py", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".work"), help="tiny checkpoint and caches [%(default)s]")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("load", help="requests against a running frontend; tables, CSV, JSON and pictures")
    one.set_defaults(run=_load)
    _frontend_options(one)
    push = one.add_mutually_exclusive_group()
    push.add_argument(
        "--rate", type=_amounts, metavar="R,...", help="open loop: requests per second, at random (Poisson) moments"
    )
    push.add_argument(
        "--concurrency",
        type=_counts,
        metavar="N,...",
        help="closed loop: clients that ask again as soon as they are answered [1,2,4]",
    )
    one.add_argument("--num-prompts", type=_count, metavar="N", help="requests at each level [30]")
    one.add_argument("--duration", type=_amount, metavar="S", help="seconds for each level, in place of a number")
    one.add_argument(
        "--mix",
        default="uniform",
        metavar="uniform|zipf|FILE",
        help="share of each shape; the file has lines of 'shape key: weight' [%(default)s]",
    )
    one.add_argument("--shuffle-seed", type=int, default=0, metavar="N", help="of order and moments [%(default)s]")
    one.add_argument(
        "--warm-up", type=int, default=1, metavar="N", help="videos of each shape before it counts [%(default)s]"
    )
    one.add_argument("--out", type=Path, default=Path("load-out"), metavar="DIR", help="[%(default)s]")

    two = commands.add_parser("image", help="is a baked image good: every shape cold first, then all in random order")
    two.set_defaults(run=_image)
    _frontend_options(two)
    two.add_argument("--prompts", type=_count, default=3, metavar="N", help="for each shape [%(default)s]")
    two.add_argument("--shuffle-seed", type=int, default=0, metavar="N", help="[%(default)s]")
    two.add_argument(
        "--max-ratio",
        type=_amount,
        default=1.5,
        metavar="X",
        help="a shape fails when random order takes over X times as long [%(default)s]",
    )
    two.add_argument("--out", type=Path, default=Path("image-out"), metavar="DIR", help="[%(default)s]")

    three = commands.add_parser("compare", help="pool, in-process and exec with private weights in one run, as ratios")
    three.set_defaults(run=_compare)
    _model_options(three)
    three.add_argument("--repeat", type=_count, default=20, metavar="N", help="hot videos [%(default)s]")
    three.add_argument("--out", type=Path, metavar="FILE", help="write the measurements as JSON")

    four = commands.add_parser("spawn", help="spawn to READY: fork of the zygote against a fresh interpreter")
    four.set_defaults(run=_spawn)
    _model_options(four)
    four.add_argument("--repeat", type=_count, default=3, metavar="N", help="processes each way [%(default)s]")
    four.add_argument(
        "--max-ratio", type=_amount, metavar="X", help="exit 1 when zygote / exec is above, for instance 0.05"
    )
    four.add_argument("--out", type=Path, metavar="FILE", help="write the measurements as JSON")

    five = commands.add_parser("chaos", help="jobs through the pool while processes are killed at random")
    five.set_defaults(run=_chaos)
    _model_options(five)
    five.add_argument("--jobs", type=_count, default=1000, metavar="N", help="[%(default)s]")
    five.add_argument("--kill-rate", type=float, default=0.2, metavar="P", help="kills for each job [%(default)s]")
    five.add_argument("--seed", type=int, default=0, metavar="N", help="[%(default)s]")
    five.add_argument("--real", action="store_true", help="the real pipeline; without, children that make no video")

    six = commands.add_parser("fuzz", help="request bodies of every kind of wrong, through the real frontend")
    six.set_defaults(run=_fuzz)
    _model_options(six)
    six.add_argument("--bodies", type=_count, default=10_000, metavar="N", help="[%(default)s]")
    six.add_argument("--seed", type=int, default=0, metavar="N", help="[%(default)s]")

    seven = commands.add_parser("menu-report", help="which shapes earn their memory, from a worker's counters")
    seven.set_defaults(run=_menu_report)
    seven.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="URL|FILE",
        help="http://HOST:DYN_SYSTEM_PORT/metrics, or a saved page of it",
    )
    return parser


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="DIR", help="checkpoint [a tiny one, written on first use]")
    parser.add_argument("--shapes", type=Path, default=stack.TINY_MENU, metavar="FILE", help="menu [the tiny model's]")
    parser.add_argument("--cache-root", type=Path, metavar="DIR", help="compile caches [<work>/cache]")


def _frontend_options(parser: argparse.ArgumentParser) -> None:
    _model_options(parser)
    parser.add_argument("--url", metavar="URL", help="a running frontend [start one, and a worker, on --model]")
    parser.add_argument(
        "--status-url", metavar="URL", help="system port of the worker behind --url, to tell hot from cold"
    )


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return value


def _amount(text: str) -> float:
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _amounts(text: str) -> list[float]:
    return [_amount(part) for part in text.split(",")]


def _recipe(arguments: argparse.Namespace, console: Console) -> Recipe:
    if arguments.model is None:
        with console.status("writing the tiny checkpoint"):
            arguments.model = stack.checkpoint(arguments.work)
    return Recipe(model_path=str(arguments.model.resolve()))


def _cache_root(arguments: argparse.Namespace) -> Path:
    root: Path = arguments.cache_root or arguments.work / "cache"
    return root


@contextlib.contextmanager
def _frontend(arguments: argparse.Namespace, console: Console, **options: str) -> Iterator[tuple[str, str | None]]:
    """URLs of the frontend and of the worker's system port: those that were given, or of a stack of our own."""
    if arguments.url is not None:
        yield arguments.url, arguments.status_url
        return
    model = Path(_recipe(arguments, console).model_path)
    with tempfile.TemporaryDirectory(prefix="ltx2-benchmark-") as logs, contextlib.ExitStack() as cleanup:
        with console.status("starting the frontend and the worker (the first time, every shape compiles)"):
            running = cleanup.enter_context(
                stack.Stack(Path(logs), model, arguments.shapes, _cache_root(arguments), LTX2_POOL_MODE="1", **options)
            )
        yield f"http://127.0.0.1:{running.http_port}", f"http://127.0.0.1:{running.system_port}"


def _load(arguments: argparse.Namespace, console: Console) -> int:
    menu = Menu.load(arguments.shapes)
    try:
        shares = load.weights(menu, arguments.mix)
    except ValueError as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    number = arguments.num_prompts or (None if arguments.duration else 30)
    if arguments.rate:
        levels = [load.Level(rate=rate) for rate in arguments.rate]
    else:
        levels = [load.Level(concurrency=clients) for clients in arguments.concurrency or [1, 2, 4]]
    with _frontend(arguments, console, LTX2_POOL_READY_MIN=str(len(menu.shapes))) as (url, status_url):
        results, status = asyncio.run(_push(arguments, menu, shares, levels, number, url, status_url, console))
    load.show(results, console)
    about = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "mix": arguments.mix,
        "shuffle_seed": arguments.shuffle_seed,
        "warm_up": arguments.warm_up,
        "worker": {k: status[k] for k in ("version", "model", "menu", "max_size") if k in status},
    }
    for path in load.write(results, about, menu, arguments.out):
        console.print(f"wrote {path}")
    return 0 if all(not record.problem for result in results for record in result.records) else 1


async def _push(
    arguments: argparse.Namespace,
    menu: Menu,
    shares: dict[Shape, float],
    levels: list[load.Level],
    number: int | None,
    url: str,
    status_url: str | None,
    console: Console,
) -> tuple[list[load.Result], dict[str, Any]]:
    """Warm up, then one level after the other, with a progress bar."""
    async with Client(url, menu) as client, Watch(status_url) as watch:
        with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress:
            bar = progress.add_task("warm-up", total=arguments.warm_up * len(shares))
            for shape in shares:
                for index in range(arguments.warm_up):
                    await client.ask(shape, index)
                    progress.advance(bar)
            results = []
            for level in levels:
                bar = progress.add_task(str(level), total=number)
                shapes = load.sequence(shares, number or 10 * len(shares), arguments.shuffle_seed)
                results.append(
                    await load.run(
                        client, watch, level, shapes, number, arguments.duration, arguments.shuffle_seed,
                        functools.partial(progress.advance, bar),
                    )
                )  # fmt: skip
        return results, watch.status


def _image(arguments: argparse.Namespace, console: Console) -> int:
    menu = Menu.load(arguments.shapes)
    options = {"LTX2_CACHE_POLICY": "strict", "LTX2_POOL_PREWARM": "none"}
    arguments.out.mkdir(parents=True, exist_ok=True)
    with _frontend(arguments, console, **options) as (url, status_url):

        async def run() -> list[image.Timing]:
            async with Client(url, menu) as client, Watch(status_url) as watch:
                with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress:
                    bar = progress.add_task("videos", total=2 * arguments.prompts * len(menu.shapes))
                    return await image.run(
                        client, watch, menu, arguments.prompts, arguments.shuffle_seed, arguments.out,
                        lambda: progress.advance(bar),
                    )  # fmt: skip

        timings = asyncio.run(run())
    verdicts = image.judge(timings, menu, arguments.max_ratio)
    image.show(verdicts, console)
    console.print(f"timings, videos and contact sheets: {arguments.out}")
    return 1 if any(verdict.problems for verdict in verdicts) else 0


def _compare(arguments: argparse.Namespace, console: Console) -> int:
    menu = Menu.load(arguments.shapes)
    if len(menu.shapes) < 3:
        print(f"benchmark.py: {arguments.shapes} needs three shapes to compare with", file=sys.stderr)
        return 2
    model = Path(_recipe(arguments, console).model_path)
    with console.status("") as status:
        result = compare.run(model, arguments.shapes, menu, _cache_root(arguments), arguments.repeat, status.update)
    compare.show(result, console, arguments.out)
    return 0


def _menu_report(arguments: argparse.Namespace, console: Console) -> int:
    advice.show(advice.report(advice.read(arguments.source)), console)
    return 0


def _spawn(arguments: argparse.Namespace, console: Console) -> int:
    menu = Menu.load(arguments.shapes)
    recipe = _recipe(arguments, console)
    results = uvloop.run(spawn.run(recipe, menu.shapes[0], _cache_root(arguments), arguments.repeat, console))
    spawn.show(results, console, arguments.out)
    ratio = results["ways"]["zygote, shared weights"]["ratio"]
    if arguments.max_ratio is not None and ratio > arguments.max_ratio:
        print(f"benchmark.py: zygote / exec is {ratio:.3f}, above {arguments.max_ratio:g}", file=sys.stderr)
        return 1
    return 0


def _chaos(arguments: argparse.Namespace, console: Console) -> int:
    menu = Menu.load(arguments.shapes)
    timeouts = Timeouts(spawn=120, weights=120, generation=60, cancel=5, term=5)
    if arguments.real:
        host = ProcessHost(_recipe(arguments, console), timeouts)
        check = chaos.same_video_each_time()
    else:
        fake = [sys.executable, str(ROOT / "tests" / "pool" / "fake_child.py")]
        host = ProcessHost(Recipe(model_path="none"), timeouts, weights="private", spawner=ExecSpawner(fake))

        def check(shape: object, data: bytes) -> bool:
            return data.startswith(f"{shape} by ".encode())

    with tempfile.TemporaryDirectory(prefix="ltx2-chaos-") as run_dir, Progress(console=console) as progress:

        async def run() -> chaos.Ledger:
            one = chaos.Chaos(host, menu, _cache_root(arguments), Path(run_dir), check=check, hot=arguments.real)
            return await one.run(arguments.jobs, arguments.kill_rate, arguments.seed, progress)

        ledger = uvloop.run(run())
    chaos.show(ledger, console)
    return 0 if ledger.ok else 1


def _fuzz(arguments: argparse.Namespace, console: Console) -> int:
    from ltx2_pool.tools.bench import fuzz  # needs hypothesis, which an image does not have

    menu = Menu.load(arguments.shapes)
    model = Path(_recipe(arguments, console).model_path)
    with contextlib.ExitStack() as cleanup:
        logs = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="ltx2-fuzz-")))
        with console.status("starting the frontend and the worker, every shape hot"):
            running = cleanup.enter_context(
                stack.Stack(
                    logs, model, arguments.shapes, _cache_root(arguments),
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
    for code, number in sorted(statuses.items()):
        console.print(f"{number:6} answered {code}")
    console.print("0 processes lost")
    return 0


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(main())
