"""The command line of the benchmarks: every subcommand, its options, and what they mean when they are left out."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console

from ltx2_pool.fleet import arrivals
from ltx2_pool.tools import stack
from ltx2_pool.tools.bench import rivals
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.shapes import Shape

Command = Callable[[argparse.Namespace, Console], int]


def parser(program: str, description: str, commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser; `commands` has what each subcommand calls with its arguments, by the subcommand's name."""
    top = argparse.ArgumentParser(prog=program, description=description)
    top.add_argument("--work", type=Path, default=Path(".work"), help="tiny checkpoint and caches [%(default)s]")
    several = top.add_subparsers(required=True, metavar="COMMAND")

    one = several.add_parser("load", help="requests against a running frontend; tables, CSV, JSON and pictures")
    one.set_defaults(run=commands["load"])
    _frontend_options(one)
    one.add_argument(
        "--jobs-api", action="store_true", help="through a gateway's jobs API, polling; --url is the gateway's then"
    )
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

    two = several.add_parser("image", help="is a baked image good: every shape cold first, then all in random order")
    two.set_defaults(run=commands["image"])
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

    three = several.add_parser("compare", help="pool, in-process and exec with private weights in one run, as ratios")
    three.set_defaults(run=commands["compare"])
    _model_options(three)
    three.add_argument("--repeat", type=_count, metavar="N", help="hot videos [20; with --stock 5 of each shape]")
    three.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help="write the measurements to this file as JSON; with --stock, JSON, CSV and a picture to this directory "
        "[compare-out]",
    )
    stock = three.add_argument_group(
        "FastVideo's own generator",
        "With --stock, and without a frontend: FastVideo's VideoGenerator, compiled, and this project's ways to run it "
        "make the same videos on the same device, one way after the other, each in a process of its own with compile "
        "caches of its own. Load, first and steady videos are timed, and ratios to stock are given. Exit status 1 when "
        "a way failed; the others are measured all the same.",
    )
    stock.add_argument("--stock", action="store_true", help="compare with it, in place of the three above")
    stock.add_argument(
        "--shape",
        type=_shape,
        action="append",
        metavar="KEY",
        help="for instance 768x512@121f, on the menu or not; again for another [the menu's first]",
    )
    stock.add_argument("--steps", type=_steps, metavar="N", help="denoise steps, 1 to 50 [the menu's]")
    stock.add_argument(
        "--ways",
        nargs="+",
        choices=rivals.WAYS,
        metavar="WAY",
        help=f"of {', '.join(map(repr, rivals.WAYS))}; stock always is one [all that the device can do]",
    )

    four = several.add_parser("spawn", help="spawn to READY: fork of the zygote against a fresh interpreter")
    four.set_defaults(run=commands["spawn"])
    _model_options(four)
    four.add_argument("--repeat", type=_count, default=3, metavar="N", help="processes each way [%(default)s]")
    four.add_argument(
        "--max-ratio", type=_amount, metavar="X", help="exit 1 when zygote / exec is above, for instance 0.05"
    )
    four.add_argument("--out", type=Path, metavar="FILE", help="write the measurements as JSON")

    five = several.add_parser("chaos", help="jobs through the pool while things go wrong at random; a ledger")
    five.set_defaults(run=commands["chaos"])
    _model_options(five)
    five.add_argument("--jobs", type=_count, default=1000, metavar="N", help="[%(default)s]")
    five.add_argument(
        "--devices", type=_count, default=1, metavar="N", help="GPUs, or where there are none stand-ins [%(default)s]"
    )
    five.add_argument("--fault-rate", type=float, default=0.2, metavar="P", help="faults for each job [%(default)s]")
    five.add_argument("--seed", type=int, default=0, metavar="N", help="[%(default)s]")
    five.add_argument("--real", action="store_true", help="the real pipeline; without, an imaginary engine")
    five.add_argument(
        "--gateway", action="store_true", help="jobs of the gateway's API while gateway, frontend and worker are killed"
    )
    five.add_argument(
        "--postgresql", action="store_true", help="with --gateway: two gateways on a PostgreSQL of its own"
    )
    five.add_argument(
        "--routers",
        type=int,
        default=0,
        metavar="N",
        help="with --gateway: so many routers with two workers behind them, and routers are killed, too",
    )

    six = several.add_parser("fuzz", help="request bodies of every kind of wrong, through the real frontend")
    six.set_defaults(run=commands["fuzz"])
    _model_options(six)
    six.add_argument("--bodies", type=_count, default=10_000, metavar="N", help="[%(default)s]")
    six.add_argument("--seed", type=int, default=0, metavar="N", help="[%(default)s]")

    kinds = several.add_parser(
        "kinds", help="pictures, two stages, every kind of checkpoint: tiny ones, and a look at it"
    )
    kinds.set_defaults(run=commands["kinds"])
    kinds.add_argument("--out", type=Path, default=Path("kinds-out"), metavar="DIR", help="[%(default)s]")
    kinds.add_argument(
        "--only",
        nargs="+",
        choices=tuple(stack.CHECKPOINTS),
        default=tuple(stack.CHECKPOINTS),
        metavar="CHECKPOINT",
        help=f"of {', '.join(stack.CHECKPOINTS)} [all]",
    )

    hostile = several.add_parser(
        "pictures", help="pictures and URLs that were made to break things, through a frontend"
    )
    hostile.set_defaults(run=commands["pictures"])
    _model_options(hostile)
    hostile.add_argument("--count", type=_count, default=5000, metavar="N", help="[%(default)s]")
    hostile.add_argument("--seed", type=int, default=0, metavar="N", help="[%(default)s]")
    hostile.add_argument("--out", type=Path, metavar="FILE", help="write what became of them as JSON")

    polling = several.add_parser(
        "polling", help="clients that poll a gateway for their jobs at once: p99 over idle p50"
    )
    polling.set_defaults(run=commands["polling"])
    polling.add_argument("--clients", type=_count, default=2000, metavar="N", help="[%(default)s]")
    polling.add_argument("--duration", type=_amount, default=20, metavar="S", help="[%(default)s]")
    polling.add_argument("--max-ratio", type=_amount, default=50, metavar="X", help="exit 1 above it [%(default)s]")

    _fleet_options(several.add_parser("fleet", help="routing for many workers, simulated"), commands["fleet"])

    real = several.add_parser("calibrate", help="real workers behind routers and without, beside the simulator")
    real.set_defaults(run=commands["calibrate"])
    _model_options(real)
    real.description = (
        "Workers with one place each are asked for the same videos at the same moments, first by Dynamo's round robin "
        "and then by our routers, and the simulator says what it would have expected. Exit status 1 when a request got "
        "no video."
    )
    real.add_argument("--workers", type=_count, default=3, metavar="N", help="[%(default)s]")
    real.add_argument("--routers", type=_count, default=1, metavar="N", help="side by side [%(default)s]")
    real.add_argument("--requests", type=_count, default=300, metavar="N", help="[%(default)s]")
    real.add_argument(
        "--rate", type=_amount, default=0.8, metavar="R", help="requests a second, at random moments [%(default)s]"
    )
    real.add_argument("--seed", type=int, default=0, metavar="N", help="[%(default)s]")
    real.add_argument("--out", type=Path, default=Path("calibrate-out"), metavar="DIR", help="[%(default)s]")

    way = several.add_parser("overhead", help="what the router adds to a request, as a difference in one run")
    way.set_defaults(run=commands["overhead"])
    way.add_argument("--requests", type=_count, default=500, metavar="N", help="of each size [%(default)s]")
    way.add_argument("--out", type=Path, metavar="FILE", help="write the measurements as JSON")

    long = several.add_parser(
        "soak", help="a long run through gateway, frontend, router and worker, with faults; what it leaves behind"
    )
    long.set_defaults(run=commands["soak"])
    _model_options(long)
    long.add_argument("--jobs", type=_count, default=10_000, metavar="N", help="[%(default)s]")
    long.add_argument("--seed", type=int, default=0, metavar="N", help="[%(default)s]")
    long.add_argument("--out", type=Path, default=Path("soak-out"), metavar="DIR", help="[%(default)s]")

    seven = several.add_parser("menu-report", help="which shapes earn their memory, from a worker's counters")
    seven.set_defaults(run=commands["menu-report"])
    seven.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="URL|FILE",
        help="http://HOST:DYN_SYSTEM_PORT/metrics, or a saved page of it",
    )
    return top


def _fleet_options(fleet: argparse.ArgumentParser, run: Command) -> None:
    fleet.set_defaults(run=run)
    fleet.description = (
        "The real routing policy, and the real queue, ledger and decision of every worker, under a simulated clock: "
        "beside round robin and least loaded, on the same arrivals, with an H200's times."
    )
    fleet.add_argument("--workers", type=_count, default=100, metavar="N", help="[%(default)s]")
    fleet.add_argument("--devices", type=_count, default=1, metavar="N", help="of each worker [%(default)s]")
    fleet.add_argument("--keys", type=_count, default=30, metavar="N", help="on the menu, 30 at most [%(default)s]")
    fleet.add_argument("--places", type=_count, default=10, metavar="K", help="keys that fit a device [%(default)s]")
    fleet.add_argument("--duration", type=_amount, default=arrivals.DAY, metavar="S", help="simulated [a day]")
    fleet.add_argument("--pattern", choices=arrivals.PATTERNS, default="day", help="of the arrivals [%(default)s]")
    fleet.add_argument(
        "--load",
        type=_amount,
        default=0.5,
        metavar="X",
        help="mean share of device time that is asked for [%(default)s]",
    )
    fleet.add_argument(
        "--losses", type=float, default=0.5, metavar="X", help="workers lost, for each worker and day [%(default)s]"
    )
    fleet.add_argument("--rolling-restarts", type=int, default=1, metavar="N", help="in that time [%(default)s]")
    fleet.add_argument("--routers", type=_count, default=1, metavar="N", help="side by side [%(default)s]")
    fleet.add_argument("--no-listening", action="store_true", help="workers do not hear what the fleet is asked for")
    fleet.add_argument("--seed", type=int, default=0, metavar="N", help="[%(default)s]")
    fleet.add_argument("--out", type=Path, default=Path("fleet-out"), metavar="DIR", help="[%(default)s]")


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        default=_path("LTX2_MODEL"),
        metavar="DIR",
        help="checkpoint [LTX2_MODEL, or a tiny one, written on first use]",
    )
    parser.add_argument(
        "--shapes",
        type=Path,
        default=_path("LTX2_SHAPES"),
        metavar="FILE",
        help="menu [LTX2_SHAPES, or ./shapes.yaml; the tiny model's for the tiny model]",
    )
    parser.add_argument(
        "--cache-root",
        type=Path,
        default=_path("LTX2_CACHE_ROOT"),
        metavar="DIR",
        help="compile caches [LTX2_CACHE_ROOT, or <work>/cache]",
    )


def _path(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value) if value else None


def menu_file(arguments: argparse.Namespace) -> Path:
    """The menu that was named, else the one that goes with the model that is asked."""
    if arguments.shapes is not None:
        named: Path = arguments.shapes
        return named
    somebody_elses = arguments.model is not None or getattr(arguments, "url", None) is not None
    return Path("shapes.yaml") if somebody_elses else stack.TINY_MENU


def recipe(arguments: argparse.Namespace, console: Console) -> Recipe:
    """With the model that was named, else the tiny one, which is written on first use. Raises CalledProcessError."""
    if arguments.model is None:
        with console.status("writing the tiny checkpoint"):
            arguments.model = stack.checkpoint(arguments.work)
    return Recipe(model_path=str(arguments.model.resolve()))


def cache_root(arguments: argparse.Namespace) -> Path:
    """The one that was named, else the tiny model's."""
    root: Path = arguments.cache_root or arguments.work / "cache"
    return root


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


def _steps(text: str) -> int:
    if not 1 <= (value := int(text)) <= 50:
        raise argparse.ArgumentTypeError(f"must be from 1 to 50, not {text}")
    return value


def _shape(text: str) -> Shape:
    try:
        return Shape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _amount(text: str) -> float:
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _amounts(text: str) -> list[float]:
    return [_amount(part) for part in text.split(",")]
