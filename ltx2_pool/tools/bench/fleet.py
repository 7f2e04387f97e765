"""``benchmark.py fleet``: what routing does to a fleet, simulated; the policies side by side on the same arrivals."""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ltx2_pool.fleet.arrivals import Pattern, arrivals, zipf
from ltx2_pool.fleet.rivals import POLICIES, Policy
from ltx2_pool.fleet.simulated import Costs
from ltx2_pool.fleet.simulator import Outcome, Plan, simulate
from ltx2_pool.words.shapes import Key, Shape

MEASURED = {
    "768x512@121f": (1.95, 1.68),
    "512x768@121f": (1.95, 1.69),
    "1280x736@121f": (5.29, 4.81),
    "736x1280@121f": (5.31, 4.81),
    "1920x1088@121f": (15.26, 14.27),
    "1088x1920@121f": (15.26, 14.29),
    "768x512@241f": (4.11, 3.72),
    "512x768@241f": (4.12, 3.71),
    "1280x736@241f": (12.81, 11.97),
    "736x1280@241f": (12.78, 11.97),
}
"""Seconds of a hot video of five steps on an H200, and of its denoising, on 2026-11-25. docs/measurements.md has those
of a later day, which are within 1 % of these.
"""
VARIANTS = ("", "fine-tuned", "base")
"""The model, another one that takes as long, and a base model with `BASE_STEPS` steps."""
STEPS, BASE_STEPS = 5, 30


@dataclass(frozen=True)
class Question:
    """What is asked of the simulator."""

    plan: Plan
    pattern: Pattern
    load: float
    """Share of the fleet's device time that the videos alone take, on the average."""


def costs(number: int) -> Costs:
    """Of that many keys, the most popular first: each shape in each variant. Raises ValueError when there are fewer."""
    videos, warm_ups = {}, {}
    for shape, (whole, denoise) in MEASURED.items():
        for variant in VARIANTS:
            key = Key(Shape.parse(shape), variant)
            videos[key] = whole + (denoise * (BASE_STEPS / STEPS - 1) if variant == "base" else 0.0)
            warm_ups[key] = whole - denoise + denoise / STEPS
    if not 1 <= number <= len(videos):
        raise ValueError(f"--keys: there are 1 to {len(videos)} to choose from, not {number}")
    return Costs(dict(list(videos.items())[:number]), warm_ups)


def ask(arguments: argparse.Namespace) -> Question:
    """What a command line asks. Each worker starts the most popular keys ahead, as with ``--prewarm top:N``.

    Raises ValueError.
    """
    known = costs(arguments.keys)
    plan = Plan(
        workers=arguments.workers,
        costs=known,
        ahead=tuple(known.videos)[: arguments.places * arguments.devices],
        places=arguments.places,
        devices=arguments.devices,
        seconds=arguments.duration,
        losses=arguments.losses,
        rollings=arguments.rolling_restarts,
        routers=arguments.routers,
        listening=not arguments.no_listening,
        seed=arguments.seed,
    )
    return Question(plan, arguments.pattern, arguments.load)


def answer(question: Question, policy: Policy) -> Outcome:
    """Simulate one policy."""
    plan = question.plan
    shares = zipf(list(plan.costs.videos))
    mean = sum(share * plan.costs.videos[key] for key, share in shares.items())
    rate = question.load * plan.workers * plan.devices / mean
    return simulate(plan, policy, arrivals(question.pattern, rate, shares, plan.seconds, plan.seed))


def run(question: Question) -> list[Outcome]:
    """All policies, as many at once as there are processors."""
    processors = min(len(POLICIES), os.cpu_count() or 1)
    with concurrent.futures.ProcessPoolExecutor(processors) as pool:
        futures = [pool.submit(answer, question, policy) for policy in reversed(POLICIES)]
        return [future.result() for future in reversed(futures)]


def show(outcomes: Sequence[Outcome], console: Console) -> None:
    """A table: a row for each figure, a column for each policy, and ours over each of the others."""
    figures = {outcome.policy: outcome.figures() for outcome in outcomes}
    *others, ours = figures
    table = Table("", *figures, *(f"{ours} ÷ {other}" for other in others))
    for column in table.columns[1:]:
        column.justify = "right"
    for name in figures[ours]:
        row = [figures[policy][name] for policy in figures]
        ratios = [f"{row[-1] / value:.2f}" if value else "" for value in row[:-1]]
        table.add_row(name, *(f"{value:,.1f}" if value < 1000 else f"{value:,.0f}" for value in row), *ratios)
    console.print(table)
    for outcome in outcomes:
        if outcome.reasons:
            said = ", ".join(f"{reason} {number:,}" for reason, number in outcome.reasons.most_common())
            console.print(f"{outcome.policy}, why each worker was chosen: {said}")


def write(outcomes: Sequence[Outcome], question: Question, out: Path) -> list[Path]:
    """The figures as JSON, and the picture, in a directory."""
    from ltx2_pool.tools.bench import plots

    out.mkdir(parents=True, exist_ok=True)
    plan = question.plan
    record = {
        "pattern": question.pattern,
        "load": question.load,
        "plan": {name: value for name, value in vars(plan).items() if name not in ("costs", "ahead")},
        "costs": {
            **{name: value for name, value in vars(plan.costs).items() if isinstance(value, float)},
            "videos": {str(key): value for key, value in plan.costs.videos.items()},
        },
        "ahead": [str(key) for key in plan.ahead],
        "policies": {
            outcome.policy: {**outcome.figures(), "asked": outcome.asked, "reasons": dict(outcome.reasons)}
            for outcome in outcomes
        },
    }
    report = out / "fleet.json"
    report.write_text(json.dumps(record, indent=1) + "\n")
    about_it = f"{plan.workers} workers, {len(plan.costs.videos)} keys, {plan.places} fit each, {question.pattern}"
    return [report, plots.fleet(outcomes, about_it, out / "fleet.png")]
