"""``benchmark.py calibrate``: a real fleet beside what the simulator says of the same requests, predicted ÷ measured.

The simulator gets the moments and keys that the real fleet was asked for, and of what things took in that run the means
and how they spread. What is left to it is what it is there for: who goes where, who waits for whom, who has to be
started.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ltx2_pool.fleet.arrivals import arrivals, zipf
from ltx2_pool.fleet.simulated import Costs
from ltx2_pool.fleet.simulator import Outcome, Plan, simulate
from ltx2_pool.tools.bench import realfleet
from ltx2_pool.tools.bench.realfleet import Fleet, Real
from ltx2_pool.words.menu import Menu
from ltx2_pool.words.shapes import Key

SLACK = 3600.0
"""Simulated seconds after the last request, for all to be answered."""


Figures = dict[str, float]
"""Of one run, real or simulated, by what they are called in the table. A wait is what a video takes more than alone and
hot."""


@dataclass(frozen=True)
class Comparison:
    """One policy."""

    real: Real
    costs: Costs
    measured: Figures
    predicted: Figures
    problems: Counter[str]


def requests(menu: Menu, number: int, rate: float, seed: int) -> list[tuple[float, Key]]:
    """Moments and keys: `rate` a second at random (Poisson), in the order of the menu under Zipf's law."""
    return list(itertools.islice(arrivals("poisson", rate, zipf(list(menu.keys)), float("inf"), seed), number))


def run(
    fleet: Fleet,
    menu: Menu,
    asked: Sequence[tuple[float, Key]],
    tell: Callable[[str], None],
    on_answer: Callable[[], None],
) -> list[Comparison]:
    """Both policies in turn, on fresh workers each. Raises StackError, CalledProcessError."""
    realfleet.bake(fleet, tell)
    found = []
    for policy in realfleet.POLICIES:
        tell(policy)
        found.append(compare(realfleet.run(fleet, menu, policy, asked, on_answer), menu))
    return found


def compare(real: Real, menu: Menu) -> Comparison:
    """What the run shows, beside what the simulator says of it."""
    costs = measured_costs(real, menu)
    asked = [(one.at, one.key) for one in sorted(real.asked, key=lambda one: one.at)]
    plan = Plan(
        workers=real.fleet.workers,
        costs=costs,
        ahead=menu.keys[:1],
        places=1,
        seconds=asked[-1][0] + SLACK,
        routers=real.fleet.routers if real.policy == "ours" else 1,
    )
    problems = Counter(one.answer.problem for one in real.asked if one.answer.problem)
    return Comparison(real, costs, measured(real, costs), predicted(simulate(plan, real.policy, asked)), problems)


def measured_costs(real: Real, menu: Menu) -> Costs:
    """The means of a run."""
    made = real.made
    hot = {str(key): [one.device for one in made if one.hot and one.key == str(key)] for key in menu.keys}
    anyhow = _mean([seconds for all_of_it in hot.values() for seconds in all_of_it])
    videos = {key: _mean(hot[str(key)], anyhow) for key in menu.keys}
    usual = {str(key): seconds for key, seconds in videos.items()}
    trace = _mean([one.device - usual[one.key] for one in made if not one.hot])
    good = [one for one in real.asked if not one.answer.problem]
    # What the client waits for besides the worker: the frontend, the router, and the way there and back.
    outside = _mean([one.answer.seconds for one in good]) - _mean([one.queue + one.device + one.encode for one in made])
    return Costs(
        videos=videos,
        warm_ups=videos,  # of the start, which does not count
        ready=_mean([seconds for log in real.logs for seconds in log.ready]),
        trace=trace,
        encode=_mean([one.encode for one in made]) + max(0.0, outside),
        end=_mean([seconds for log in real.logs for seconds in log.ends]),
        hot_spread=[one.device / usual[one.key] for one in made if one.hot] or [1.0],
        start_spread=[one.device / (usual[one.key] + trace) for one in made if not one.hot] or [1.0],
    )


def measured(real: Real, costs: Costs) -> Figures:
    """Of a real run."""
    good = [one for one in real.asked if not one.answer.problem]
    took = [one.answer.seconds for one in good]
    waits = [max(0.0, one.answer.seconds - costs.videos[one.key] - costs.encode) for one in good]
    return _figures(took, waits, sum(one.hot for one in real.made), real.spawns, real.seconds)


def predicted(outcome: Outcome) -> Figures:
    """Of a simulated one."""
    return _figures(outcome.took, outcome.waits, outcome.hot, outcome.spawns, outcome.ended)


def _figures(took: Iterable[float], waits: Iterable[float], hot: int, spawns: int, seconds: float) -> Figures:
    took, waits = sorted(took), sorted(waits)
    return {
        "hot hits %": 100 * hot / max(1, len(took)),
        "spawns": spawns,
        "videos an hour": 3600 * len(took) / seconds if seconds else 0.0,
        "mean s to the video": _mean(took),
        "p50 s to the video": _percentile(took, 0.50),
        "p99 s to the video": _percentile(took, 0.99),
        "p50 wait s": _percentile(waits, 0.50),
        "p99 wait s": _percentile(waits, 0.99),
    }


def _mean(values: Sequence[float], otherwise: float = 0.0) -> float:
    return statistics.fmean(values) if values else otherwise


def _percentile(ordered: Sequence[float], p: float) -> float:
    """By nearest rank; 0 of nothing."""
    return ordered[min(len(ordered) - 1, int(p * len(ordered)))] if ordered else 0.0


def show(comparisons: Sequence[Comparison], console: Console) -> None:
    """A table: what was measured and what was predicted, for each policy."""
    table = Table("")
    for one in comparisons:
        for heading in (f"{one.real.policy}: measured", "predicted", "÷"):
            table.add_column(heading, justify="right")
    for name in comparisons[0].measured:
        row = []
        for one in comparisons:
            was, said = one.measured[name], one.predicted[name]
            row += [_number(was), _number(said), f"{said / was:.2f}" if was else ""]
        table.add_row(name, *row)
    table.add_section()
    failures = [[str(one.problems.total()), "", ""] for one in comparisons]
    table.add_row("requests without a video", *itertools.chain.from_iterable(failures))
    console.print(table)
    for one in comparisons:
        costs = one.costs
        videos = ", ".join(f"{key} {seconds:.2f}" for key, seconds in costs.videos.items())
        console.print(
            f"{one.real.policy}: hot on the device {videos} s; a start {costs.end + costs.ready:.2f} s and "
            f"{costs.trace:.2f} s of tracing; the rest {costs.encode:.2f} s"
        )
        for problem, number in one.problems.most_common(5):
            console.print(f"{number} x {problem}", style="red", markup=False)


def _number(value: float) -> str:
    return f"{value:,.2f}" if value < 100 and value != int(value) else f"{value:,.0f}"


def _rounded(*seconds: float) -> list[float]:
    return [round(value, 3) for value in seconds]


def write(comparisons: Sequence[Comparison], rate: float, seed: int, out: Path) -> Path:
    """The figures, the costs and the requests as JSON, in a directory."""
    out.mkdir(parents=True, exist_ok=True)
    first = comparisons[0].real
    record: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "workers": first.fleet.workers,
        "requests": len(first.asked),
        "rate": rate,
        "seed": seed,
        "policies": {
            one.real.policy: {
                "measured": one.measured,
                "predicted": one.predicted,
                "failures": dict(one.problems),
                "costs": {
                    **{name: value for name, value in vars(one.costs).items() if isinstance(value, float)},
                    "videos": {str(key): seconds for key, seconds in one.costs.videos.items()},
                },
                "seconds": [round(answer.answer.seconds, 3) for answer in sorted(one.real.asked, key=lambda a: a.at)],
                "made": [
                    [made.key, made.hot, *_rounded(made.queue, made.device, made.encode)] for made in one.real.made
                ],
            }
            for one in comparisons
        },
    }
    report = out / "calibration.json"
    report.write_text(json.dumps(record, indent=1) + "\n")
    return report
