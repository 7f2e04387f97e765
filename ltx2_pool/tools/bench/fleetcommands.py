"""``benchmark.py fleet``, ``calibrate``, ``overhead`` and ``soak``: the subcommands with a router."""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from ltx2_pool.tools import terminal
from ltx2_pool.tools.bench import options
from ltx2_pool.words.menu import Menu


def simulate(arguments: argparse.Namespace, console: Console) -> int:
    """Routing for many workers, simulated."""
    from ltx2_pool.tools.bench import fleet

    try:
        question = fleet.ask(arguments)
    except ValueError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    with console.status(f"simulating {arguments.workers} workers for {arguments.duration / 3600:g} h"):
        outcomes = fleet.run(question)
    fleet.show(outcomes, console)
    for path in fleet.write(outcomes, question, arguments.out):
        console.print(f"wrote {path}")
    return 0


def calibrate(arguments: argparse.Namespace, console: Console) -> int:
    """Real workers, and the simulator on the same requests."""
    from ltx2_pool.tools.bench import calibration, realfleet

    menu = Menu.load(arguments.shapes)
    model = Path(options.recipe(arguments, console).model_path)
    root = options.cache_root(arguments)
    fleet = realfleet.Fleet(model, arguments.shapes, root, arguments.workers, arguments.routers)
    asked = calibration.requests(menu, arguments.requests, arguments.rate, arguments.seed)
    with terminal.progress(console) as progress:
        bar = progress.add_task("", total=len(realfleet.POLICIES) * arguments.requests)
        comparisons = calibration.run(
            fleet,
            menu,
            asked,
            lambda what: progress.update(bar, description=what),
            functools.partial(progress.advance, bar),
        )
    calibration.show(comparisons, console)
    console.print(f"wrote {calibration.write(comparisons, arguments.rate, arguments.seed, arguments.out)}")
    return 1 if any(one.problems for one in comparisons) else 0


def overhead(arguments: argparse.Namespace, console: Console) -> int:
    """What the router adds to a request."""
    from ltx2_pool.tools.bench import overhead

    with terminal.progress(console) as progress:
        bar = progress.add_task("requests", total=len(overhead.SIZES) * arguments.requests)
        found = overhead.run(arguments.requests, functools.partial(progress.advance, bar))
    overhead.show(found, console)
    if arguments.out is not None:
        overhead.write(found, arguments.out)
    return 0


def soak(arguments: argparse.Namespace, console: Console) -> int:
    """A long run through gateway, frontend, router and worker."""
    from ltx2_pool.tools.bench import soak

    model = Path(options.recipe(arguments, console).model_path)
    with tempfile.TemporaryDirectory(prefix="ltx2-soak-") as work, terminal.progress(console) as progress:
        bar = progress.add_task("jobs", total=arguments.jobs)
        record = soak.run(
            Path(work),
            model,
            arguments.shapes,
            options.cache_root(arguments),
            arguments.jobs,
            arguments.seed,
            functools.partial(progress.advance, bar),
        )
    soak.show(record, console)
    for path in soak.write(record, {"date": time.strftime("%Y-%m-%d"), "seed": arguments.seed}, arguments.out):
        console.print(f"wrote {path}")
    return 1 if record.problems else 0
