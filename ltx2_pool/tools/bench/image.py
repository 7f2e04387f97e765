"""``benchmark.py image``: does a baked image serve every shape at the speed it was baked for, in any order?

First each shape of the menu in turn, cold: the first video, with the start of its process, and then some hot ones. Then
all of them in a random order. A shape passes when every video is what was asked for, the same request gave the same
bytes both times, and the random order was not slower than the first one's hot videos.
"""

from __future__ import annotations

import csv
import hashlib
import random
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ltx2_pool.tools import contactsheet
from ltx2_pool.tools.bench.client import Client, Watch
from ltx2_pool.words.menu import Menu
from ltx2_pool.words.shapes import Shape


@dataclass(frozen=True)
class Timing:
    """One video, a line of timings.csv."""

    order: str
    """`in turn` or `shuffled`."""
    shape: str
    number: int
    """Which prompt and seed."""
    state: str
    """`hot` or `cold` when it was asked for; empty when the worker's status is not known."""
    seconds: float
    bytes: int
    sha256: str
    problem: str


@dataclass(frozen=True)
class Verdict:
    """What is said of one shape."""

    shape: Shape
    cold_s: float
    """The first video, with the start of the process."""
    hot_s: float
    """Median of the others in turn."""
    shuffled_s: float
    """Median in the random order."""
    problems: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """How much slower the random order is."""
        return self.shuffled_s / self.hot_s


async def run(
    client: Client, watch: Watch, menu: Menu, prompts: int, seed: int, out: Path, on_answer: Callable[[], None]
) -> list[Timing]:
    """Ask for every video twice, one after the other; MP4s, contact sheets and timings.csv go to `out`."""
    in_turn = [(shape, number) for shape in menu.shapes for number in range(prompts)]
    shuffled = random.Random(seed).sample(in_turn, len(in_turn))
    timings: list[Timing] = []
    rows: dict[str, list[tuple[str, bytes]]] = {}
    with (out / "timings.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(Timing.__dataclass_fields__))
        writer.writeheader()
        for order, plan in (("in turn", in_turn), ("shuffled", shuffled)):
            for shape, number in plan:
                state = watch.state(shape)
                answer = await client.ask(shape, number)
                timing = Timing(
                    order,
                    shape.key,
                    number,
                    state,
                    answer.seconds,
                    len(answer.data),
                    hashlib.sha256(answer.data).hexdigest(),
                    answer.problem,
                )
                timings.append(timing)
                writer.writerow(asdict(timing))
                file.flush()
                if order == "in turn" and answer.data:
                    (out / f"{shape.key}-{number}.mp4").write_bytes(answer.data)
                    rows.setdefault(shape.key, []).append((f"prompt {number}, {answer.seconds:.2f} s", answer.data))
                on_answer()
    for key, videos in rows.items():
        contactsheet.write(out / f"{key}.png", videos, key)
    return timings


def judge(timings: list[Timing], menu: Menu, max_ratio: float) -> list[Verdict]:
    """A verdict for each shape."""
    verdicts = []
    for shape in menu.shapes:
        of = [t for t in timings if t.shape == shape.key]
        first, *hot = [t for t in of if t.order == "in turn"]
        shuffled = [t for t in of if t.order == "shuffled"]
        verdict = Verdict(
            shape,
            first.seconds,
            statistics.median(t.seconds for t in hot or [first]),
            statistics.median(t.seconds for t in shuffled),
            (),
        )
        problems = list(dict.fromkeys(t.problem for t in of if t.problem))
        sums: dict[int, set[str]] = {}
        for t in of:
            sums.setdefault(t.number, set()).add(t.sha256)
        if other := sorted(number for number, found in sums.items() if len(found) > 1):
            problems.append(f"other bytes the second time: prompt {', '.join(map(str, other))}")
        if verdict.ratio > max_ratio:
            problems.append(f"shuffled is {verdict.ratio:.2f} times as slow, over {max_ratio:g}")
        verdicts.append(Verdict(shape, verdict.cold_s, verdict.hot_s, verdict.shuffled_s, tuple(problems)))
    return verdicts


def show(verdicts: list[Verdict], console: Console) -> None:
    """Print a line for each shape."""
    table = Table("shape", "cold s", "hot p50 s", "shuffled p50 s", "shuffled / hot", "verdict", title="image")
    for v in verdicts:
        verdict = "[red]" + "\n".join(v.problems) + "[/]" if v.problems else "[green]good[/]"
        table.add_row(
            v.shape.key, f"{v.cold_s:.2f}", f"{v.hot_s:.2f}", f"{v.shuffled_s:.2f}", f"{v.ratio:.2f}", verdict
        )
    console.print(table)
