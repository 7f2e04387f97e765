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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
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

    @property
    def p50(self) -> float:
        """What the router adds, at the median."""
        return statistics.median(self.routed) - statistics.median(self.alone)


def run(requests: int, on_answer: Callable[[], None]) -> list[Overhead]:
    """Each size of answers in turn, that many of each way. Raises StackError, HTTPError."""
    with contextlib.ExitStack() as cleanup:
        work = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="ltx2-overhead-")))
        ways = [cleanup.enter_context(_stack(work / name, routers)) for name, routers in (("alone", 0), ("routed", 1))]
        chance = random.Random(0)
        found = []
        for size in SIZES:
            alone, routed = [], []
            for number in range(WARM_UP + requests):
                # In a random order: whoever comes second finds the other one's threads still awake.
                took = {way: _ask(way, size) for way in chance.sample(ways, 2)}
                if number >= WARM_UP:
                    alone.append(took[ways[0]])
                    routed.append(took[ways[1]])
                on_answer()
            found.append(Overhead(size, alone, routed))
        return found


@contextlib.contextmanager
def _stack(directory: Path, routers: int) -> Iterator[httpx.Client]:
    """A client of a frontend with an echo behind it."""
    with FleetStack(directory, directory, TINY_MENU, directory, workers=1, routers=routers, program=ECHO) as running:
        yield running.client


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
    table = Table("answer", title=f"milliseconds, {len(overheads[0].alone)} requests of each way in turn")
    for heading in ("alone p50", "routed p50", "difference", "alone p90", "routed p90"):
        table.add_column(heading, justify="right")
    for one in overheads:
        p50, p90 = ([_percentile(way, p) for way in (one.alone, one.routed)] for p in (50, 90))
        row = (p50[0], p50[1], one.p50, p90[0], p90[1])
        table.add_row(f"{one.size:,} B", *(f"{1000 * seconds:.2f}" for seconds in row))
    console.print(table)


def _percentile(seconds: Sequence[float], p: int) -> float:
    return statistics.quantiles(seconds, n=100)[p - 1]


def write(overheads: Sequence[Overhead], file: Path) -> None:
    """All that was measured, as JSON."""
    rows = [{"bytes": one.size, "p50": one.p50, "alone": one.alone, "routed": one.routed} for one in overheads]
    file.write_text(json.dumps(rows, indent=1) + "\n")
