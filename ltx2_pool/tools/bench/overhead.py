"""``benchmark.py overhead``: what the router adds to a request, as a difference in one run.

Two frontends run side by side, one with a worker of its own and one with a router between; the worker answers at once.
They are asked by turns, so that whatever else the machine does meets both.
"""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from ltx2_pool.tools.fleetstack import FleetStack
from ltx2_pool.tools.stack import TINY_MENU
from ltx2_pool.words.menu import Menu

ECHO = (sys.executable, "-m", "ltx2_pool.tools.bench.echoworker")
SIZES = (100, 2_000_000)
"""Bytes of the answer's video, in base64."""
WARM_UP = 20


@dataclass(frozen=True)
class Overhead:
    """Of one size of answers; seconds."""

    size: int
    alone: Sequence[float]
    routed: Sequence[float]
    cpu: float
    """Of the router's process, for each request."""

    def added(self, percent: int) -> float:
        """What the router adds at that percentile. On a busy machine the 10th is nearest to what a quiet one shows."""
        return _percentile(self.routed, percent) - _percentile(self.alone, percent)


def run(requests: int, on_answer: Callable[[], None]) -> list[Overhead]:
    """Each size of answers in turn, that many of each way. Raises StackError, HTTPError."""
    with contextlib.ExitStack() as cleanup:
        work = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="ltx2-overhead-")))
        ways = [
            cleanup.enter_context(
                FleetStack(work / name, work, TINY_MENU, work, workers=1, routers=routers, program=ECHO)
            )
            for name, routers in (("alone", 0), ("routed", 1))
        ]
        router = psutil.Process(ways[1].routers[0].pid)
        chance = random.Random(0)
        found = []
        for size in SIZES:
            for _ in range(WARM_UP):
                for way in ways:
                    _ask(way.client, size)
            alone, routed, before = [], [], router.cpu_times()
            for _ in range(requests):
                # In a random order: whoever comes second finds the other one's threads still awake.
                took = {way: _ask(way.client, size) for way in chance.sample(ways, 2)}
                alone.append(took[ways[0]])
                routed.append(took[ways[1]])
                on_answer()
            after = router.cpu_times()
            cpu = (after.user - before.user + after.system - before.system) / requests
            found.append(Overhead(size, alone, routed, cpu))
        return found


def _ask(client: httpx.Client, size: int) -> float:
    body = {"model": Menu.load(TINY_MENU).model, "prompt": str(size), "response_format": "b64_json"}
    began = time.perf_counter()
    answer = client.post("/v1/videos", json=body)
    took = time.perf_counter() - began
    answer.raise_for_status()
    if len(answer.content) < size:
        raise ValueError(f"an answer of {len(answer.content)} bytes for {size} that were asked for")
    return took


def show(overheads: Sequence[Overhead], console: Console) -> None:
    """A table, a row for each size."""
    table = Table("answer", title=f"milliseconds, {len(overheads[0].alone)} requests of each way by turns")
    for heading in ("alone p50", "routed p50", "added p10", "p50", "p90", "router's CPU"):
        table.add_column(heading, justify="right")
    for one in overheads:
        row = (
            _percentile(one.alone, 50),
            _percentile(one.routed, 50),
            *(one.added(percent) for percent in (10, 50, 90)),
            one.cpu,
        )
        table.add_row(f"{one.size:,} B", *(f"{1000 * seconds:.2f}" for seconds in row))
    console.print(table)


def _percentile(seconds: Sequence[float], percent: int) -> float:
    return statistics.quantiles(seconds, n=100, method="inclusive")[percent - 1]


def write(overheads: Sequence[Overhead], file: Path) -> None:
    """All that was measured, in seconds, as JSON."""
    rows = [
        {
            "size": one.size,
            "added": {percent: one.added(percent) for percent in (10, 50, 90)},
            "cpu": one.cpu,
            "alone": [round(seconds, 5) for seconds in one.alone],
            "routed": [round(seconds, 5) for seconds in one.routed],
        }
        for one in overheads
    ]
    file.write_text(json.dumps(rows) + "\n")
