"""The pictures of ``benchmark.py load``, and those of ``compare --stock``, ``fleet`` and ``soak``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import Patch

from ltx2_pool.tools.bench.client import Sample

if TYPE_CHECKING:
    from ltx2_pool.fleet.simulator import Outcome
    from ltx2_pool.tools.bench.results import Result
    from ltx2_pool.tools.bench.soak import Sample as Held
    from ltx2_pool.tools.bench.stock import Row

HOT, COLD, FAILED, WAIT = "#1f77b4", "#ff7f0e", "#d62728", "#9aa0a6"
STATES = {
    "loading": "#fff3cd",
    "spawning": "#ffe8a3",
    "ready": "#e3f1e3",
    "generating": "#a5d6a7",
    "encoding": "#c8e6c9",
    "draining": "#f5cba7",
}

PHASES = {
    "text": "#4c78a8",
    "denoise": "#f58518",
    "decode": "#54a24b",
    "encode": "#b279a2",
    "other": "#bab0ac",
    "all phases": "#72797f",
}
"""The parts of a bar, from the bottom up."""


def latency(results: Sequence[Result], order: Sequence[str], path: Path) -> Path:
    """Every request's seconds by shape, a panel for each level, with p50 and p90."""
    figure, panels = pyplot.subplots(
        1,
        len(results),
        figsize=(max(6.5, 4.2 * len(results)), 1.6 + 0.55 * len(order)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    rng = np.random.default_rng(0)
    for axes, result in zip(panels[0], results, strict=True):
        for row, key in enumerate(order):
            good = [r for r in result.good if r.shape == key]
            for colour, cold in ((HOT, False), (COLD, True)):
                seconds = [r.seconds for r in good if (r.state == "cold") == cold]
                axes.scatter(
                    seconds, row + rng.uniform(-0.22, 0.22, len(seconds)), s=14, color=colour, alpha=0.6, linewidths=0
                )
            if good:
                for p, style in ((50, "-"), (90, ":")):
                    at = float(np.percentile([r.seconds for r in good], p))
                    axes.plot([at, at], [row - 0.36, row + 0.36], style, color="black", linewidth=1.6)
        axes.set_title(f"{result.level}\n{result.videos_per_minute:.1f} videos/min", fontsize=10)
        if result.good:  # there is no logarithm of nothing
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
        axes.grid(axis="x", alpha=0.3)
        axes.set_xlabel("seconds from request to video")
    panels[0][0].set_yticks(range(len(order)), order)
    panels[0][0].set_ylim(len(order) - 0.5, -0.5)
    handles = [
        mpl.lines.Line2D([], [], marker="o", linestyle="", color=HOT, label="hot shape"),
        mpl.lines.Line2D([], [], marker="o", linestyle="", color=COLD, label="cold shape"),
        mpl.lines.Line2D([], [], color="black", label="p50"),
        mpl.lines.Line2D([], [], color="black", linestyle=":", label="p90"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle("Latency by shape", fontweight="bold")
    return _save(figure, path)


def timeline(result: Result, order: Sequence[str], path: Path) -> Path:
    """What each shape's process did, the jobs above it, and how many waited."""
    figure, (top, bottom) = pyplot.subplots(
        2,
        1,
        figsize=(11, 2.6 + 0.7 * len(order)),
        sharex=True,
        layout="constrained",
        gridspec_kw={"height_ratios": [max(2.0, 0.7 * len(order)), 1]},
    )
    for row, key in enumerate(order):
        for begin, end, state in _spans(result.samples, key):
            top.broken_barh([(begin, end - begin)], (row - 0.45, 0.9), color=STATES.get(state, "white"), linewidth=0)
        lanes: list[float] = []
        for record in (r for r in result.records if r.shape == key):
            lane = next((i for i, free in enumerate(lanes) if free <= record.sent_s), len(lanes))
            lanes[lane : lane + 1] = [record.sent_s + record.seconds]
            height = row - 0.32 + 0.16 * (lane % 5)
            waited = min(record.wait_s or 0.0, record.seconds)
            colour = FAILED if record.problem else COLD if record.state == "cold" else HOT
            top.plot([record.sent_s, record.sent_s + waited], [height, height], color=WAIT, linewidth=1.2)
            top.plot(
                [record.sent_s + waited, record.sent_s + record.seconds],
                [height, height],
                color=colour,
                linewidth=3,
                solid_capstyle="butt",
            )
    top.set_yticks(range(len(order)), order)
    top.set_ylim(len(order) - 0.5, -0.5)
    top.set_title(f"Processes and jobs: {result.level}", fontweight="bold")
    handles = [Patch(color=colour, label=f"process {state}") for state, colour in STATES.items()]
    handles += [
        Patch(color=c, label=text)
        for c, text in (
            (WAIT, "job waits or travels"),
            (HOT, "job runs"),
            (COLD, "job of a cold shape"),
            (FAILED, "job failed"),
        )
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    at = [s.at for s in result.samples]
    bottom.stackplot(
        at,
        [s.running for s in result.samples],
        [s.waiting for s in result.samples],
        colors=[STATES["generating"], WAIT],
        labels=["generating", "waiting"],
        step="post",
    )
    bottom.legend(loc="upper right", frameon=False, fontsize=9)
    bottom.set_ylabel("jobs")
    bottom.set_xlabel("seconds")
    bottom.set_xlim(0, result.seconds)
    bottom.yaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    return _save(figure, path)


def throughput(results: Sequence[Result], path: Path) -> Path:
    """Videos per minute and latency against the load."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    load = [result.level.load for result in results]
    unit = "requests per second" if results[0].level.rate is not None else "clients that ask again and again"
    left.plot(load, [result.videos_per_minute for result in results], "o-", color=HOT)
    if results[0].level.rate is not None:
        left.plot(load, [60 * rate for rate in load], ":", color=WAIT, label="asked for")
        left.legend(frameon=False)
    left.set_ylabel("videos per minute")
    left.set_ylim(bottom=0)
    for p, style in ((50, "o-"), (90, "o--"), (99, "o:")):
        values: list[float] = [
            float(np.percentile([r.seconds for r in result.good], p)) if result.good else float("nan")
            for result in results
        ]
        right.plot(load, values, style, color="black", alpha=1 - (p - 50) / 90, label=f"p{p}")
    right.set_ylabel("seconds from request to video")
    right.set_ylim(bottom=0)
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set_xlabel(unit)
        axes.set_xticks(load, [f"{value:g}" for value in load])
        axes.grid(alpha=0.3)
    figure.suptitle("Throughput against load", fontweight="bold")
    return _save(figure, path)


def phases(rows: Sequence[Row], about: str, path: Path) -> Path:
    """A steady video's seconds of each way, stacked by phase, with the ratio to stock above; a panel for each shape."""
    ways = list(dict.fromkeys(row.way for row in rows))
    keys = list(dict.fromkeys(row.shape for row in rows))
    across = min(3, len(keys))
    down = -(-len(keys) // across)
    width = max(6.0, across * (0.8 + 1.1 * len(ways)))
    figure, panels = pyplot.subplots(
        down, across, figsize=(width, 1.7 + 3.2 * down), squeeze=False, layout="constrained"
    )
    for axes in panels.flat[len(keys) :]:
        axes.set_visible(False)
    for axes, key in zip(panels.flat, keys, strict=False):
        highest = max(sum(row.parts.values()) for row in rows if row.shape == key) or 1.0
        for row in (row for row in rows if row.shape == key):
            _bar(axes, ways.index(row.way), row, highest)
        axes.set_title(key, fontsize=10)
        axes.set_xticks(range(len(ways)), [way.replace(", ", ",\n") for way in ways])
        axes.set_xlim(-0.6, len(ways) - 0.4)
        axes.set_ylim(0, 1.22 * highest)  # room for what is written above
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    for axes in panels[:, 0]:
        axes.set_ylabel("seconds")
    drawn = {name for row in rows for name in row.parts}
    handles = [Patch(color=colour, label=name) for name, colour in PHASES.items() if name in drawn]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=3 * across, frameon=False, fontsize=9)
    figure.suptitle(f"Seconds of a hot video, by phase\n{textwrap.fill(about, int(9 * width))}", fontsize=11)
    return _save(figure, path)


def _bar(axes: Any, at: int, row: Row, highest: float) -> None:
    """One way's bar, or why there is none."""
    if row.steady_s is None:
        axes.text(at, 0.03 * highest, "failed", color=FAILED, ha="center", va="bottom")
        return
    bottom = 0.0
    for name, colour in PHASES.items():
        seconds = row.parts.get(name, 0.0)
        axes.bar(at, seconds, 0.7, bottom, color=colour)
        bottom += seconds
    label = f"{row.steady_s:.3f} s" if row.steady_s < 10 else f"{row.steady_s:.1f} s"
    if row.ratio_to_stock is not None and row.way != "stock":
        label = f"{row.ratio_to_stock:.2f} × stock\n{label}"
    axes.text(at, bottom + 0.02 * highest, label, ha="center", va="bottom", fontsize=9)


def fleet(outcomes: Sequence[Outcome], about: str, path: Path) -> Path:
    """The share of videos that waited longer than so long, by policy; beside it spawns and cold hits."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), width_ratios=(2, 1), layout="constrained")
    for outcome, colour in zip(outcomes, (WAIT, COLD, HOT), strict=True):
        waits = np.sort(np.asarray(outcome.waits))
        above = 1 - np.arange(len(waits)) / max(1, len(waits))
        step = max(1, len(waits) // 5000)  # a day has a million
        left.plot(waits[::step], 100 * above[::step], color=colour, label=outcome.policy)
    left.set_yscale("log")
    left.set_xscale("symlog", linthresh=1)
    left.set_xlabel("seconds of wait (to the video, less its own seconds)")
    left.set_ylabel("% of videos that waited longer")
    left.set_xlim(left=0)
    left.legend(frameon=False)
    figures = [outcome.figures() for outcome in outcomes]
    places = np.arange(len(outcomes))
    for offset, name in ((-0.2, "spawns per 1,000 videos"), (0.2, "p99 wait s")):
        bars = right.bar(places + offset, [values[name] for values in figures], 0.38, label=name)
        right.bar_label(bars, fmt="%.0f", fontsize=8)
    right.set_xticks(places, [outcome.policy for outcome in outcomes])
    right.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    figure.suptitle(f"Routing: {about}", fontweight="bold")
    return _save(figure, path)


def _spans(samples: Sequence[Sample], key: str) -> Iterator[tuple[float, float, str]]:
    """Begin, end and state of each stretch of time for which a shape had a process."""
    for one, following in pairwise(samples):
        if state := one.states.get(key):
            yield one.at, following.at, state


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


HELD = {
    "bytes": "memory, MB",
    "descriptors": "descriptors",
    "processes": "processes",
    "zombies": "zombies",
    "files": "files",
}


def held(samples: Sequence[Held], path: Path) -> Path:
    """What each program held over the run: a column for each, a row for each kind."""
    programs = list(dict.fromkeys(sample.program for sample in samples))
    figure, panels = pyplot.subplots(
        len(HELD), len(programs), figsize=(3.2 * len(programs), 8), sharex=True, squeeze=False, layout="constrained"
    )
    for column, program in enumerate(programs):
        own = [sample for sample in samples if sample.program == program]
        for axes, (kind, label) in zip(panels[:, column], HELD.items(), strict=True):
            values = [getattr(sample, kind) / (1e6 if kind == "bytes" else 1) for sample in own]
            axes.plot([sample.jobs for sample in own], values, color=HOT, linewidth=0.8)
            axes.set_ylim(bottom=0, top=max(1.0, 1.15 * max(values)))
            if not column:
                axes.set_ylabel(label)
        panels[0][column].set_title(program)
        panels[-1][column].set_xlabel("jobs that have ended")
    return _save(figure, path)
