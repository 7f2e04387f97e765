"""``benchmark.py compare --stock``: a table, files and a picture of what the rivals measure (:mod:`.rivals`)."""

from __future__ import annotations

import csv
import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from ltx2_pool.tools.bench import rivals
from ltx2_pool.tools.bench.compare import CompareError
from ltx2_pool.words.device import Device
from ltx2_pool.words.recipe import Recipe, RecipeError

QUANTIZED = "pool, quantized"
PARTS = ("text", "denoise", "decode", "encode")
UNSTEADY = 1.25
"""A median that is so many times the fastest video is doubtful."""


@dataclass(frozen=True)
class Row:
    """One shape made in one way, a line of compare-stock.csv; seconds, and None for what was not measured."""

    shape: str
    way: str
    load_s: float | None
    first_s: float | None
    first_hot_to_steady: float | None
    """The first video of a process that is READY over a steady one; of a pool."""
    steady_s: float | None
    """The median."""
    fastest_s: float | None
    text_s: float | None
    denoise_s: float | None
    decode_s: float | None
    encode_s: float | None
    other_s: float | None
    """What the phases leave of a steady video."""
    ratio_to_stock: float | None
    """Of the steady seconds."""
    problem: str
    """Why there are no steady seconds."""

    @property
    def parts(self) -> dict[str, float]:
        """What the steady seconds consist of, as far as that is known; empty when there are none."""
        found = {name: seconds for name in PARTS if (seconds := getattr(self, f"{name}_s")) is not None}
        if self.other_s is not None:
            return {**found, "other": self.other_s}
        return {} if self.steady_s is None else {"all phases": self.steady_s}


def choose(asked: Sequence[str] | None, here: Device) -> tuple[list[str], dict[str, str]]:
    """The ways to measure, stock first, and why others are left out.

    Raises CompareError when one that was asked for cannot be had on this device.
    """
    left_out = {}
    if not here.is_gpu:
        left_out[QUANTIZED] = "a CPU computes FP8 by way of bfloat16, so nothing would be gained"
    else:
        try:
            Recipe(model_path="", quantization="auto").on(here.capability)
        except RecipeError:
            left_out[QUANTIZED] = f"a GPU of compute capability {here.capability} has no FP8"
    for way in asked or ():
        if way in left_out:
            raise CompareError(f"--ways {way!r}: {left_out[way]}")
    ways = [way for way in rivals.WAYS if way == "stock" or (way in asked if asked else way not in left_out)]
    return ways, left_out if asked is None else {}


def check(model: Path) -> None:
    """Raise CompareError when the directory is no checkpoint, before every way finds that out by itself."""
    if not (model / "model_index.json").is_file():
        raise CompareError(f"{model} is not a checkpoint: it has no model_index.json")


def run(videos: rivals.Videos, ways: Sequence[str], tell: Callable[[str], None]) -> dict[str, Any]:
    """As :func:`rivals.run` returns it, one way after the other, with what they have in common."""
    caches = {way: rivals.cache(videos.cache_root, way) for way in ways}
    kept = [way for way, cache in caches.items() if cache.is_dir() and any(cache.iterdir())]
    common = {"model": videos.recipe.model_path, "prompt": rivals.PROMPT, "seed": rivals.SEED, "asked": list(ways)}
    return {**common, "caches_kept_from_before": kept, **rivals.run(videos, [[way] for way in ways], tell)}


def rows(result: Mapping[str, Any]) -> list[Row]:
    """By shape, and in the order in which the ways were asked for."""
    return [_row(result, shape, way) for shape in result["shapes"] for way in result["asked"]]


def _row(result: Mapping[str, Any], shape: str, way: str) -> Row:
    of_way = result["ways"].get(way, {})
    found = of_way.get(shape, {})
    steady = statistics.median(found["steady_s"]) if "steady_s" in found else None
    first_hot = found.get("first_hot_s")
    parts = {name: found.get("parts", {}).get(name) for name in PARTS}
    known = [seconds for seconds in parts.values() if seconds is not None]
    return Row(
        shape=shape,
        way=way,
        load_s=of_way.get("load", {}).get("s"),
        first_s=found.get("first_s"),
        first_hot_to_steady=first_hot / steady if first_hot is not None and steady else None,
        steady_s=steady,
        fastest_s=min(found["steady_s"], default=None) if "steady_s" in found else None,
        **{f"{name}_s": seconds for name, seconds in parts.items()},
        other_s=max(0.0, steady - sum(known)) if steady is not None and known else None,
        ratio_to_stock=rivals.ratio(result, way, shape),
        problem="" if steady is not None else _short(result["problems"].get(way, "not measured")),
    )


def _short(problem: str) -> str:
    """Its first line, and the last one of the log that follows."""
    first, *log = [line.strip() for line in problem.splitlines() if line.strip()]
    return " ".join([first, *log[-1:]])


def show(result: Mapping[str, Any], on_gpu: bool, console: Console) -> None:
    """Print the tables, why something is not in them, and what the numbers mean."""
    lines = rows(result)
    overall = _table(
        lines,
        f"{result['steps']} steps, steady is the median of {result['repeat']}: seconds on {result['device']}",
        {
            "load": lambda row: _s(row.load_s),
            "first": lambda row: _s(row.first_s),
            "first hot\n/ steady": lambda row: _ratio(row.first_hot_to_steady),
            "steady": lambda row: "[red]failed[/]" if row.steady_s is None else _s(row.steady_s),
            "steady\n/ stock": lambda row: _ratio(row.ratio_to_stock),
        },
    )
    parts = _table(
        lines,
        "what a steady video consists of: seconds",
        {
            "text": lambda row: _s(row.text_s),
            "denoise": lambda row: _s(row.denoise_s),
            "decode": lambda row: _s(row.decode_s),
            "encode": lambda row: _s(row.encode_s),
            "other": lambda row: _s(row.other_s),
        },
    )
    console.print(overall)
    console.print(parts)
    for way, why in result["left_out"].items():
        console.print(f"{way} is left out: {why}.", markup=False)
    for problem in dict.fromkeys(row.problem for row in lines if row.problem):
        console.print(problem, style="red", markup=False)
    for row in lines:
        if row.steady_s is not None and row.fastest_s is not None and row.steady_s > UNSTEADY * row.fastest_s:
            console.print(
                f"Not steady, is the device shared? {row.way}, {row.shape}: the median is {_s(row.steady_s)} s, the "
                f"fastest {_s(row.fastest_s)} s.",
                style="yellow",
                markup=False,
                highlight=False,
            )
    console.print(note(result, on_gpu), markup=False, highlight=False)


def _table(lines: Sequence[Row], title: str, columns: Mapping[str, Callable[[Row], str]]) -> Table:
    table = Table(Column("shape", no_wrap=True), Column("way", min_width=10), title=title)
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    for shape, of_shape in itertools.groupby(lines, key=lambda row: row.shape):
        table.add_section()
        for number, row in enumerate(of_shape):
            table.add_row("" if number else shape, row.way, *(cell(row) for cell in columns.values()))
    return table


def _s(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.3f}" if seconds < 10 else f"{seconds:.1f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def note(result: Mapping[str, Any], on_gpu: bool) -> str:
    """What was the same for all ways, what was not, and what the columns mean."""
    kept = ", ".join(result["caches_kept_from_before"])
    sentences = [
        f"The same for all: checkpoint, prompt, seed {result['seed']}, {result['steps']} steps of one pass through the "
        "transformer each, one way after the other on the same device.",
        "Not the same: stock ends with the frames made and writes no file; the others end with the MP4 in a file.",
        *([] if on_gpu else ["Stock runs in this project's executor, because FastVideo's own cannot run on a CPU."]),
        "first: the first video, with what had to be compiled for it; of a pool, with its process's start and warm-up "
        "video.",
        f"Compile caches from earlier runs, of these shapes or others: {kept or 'none'}.",
        "decode: with the encoding of the frames that have arrived; encode: what is left of it after the last frame; "
        "other: what the phases leave of the steady seconds.",
    ]
    return "\n".join(sentences)


def write(result: Mapping[str, Any], out: Path) -> list[Path]:
    """compare-stock.json, .csv and .png; returns what was written. Raises OSError."""
    from ltx2_pool.tools.bench import plots

    lines = rows(result)
    figures, table = out / "compare-stock.json", out / "compare-stock.csv"
    figures.write_text(json.dumps({**result, "rows": [asdict(row) for row in lines]}, indent=1) + "\n")
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(Row.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(row) for row in lines)
    about = f"{result['steps']} steps, median of {result['repeat']}, on {result['device']}"
    return [figures, table, plots.phases(lines, about, out / "compare-stock.png")]
