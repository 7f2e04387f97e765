"""``benchmark.py load``: requests against a running frontend, open or closed loop, and what its clients saw."""

from __future__ import annotations

import asyncio
import csv
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Column, Table

from ltx2_pool.tools.bench.client import Client, Sample, Watch
from ltx2_pool.tools.bench.results import Level, Record, Result
from ltx2_pool.words.menu import Menu
from ltx2_pool.words.shapes import Shape


def weights(menu: Menu, mix: str) -> dict[Shape, float]:
    """What share of the requests each shape gets: `uniform`, `zipf` (1/rank in the menu's order), or a YAML file of
    ``shape key: weight``. Raises ValueError with what is wrong, OSError."""
    if mix == "uniform":
        return dict.fromkeys(menu.shapes, 1.0)
    if mix == "zipf":
        return {shape: 1 / rank for rank, shape in enumerate(menu.shapes, 1)}
    try:
        entries = yaml.safe_load(Path(mix).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{mix}: {error}") from None
    shapes = {shape.key: shape for shape in menu.shapes}
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{mix}: lines of 'shape key: weight' are needed, for instance '{menu.shapes[0].key}: 3'")
    for key, weight in entries.items():
        if key not in shapes:
            raise ValueError(f"{mix}: {key} is not on the menu, which has {', '.join(shapes)}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise ValueError(f"{mix}: the weight of {key} must be a number above 0, not {weight!r}")
    return {shapes[key]: float(weight) for key, weight in entries.items()}


def sequence(shares: dict[Shape, float], block: int, seed: int) -> Iterator[Shape]:
    """Shapes without end, each block of them in the given shares (largest remainders) and in a random order."""
    rng = random.Random(seed)
    total = sum(shares.values())
    exact = {shape: block * share / total for shape, share in shares.items()}
    counts = {shape: int(number) for shape, number in exact.items()}
    for shape in sorted(exact, key=lambda s: counts[s] - exact[s])[: block - sum(counts.values())]:
        counts[shape] += 1
    while True:
        shapes = [shape for shape, count in counts.items() for _ in range(count)]
        rng.shuffle(shapes)
        yield from shapes


async def run(
    client: Client,
    watch: Watch,
    level: Level,
    shapes: Iterator[Shape],
    number: int | None,
    duration: float | None,
    seed: int,
    on_answer: Callable[[], None],
) -> Result:
    """Push at one level until `number` requests were sent or `duration` seconds have passed, and await all answers."""
    rng = random.Random(seed)
    began = time.monotonic()
    records: list[Record] = []
    todo = zip(itertools.count() if number is None else range(number), shapes, strict=False)

    async def one(index: int, shape: Shape) -> None:
        sent, state = time.monotonic() - began, watch.state(shape)
        answer = await client.ask(shape, index)
        records.append(
            Record(
                str(level),
                index,
                shape.key,
                state,
                sent,
                answer.seconds,
                answer.wait_s,
                answer.status,
                len(answer.data),
                answer.problem,
            )
        )
        on_answer()

    def time_left() -> bool:
        return duration is None or time.monotonic() - began < duration

    async def ask_again() -> None:
        for index, shape in todo:
            await one(index, shape)
            if not time_left():
                return

    async with asyncio.TaskGroup() as group:
        if level.rate is None:
            for _ in range(level.concurrency or 1):
                group.create_task(ask_again())
        else:
            due = began
            for index, shape in todo:
                due += rng.expovariate(level.rate)
                await asyncio.sleep(due - time.monotonic())
                if not time_left():
                    break
                group.create_task(one(index, shape))
    samples = [Sample(s.at - began, s.states, s.waiting, s.running) for s in watch.samples if s.at >= began]
    return Result(level, time.monotonic() - began, sorted(records, key=lambda r: r.sent_s), samples)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99, by linear interpolation; empty for no values."""
    if not seconds:
        return {}
    return {f"p{p}": float(np.percentile(seconds, p)) for p in (50, 90, 99)}


def summary(result: Result) -> dict[str, Any]:
    """The figures of one level: in all and by shape."""

    def of(records: list[Record]) -> dict[str, Any]:
        good = [r for r in records if not r.problem]
        hot = [r.seconds for r in good if r.state != "cold"]
        cold = [r.seconds for r in good if r.state == "cold"]
        return {
            "requests": len(records),
            "videos": len(good),
            "hot": {"videos": len(hot), **percentiles(hot)},
            "cold": {"videos": len(cold), **percentiles(cold)},
            "wait": percentiles([r.wait_s for r in good if r.wait_s is not None]),
            "failures": dict(Counter(str(r.status) for r in records if r.problem)),
        }

    keys = dict.fromkeys(r.shape for r in result.records)
    return {
        "level": str(result.level),
        "seconds": result.seconds,
        "videos_per_minute": result.videos_per_minute,
        **of(result.records),
        "shapes": {key: of([r for r in result.records if r.shape == key]) for key in sorted(keys)},
    }


def show(results: Sequence[Result], console: Console) -> None:
    """Print a table for each level."""
    for result in results:
        figures = summary(result)
        table = Table(
            Column("shape", no_wrap=True),
            "videos",
            "hot p50",
            "p90",
            "p99",
            "cold",
            "p50",
            "wait",
            "p90",
            "failed",
            title=f"{result.level}: {figures['videos_per_minute']:.1f} videos a minute, {result.seconds:.0f} s",
            caption="seconds; wait: all but the making, so the queue and the way there and back",
        )
        for key, of in [*figures["shapes"].items(), ("all", figures)]:
            if key == "all":
                table.add_section()
            failures = ", ".join(f"{n} x {status}" for status, n in sorted(of["failures"].items()))
            table.add_row(
                key,
                f"{of['videos']}/{of['requests']}",
                *(_s(of["hot"], p) for p in ("p50", "p90", "p99")),
                str(of["cold"]["videos"] or ""),
                _s(of["cold"], "p50"),
                _s(of["wait"], "p50"),
                _s(of["wait"], "p90"),
                f"[red]{failures}[/]",
            )
        console.print(table)
        for problem, number in Counter(r.problem for r in result.records if r.problem).most_common(5):
            console.print(f"{number} x {problem}", style="red", markup=False)


def _s(figures: dict[str, float], name: str) -> str:
    return f"{figures[name]:.2f}" if name in figures else ""


def write(results: Sequence[Result], about: dict[str, Any], menu: Menu, out: Path) -> list[Path]:
    """requests.csv, summary.json and the pictures; returns what was written. Raises OSError."""
    from ltx2_pool.tools.bench import plots

    out.mkdir(parents=True, exist_ok=True)
    table, figures = out / "requests.csv", out / "summary.json"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(Record.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(record) for result in results for record in result.records)
    levels = [summary(result) for result in results]
    figures.write_text(json.dumps({**about, "levels": levels}, indent=1) + "\n")
    order = [shape.key for shape in menu.shapes]
    return [
        table,
        figures,
        plots.latency(results, order, out / "latency.png"),
        plots.timeline(results[-1], order, out / "timeline.png"),
        *([plots.throughput(results, out / "throughput.png")] if len(results) > 1 else []),
    ]
