"""``benchmark.py menu-report``: which shapes earn their memory, from a worker's metrics."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

_GIB = 2**30
RARE = 0.01
"""A shape with a smaller share of the jobs than this is not worth a process that is always hot."""
GPU_PHASES = ("text", "denoise", "decode")


class AdviceError(Exception):
    """These are not the metrics of a worker."""


@dataclass(frozen=True)
class Line:
    """One shape since the worker's start."""

    shape_key: str
    jobs: int
    share: float
    """Of all jobs."""
    gpu_s: float
    """Time on the GPU, in all."""
    spawns: int
    evictions: int
    resident: float
    """Bytes that its process keeps between jobs; 0 when it never ran."""
    peak: float
    """Bytes at most during a job."""
    advice: str


@dataclass(frozen=True)
class MenuReport:
    """What the counters say of a menu."""

    lines: tuple[Line, ...]
    hours: float | None
    """For how long the worker has counted."""
    notes: tuple[str, ...]


def read(source: str) -> str:
    """The text of a metrics page, by URL or file name. Raises OSError, httpx.HTTPError."""
    if source.startswith(("http://", "https://")):
        return httpx.get(source, timeout=10).raise_for_status().text
    return Path(source).read_text()


def report(text: str) -> MenuReport:
    """Judge each shape. Raises AdviceError when the text has no pool's series."""
    series: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    phases: dict[str, float] = defaultdict(float)
    uptime = 0.0
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                key = sample.labels.get("shape_key", "")
                name = sample.name
                if name == "ltx2_pool_memory_bytes":
                    name += f" {sample.labels['kind']}"
                if name == "ltx2_pool_phase_seconds_sum" and sample.labels["phase"] in GPU_PHASES:
                    phases[key] += sample.value
                elif name == "dynamo_component_uptime_seconds":
                    uptime = max(uptime, sample.value)
                elif name.startswith("ltx2_pool_") and key:
                    series[name][key] += sample.value
    except (ValueError, KeyError) as error:
        raise AdviceError(f"not the text of a Prometheus metrics page: {error}") from None
    jobs = series["ltx2_pool_request_total"]
    if not jobs:
        raise AdviceError("there is no ltx2_pool_request_total: is it the system port of a worker?")
    total = sum(jobs.values())
    notes = []
    lines = []
    for key in sorted(jobs, key=lambda k: -jobs[k]):
        share = jobs[key] / total if total else 0.0
        resident = series["ltx2_pool_memory_bytes resident"][key]
        if not total:
            advice = "no traffic yet"
        elif not jobs[key]:
            advice = "drop: nobody asks for it"
        elif share < RARE:
            advice = f"leave out of LTX2_POOL_PREWARM: under {RARE:.0%} of the jobs"
        else:
            advice = "keep"
        lines.append(
            Line(
                key,
                int(jobs[key]),
                share,
                phases[key],
                int(series["ltx2_pool_spawn_total"][key]),
                int(series["ltx2_pool_eviction_total"][key]),
                resident,
                series["ltx2_pool_memory_bytes peak"][key],
                advice,
            )
        )
    idle = [line for line in lines if line.advice.startswith(("drop", "leave"))]
    if freed := sum(line.resident for line in idle):
        notes.append(f"{len(idle)} shapes hold {freed / _GIB:.1f} GiB for {sum(line.jobs for line in idle)} jobs")
    if lines and total:
        largest = max(lines, key=lambda line: line.peak)
        rest = max((line.peak for line in lines if line is not largest), default=0.0)
        if largest in idle and largest.peak > rest:
            notes.append(
                f"{largest.shape_key} sets the room that is kept for a running job: without it "
                f"{(largest.peak - rest) / _GIB:.1f} GiB less for each"
            )
    evictions = sum(line.evictions for line in lines)
    if total and evictions > total / 20:
        notes.append(
            f"{evictions} evictions for {total:.0f} jobs: shapes push each other out; raise "
            "LTX2_POOL_MAX_SIZE, lower LTX2_POOL_MEMORY_RESERVE, or shorten the menu"
        )
    return MenuReport(tuple(lines), uptime / 3600 if uptime else None, tuple(notes))


def show(found: MenuReport, console: Console) -> None:
    """Print a line for each shape, most asked for first."""
    since = f", {found.hours:.1f} hours" if found.hours is not None else ""
    table = Table(
        "shape",
        "jobs",
        "share",
        "on the GPU",
        "per GiB kept",
        "spawns",
        "evicted",
        "GiB between jobs",
        "at most",
        "advice",
        title=f"menu report{since}",
    )
    for line in found.lines:
        worth = f"{line.jobs / (line.resident / _GIB):.0f} jobs" if line.resident else ""
        colour = "green" if line.advice == "keep" else "yellow"
        table.add_row(
            line.shape_key,
            str(line.jobs),
            f"{line.share:.1%}",
            f"{line.gpu_s:.0f} s",
            worth,
            str(line.spawns),
            str(line.evictions),
            f"{line.resident / _GIB:.2f}" if line.resident else "never ran",
            f"{line.peak / _GIB:.2f}" if line.peak else "",
            f"[{colour}]{line.advice}[/]",
        )
    console.print(table)
    for note in found.notes:
        console.print(note)
