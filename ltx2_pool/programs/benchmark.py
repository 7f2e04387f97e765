#!/usr/bin/env python3
"""Benchmarks and endurance runs that anyone can repeat; without a model, on the tiny one."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvloop

from ltx2_pool.words import device
from ltx2_pool.words.extras import extra
from ltx2_pool.words.menu import Menu, MenuError
from ltx2_pool.words.outcomes import ProcessLost
from ltx2_pool.words.shapes import Shape

with extra("tools"):
    import httpx
    from rich.console import Console
    from rich.table import Table

    from ltx2_pool.tools import stack, terminal
    from ltx2_pool.tools.bench import advice, compare, fleetcommands, hostile, image, load, options, rivals, stock
    from ltx2_pool.tools.bench.client import Client, JobsClient, Watch
    from ltx2_pool.tools.bench.results import Level, Result

PROGRAM = Path(sys.argv[0]).name
"""How it was called: ``ltx2-benchmark``, or ``benchmark.py`` from a checkout."""


def main() -> int:
    os.umask(0o077)
    commands: dict[str, options.Command] = {
        "load": _load,
        "image": _image,
        "compare": _compare,
        "spawn": _spawn,
        "chaos": _chaos,
        "fuzz": _fuzz,
        "kinds": _kinds,
        "pictures": _pictures,
        "polling": _polling,
        "fleet": fleetcommands.simulate,
        "calibrate": fleetcommands.calibrate,
        "overhead": fleetcommands.overhead,
        "soak": fleetcommands.soak,
        "menu-report": _menu_report,
    }
    arguments = options.parser(PROGRAM, __doc__ or "", commands).parse_args()
    console = terminal.console()
    try:
        if "shapes" in arguments:
            arguments.shapes = options.menu_file(arguments)
        status: int = arguments.run(arguments, console)
        return status
    except httpx.HTTPError as error:
        print(f"{PROGRAM}: no answer from {error.request.url}: {error}", file=sys.stderr)
        return 2
    except (MenuError, ProcessLost, stack.StackError, advice.AdviceError, compare.CompareError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


@contextlib.contextmanager
def _frontend(arguments: argparse.Namespace, console: Console, **settings: str) -> Iterator[tuple[str, str | None]]:
    """URLs of the frontend and of the worker's system port: those that were given, or of a stack of our own."""
    if arguments.url is not None:
        yield arguments.url, arguments.status_url
        return
    model, root = Path(options.recipe(arguments, console).model_path), options.cache_root(arguments)
    with tempfile.TemporaryDirectory(prefix="ltx2-benchmark-") as logs, contextlib.ExitStack() as cleanup:
        with console.status("starting the frontend and the worker (the first time, every shape compiles)"):
            running = stack.Stack(Path(logs), model, arguments.shapes, root, LTX2_POOL_MODE="1", **settings)
            cleanup.enter_context(running)
        url = f"http://127.0.0.1:{running.http_port}"
        if getattr(arguments, "jobs_api", False):
            url = running.start_gateway(Path(logs) / "gateway", "--shapes", str(arguments.shapes))
        yield url, f"http://127.0.0.1:{running.system_port}"


def _load(arguments: argparse.Namespace, console: Console) -> int:
    menu = Menu.load(arguments.shapes)
    try:
        shares = load.weights(menu, arguments.mix)
    except ValueError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    number = arguments.num_prompts or (None if arguments.duration else 30)
    if arguments.rate:
        levels = [Level(rate=rate) for rate in arguments.rate]
    else:
        levels = [Level(concurrency=clients) for clients in arguments.concurrency or [1, 2, 4]]
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
    levels: list[Level],
    number: int | None,
    url: str,
    status_url: str | None,
    console: Console,
) -> tuple[list[Result], dict[str, Any]]:
    """Warm up, then one level after the other, with a progress bar."""
    kind = JobsClient if arguments.jobs_api else Client
    async with kind(url, menu) as client, Watch(status_url) as watch:
        with terminal.progress(console) as progress:
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
                        client,
                        watch,
                        level,
                        shapes,
                        number,
                        arguments.duration,
                        arguments.shuffle_seed,
                        functools.partial(progress.advance, bar),
                    )
                )
        return results, watch.status


def _image(arguments: argparse.Namespace, console: Console) -> int:
    menu = Menu.load(arguments.shapes)
    strict = {"LTX2_CACHE_POLICY": "strict", "LTX2_POOL_PREWARM": "none"}
    arguments.out.mkdir(parents=True, exist_ok=True)
    with _frontend(arguments, console, **strict) as (url, status_url):

        async def run() -> list[image.Timing]:
            async with Client(url, menu) as client, Watch(status_url) as watch:
                with terminal.progress(console) as progress:
                    bar = progress.add_task("videos", total=2 * arguments.prompts * len(menu.shapes))
                    return await image.run(
                        client,
                        watch,
                        menu,
                        arguments.prompts,
                        arguments.shuffle_seed,
                        arguments.out,
                        lambda: progress.advance(bar),
                    )

        timings = asyncio.run(run())
    verdicts = image.judge(timings, menu, arguments.max_ratio)
    image.show(verdicts, console)
    console.print(f"timings, videos and contact sheets: {arguments.out}")
    return 1 if any(verdict.problems for verdict in verdicts) else 0


def _compare(arguments: argparse.Namespace, console: Console) -> int:
    menu = Menu.load(arguments.shapes)
    if arguments.stock:
        return _compare_stock(arguments, menu, console)
    if given := [name for name in ("shape", "steps", "ways") if getattr(arguments, name) is not None]:
        print(f"{PROGRAM}: --{given[0]} goes with --stock", file=sys.stderr)
        return 2
    if len(menu.shapes) < 3:
        print(f"{PROGRAM}: {arguments.shapes} needs three shapes to compare with", file=sys.stderr)
        return 2
    model = Path(options.recipe(arguments, console).model_path)
    with console.status("") as status:
        repeat = arguments.repeat or 20
        result = compare.run(model, arguments.shapes, menu, options.cache_root(arguments), repeat, status.update)
    compare.show(result, console, arguments.out)
    return 0


def _compare_stock(arguments: argparse.Namespace, menu: Menu, console: Console) -> int:
    here = device.visible()[0]
    ways, left_out = stock.choose(arguments.ways, here)
    if arguments.model is not None:
        stock.check(arguments.model)
    out = arguments.out or Path("compare-out")
    out.mkdir(parents=True, exist_ok=True)
    shapes = list(dict.fromkeys(arguments.shape or menu.shapes[:1]))
    recipe = options.recipe(arguments, console)
    videos = rivals.Videos(
        recipe,
        shapes,
        arguments.steps or menu.steps,
        arguments.repeat or 5,
        options.cache_root(arguments) / "compare-stock",
    )
    with console.status("") as status:
        result = stock.run(videos, ways, status.update)
    result |= {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "device": here.name, "left_out": left_out}
    stock.show(result, here.is_gpu, console)
    for path in stock.write(result, out):
        console.print(f"wrote {path}")
    return 1 if result["problems"] else 0


def _menu_report(arguments: argparse.Namespace, console: Console) -> int:
    advice.show(advice.report(advice.read(arguments.source)), console)
    return 0


def _spawn(arguments: argparse.Namespace, console: Console) -> int:
    from ltx2_pool.tools.bench import spawn

    menu = Menu.load(arguments.shapes)
    recipe = options.recipe(arguments, console)
    results = uvloop.run(spawn.run(recipe, menu.shapes[0], options.cache_root(arguments), arguments.repeat, console))
    spawn.show(results, console, arguments.out)
    ratio = results["ways"]["zygote, shared weights"]["ratio"]
    if arguments.max_ratio is not None and ratio > arguments.max_ratio:
        print(f"{PROGRAM}: zygote / exec is {ratio:.3f}, above {arguments.max_ratio:g}", file=sys.stderr)
        return 1
    return 0


def _polling(arguments: argparse.Namespace, console: Console) -> int:
    from ltx2_pool.tools.bench import polling

    with console.status(f"{arguments.clients} clients poll"):
        result = polling.run(arguments.clients, arguments.duration)
    polling.show(result, console)
    return 1 if result.wrong or result.ratio > arguments.max_ratio else 0


def _chaos_of_gateways(arguments: argparse.Namespace, console: Console) -> int:
    from ltx2_pool.tools.bench import jobschaos

    with tempfile.TemporaryDirectory(prefix="ltx2-chaos-") as work, terminal.progress(console) as progress:
        bar = progress.add_task("jobs", total=arguments.jobs)
        record = jobschaos.run(
            Path(work),
            arguments.jobs,
            arguments.seed,
            arguments.postgresql,
            arguments.routers,
            lambda: progress.advance(bar),
        )
    jobschaos.show(record, console)
    return 1 if record.problems else 0


def _chaos(arguments: argparse.Namespace, console: Console) -> int:
    from ltx2_pool.tools.bench import chaos, faults, worlds

    if arguments.gateway:
        return _chaos_of_gateways(arguments, console)
    menu = worlds.with_gangs(Menu.load(arguments.shapes), arguments.devices)
    logging.getLogger("ltx2_pool").addHandler(logging.NullHandler())  # a line for each fault would hide the ledger
    gangs = faults.OF_GANGS if any(offer.gpus > 1 for offer in menu.offers) else ()
    kinds = (*faults.OF_PROCESSES, *faults.OF_THE_MACHINE, *gangs)
    check = chaos.same_video_each_time()
    ask: chaos.Ask = chaos.a_fox
    with tempfile.TemporaryDirectory(prefix="ltx2-chaos-") as directory, terminal.progress(console) as progress:
        run_dir = Path(directory)
        devices = worlds.devices(arguments.devices, real=arguments.real)
        if arguments.real:
            pool = worlds.real(
                options.recipe(arguments, console), menu, options.cache_root(arguments), run_dir, devices
            )
        else:
            pool = worlds.imaginary(menu, run_dir, devices)
            kinds = (*kinds, *faults.OF_HELPERS)
            (met := run_dir / "met").mkdir()
            check, ask = worlds.is_imaginary, chaos.imaginary_jobs(arguments.seed, met)

        async def run() -> chaos.Ledger:
            one = chaos.Chaos(pool, menu, run_dir, run_dir / "videos", kinds, check, ask)
            return await one.run(arguments.jobs, arguments.fault_rate, arguments.seed, progress)

        ledger = uvloop.run(run())
    chaos.show(ledger, console)
    return 0 if ledger.ok else 1


def _fuzz(arguments: argparse.Namespace, console: Console) -> int:
    with extra("fuzz"):
        from ltx2_pool.tools.bench import fuzz

    menu = Menu.load(arguments.shapes)
    model = Path(options.recipe(arguments, console).model_path)
    with contextlib.ExitStack() as cleanup:
        running = cleanup.enter_context(_all_hot(arguments, console, model, len(menu.offers)))
        progress = cleanup.enter_context(terminal.progress(console))
        bar = progress.add_task("bodies", total=arguments.bodies)
        try:
            statuses = fuzz.run(running, menu, arguments.bodies, arguments.seed, lambda: progress.advance(bar))
        except AssertionError as error:
            print(f"{PROGRAM}: {error}", file=sys.stderr)
            return 1
    for code, number in sorted(statuses.items()):
        console.print(f"{number:6} answered {code}")
    console.print("0 processes lost")
    return 0


def _kinds(arguments: argparse.Namespace, console: Console) -> int:
    from ltx2_pool.tools.bench import kinds

    arguments.out.mkdir(parents=True, exist_ok=True)
    with console.status("writing the tiny checkpoints") as status:
        outcomes = kinds.run(arguments.work, arguments.out, arguments.only, status.update)
    table = Table("checkpoint", "asked for", "frame to picture dB", "to another dB", "")
    for outcome in outcomes:
        near = [f"{psnr:.1f}" if psnr is not None else "" for psnr in (outcome.psnr, outcome.psnr_other)]
        table.add_row(outcome.checkpoint, outcome.name, *near, "; ".join(outcome.problems) or "[green]good[/]")
    console.print(table)
    console.print(f"a look at them: {arguments.out / 'kinds.png'}")
    return 1 if any(outcome.problems for outcome in outcomes) else 0


def _pictures(arguments: argparse.Namespace, console: Console) -> int:
    from ltx2_pool.tools.bench import pictures

    model = Path(options.recipe(arguments, console).model_path)
    with contextlib.ExitStack() as cleanup:
        offers = len(Menu.load(arguments.shapes).offers)
        running = cleanup.enter_context(_all_hot(arguments, console, model, offers, LTX2_IMAGE_HOSTS=hostile.LISTED))
        progress = cleanup.enter_context(terminal.progress(console))
        bar = progress.add_task("pictures", total=arguments.count)
        result = pictures.through(running, arguments.count, arguments.seed, lambda: progress.advance(bar))
    for reason, number in result["refused"].items():
        console.print(f"{number:6} refused: {reason}", highlight=False)
    console.print(f"{result['accepted']:6} became videos, in spite of their damage")
    for what in result["unexpected"]:
        console.print(f"[red]{what}[/]")
    console.print(f"{result['seconds']} s; the worker's memory grew by {result['growth']['worker bytes'] >> 20} MiB")
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["unexpected"] else 0


@contextlib.contextmanager
def _all_hot(
    arguments: argparse.Namespace, console: Console, model: Path, offers: int, **settings: str
) -> Iterator[stack.Stack]:
    """A frontend and a worker of our own, everything on the menu hot."""
    with tempfile.TemporaryDirectory(prefix="ltx2-hot-") as logs, contextlib.ExitStack() as cleanup:
        with console.status("starting the frontend and the worker, every shape hot"):
            settings = {"LTX2_POOL_MODE": "1", "LTX2_POOL_READY_MIN": str(offers), **settings}
            running = stack.Stack(Path(logs), model, arguments.shapes, options.cache_root(arguments), **settings)
            cleanup.enter_context(running)
        yield running


if __name__ == "__main__":
    sys.exit(main())
