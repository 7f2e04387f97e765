"""Real workers, asked for the same videos behind our routers and by Dynamo's round robin; what clients and logs saw."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ltx2_pool.fleet.rivals import Policy
from ltx2_pool.tools.bench.client import Answer, Client
from ltx2_pool.tools.fleetstack import FleetStack
from ltx2_pool.words.menu import Menu
from ltx2_pool.words.shapes import Key

POLICIES: tuple[Policy, ...] = ("round robin", "ours")
"""Those that a stock frontend can be compared with: it routes videos in turn by itself."""


@dataclass(frozen=True)
class Fleet:
    """What is started: workers with one place each, which start the menu's first shape ahead."""

    model: Path
    shapes: Path
    cache_root: Path
    workers: int
    routers: int


@dataclass(frozen=True)
class Asked:
    """One request, as its client saw it."""

    at: float
    """Seconds since the first moment of the run."""
    key: Key
    answer: Answer


@dataclass(frozen=True)
class Made:
    """One video, as its worker logged it; seconds."""

    key: str
    hot: bool
    """Its process had made one before."""
    queue: float
    device: float
    """With a lease, or as the first video of its process: text, denoising, decoding."""
    encode: float
    """The rest, until the answer has left."""


@dataclass(frozen=True)
class Log:
    """What one worker's log says."""

    made: Sequence[Made]
    ready: Sequence[float]
    """Of each process that was started for a job: seconds from the spawn to READY."""
    ends: Sequence[float]
    """Of each process that had to go for another: seconds from the word to its end."""


@dataclass(frozen=True)
class Real:
    """What a run has shown."""

    policy: Policy
    fleet: Fleet
    asked: Sequence[Asked]
    logs: Sequence[Log]
    seconds: float
    """From the first moment to the last answer."""

    @property
    def made(self) -> list[Made]:
        return [made for log in self.logs for made in log.made]

    @property
    def spawns(self) -> int:
        """After the start."""
        return sum(len(log.ready) for log in self.logs)


def bake(fleet: Fleet, tell: Callable[[str], None]) -> None:
    """What is not baked yet. Raises CalledProcessError."""
    tell("baking what is not baked yet")
    options = {"--shapes": fleet.shapes, "--model": fleet.model, "--cache-root": fleet.cache_root}
    command = [sys.executable, "-m", "ltx2_pool.programs.warmup", *(str(p) for pair in options.items() for p in pair)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def run(
    fleet: Fleet, menu: Menu, policy: Policy, asked: Sequence[tuple[float, Key]], on_answer: Callable[[], None]
) -> Real:
    """Start the fleet, ask for the videos at those moments, and read what there is to read. Raises StackError."""
    routers = fleet.routers if policy == "ours" else 0
    settings = {
        "LTX2_POOL_MODE": "1",
        "LTX2_POOL_MAX_SIZE": "1",
        "LTX2_POOL_PREWARM": str(menu.keys[0]),
        "LTX2_POOL_MAX_QUEUE": "1000",
        "LTX2_POOL_MAX_QUEUE_PER_SHAPE": "1000",
        "LTX2_POOL_MAX_QUEUE_PER_USER": "1000",
    }
    with (
        tempfile.TemporaryDirectory(prefix="ltx2-fleet-") as logs,
        FleetStack(
            Path(logs),
            fleet.model,
            fleet.shapes,
            fleet.cache_root,
            workers=fleet.workers,
            routers=routers,
            **settings,
        ) as running,
    ):
        answers, seconds = asyncio.run(_push(f"http://127.0.0.1:{running.http_port}", menu, asked, on_answer))
        read_ = [read(running.log(f"worker{number}")) for number in range(fleet.workers)]
    return Real(policy, fleet, answers, read_, seconds)


async def _push(
    url: str, menu: Menu, asked: Sequence[tuple[float, Key]], on_answer: Callable[[], None]
) -> tuple[list[Asked], float]:
    """Every request at its moment, whatever became of those before."""
    answers: list[Asked] = []
    async with Client(url, menu) as client:
        began = time.monotonic()

        async def one(number: int, at: float, key: Key) -> None:
            answers.append(Asked(at, key, await client.ask(key.shape, number)))
            on_answer()

        async with asyncio.TaskGroup() as group:
            for number, (at, key) in enumerate(asked):
                await asyncio.sleep(at - (time.monotonic() - began))
                group.create_task(one(number, at, key))
        return answers, time.monotonic() - began


_TIME = r"(?P<time>\S+ [\d:,]+) \w+ \S+: "
_STARTS = re.compile(_TIME + r"job (?P<job>\S+) starts shape=\S+ pid=(?P<pid>\d+)")
_DONE = re.compile(r"job (?P<job>\S+) done shape=(?P<key>\S+) seconds=(?P<seconds>\S+) bytes=\d+ (?P<phases>.*)")
_READY = re.compile(r"\(pid (?P<pid>\d+)\) is ready after (?P<seconds>\S+) s .*warm-up (?P<warm_up>[\d.]+)")
_EVICTING = re.compile(_TIME + r"evicting (?P<key>\S+):")
_ENDED = re.compile(_TIME + r"(?P<key>\S+) \(pid \d+\) ended with status")
DEVICE = ("text", "denoise", "refine", "decode")


def read(log: str) -> Log:
    """What a worker's log says, line by line as the pool writes it."""
    hot: set[str] = set()
    states: dict[str, bool] = {}
    made, ready, ends = [], [], []
    going: dict[str, float] = {}
    for line in log.splitlines():
        if found := _STARTS.match(line):
            states[found["job"]] = found["pid"] in hot
            hot.add(found["pid"])
        elif (found := _DONE.search(line)) and found["job"] in states:
            phases = {name: float(value) for name, _, value in (p.partition("=") for p in found["phases"].split())}
            device = sum(phases.get(name, 0.0) for name in DEVICE)
            rest = float(found["seconds"]) - phases["queue"] - device
            made.append(Made(found["key"], states.pop(found["job"]), phases["queue"], device, rest))
        elif found := _READY.search(line):
            if float(found["warm_up"]):
                hot.add(found["pid"])
            else:
                ready.append(float(found["seconds"]))
        elif found := _EVICTING.match(line):
            going[found["key"]] = _seconds(found["time"])
        elif (found := _ENDED.match(line)) and found["key"] in going:
            ends.append(_seconds(found["time"]) - going.pop(found["key"]))
    return Log(made, ready, ends)


def _seconds(text: str) -> float:
    return datetime.strptime(text, "%Y-%m-%d %H:%M:%S,%f").timestamp()
