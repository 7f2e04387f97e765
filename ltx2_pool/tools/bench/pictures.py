"""Hostile pictures through what reads them: each is refused with an error for its sender, or decoded. Nothing else."""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from ltx2_pool.processes.guard import Guard
from ltx2_pool.processes.pictures import AT_ONCE, PictureReader
from ltx2_pool.serving.references import fetch
from ltx2_pool.tools.bench.hostile import LISTED, Hostile, hostile
from ltx2_pool.tools.stack import Stack
from ltx2_pool.words.pictures import PictureError, PictureLimits, pixel_bytes

SIZES = ((768, 512), (384, 256))
_FLAT = 64 << 20
"""Bytes that the worker's memory may grow by."""
_WARM = 0.5
"""Share of the inputs after which memory is measured first: until then, allocators grow, and the largest inputs are
there."""


class _Run:
    def __init__(self, reader: PictureReader, limits: PictureLimits) -> None:
        self.accepted: list[str] = []
        self.refused: Counter[str] = Counter()
        self.unexpected: list[str] = []
        self.slowest = (0.0, "")
        self._reader = reader
        self._limits = limits

    async def take(self, one: Hostile) -> None:
        began = time.monotonic()
        try:
            descriptor = await self._reader.read(await fetch(one.reference, self._limits), SIZES)
            try:
                if os.fstat(descriptor).st_size != pixel_bytes(SIZES):
                    self.unexpected.append(f"{one.name}: too few pixels")
            finally:
                os.close(descriptor)
            self.accepted.append(one.name)
        except PictureError as error:
            self.refused[re.sub(r"\d+", "N", str(error))] += 1
        except Exception as error:
            self.unexpected.append(f"{one.name}: {error!r}")
        self.slowest = max(self.slowest, (time.monotonic() - began, one.name))


async def run(count: int, seed: int, out: Path | None = None) -> dict[str, Any]:
    """Push so many through, and say what became of them; `out` gets the same as JSON.

    ``unexpected`` must be empty: an exception other than PictureError, or pixels that are missing. The growth of memory
    and descriptors is of this process and of the one that decodes, which must stay the same one.
    """
    guard = Guard()
    guard.start()
    limits = PictureLimits(hosts=(LISTED,))
    reader = PictureReader(limits, guard)
    try:
        await reader.start()
        outcome = _Run(reader, limits)
        inputs = hostile(count, seed)
        began, decoder = time.monotonic(), reader.pid
        await _all(outcome, inputs, int(count * _WARM))
        before = _held(reader)
        await _all(outcome, inputs, count)
        after = _held(reader)
        result = {
            "inputs": count,
            "seed": seed,
            "seconds": round(time.monotonic() - began, 2),
            "accepted": len(outcome.accepted),
            "refused": dict(outcome.refused.most_common()),
            "unexpected": outcome.unexpected,
            "slowest": {"seconds": round(outcome.slowest[0], 2), "name": outcome.slowest[1]},
            "decoder restarts": int(reader.pid != decoder),
            "growth": {name: after[name] - before[name] for name in after},
        }
    finally:
        await reader.close()
        guard.close()
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n")  # noqa: ASYNC240 - nothing else runs by now
    return result


async def _all(outcome: _Run, inputs: Iterator[Hostile], count: int) -> None:
    """As many at once as are decoded at once, so that none waits in line for long."""

    async def some(left: list[int]) -> None:
        while left:
            left.pop()
            one = next(inputs, None)
            if one is None:
                return
            await outcome.take(one)

    left = list(range(count))
    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(some(left))


def _held(reader: PictureReader) -> dict[str, int]:
    held = {}
    for name, pid in (("worker", os.getpid()), ("decoder", reader.pid)):
        process = psutil.Process(pid)
        held[f"{name} bytes"] = process.memory_info().rss
        held[f"{name} descriptors"] = process.num_fds()
    return held


def through(running: Stack, count: int, seed: int, on_answer: Callable[[], None]) -> dict[str, Any]:
    """Ask a frontend for so many videos from them, with one step each; says what became of them, as :func:`run`.

    ``unexpected`` must be empty: an answer other than a video or a refusal with a reason, a process of the pool that is
    another afterwards, or memory that grew with their number.
    """
    inputs = hostile(count, seed)
    refused: Counter[str] = Counter()
    accepted: list[str] = []
    unexpected: list[str] = []
    before_pids = _pids(running)
    taking = threading.Lock()
    held: list[int] = []
    marks = [count * tenths // 10 for tenths in range(1, 10)]

    def some() -> None:
        while True:
            with taking:
                one = next(inputs, None)
            if one is None:
                return
            body = {"model": running.model_name, "prompt": one.name, "input_reference": one.reference}
            # Escaped: in some there are halves of characters.
            content = json.dumps({**body, "nvext": {"num_inference_steps": 1}}).encode()
            answer = running.client.post("/v1/videos", content=content, headers={"content-type": "application/json"})
            text = answer.json().get("message", "") if answer.status_code != 200 else ""
            if answer.status_code == 200:
                accepted.append(one.name)
            elif answer.status_code in (400, 413) and text:  # 413 is the frontend's, for what is too large for it
                refused[re.sub(r"\d+", "N", text)] += 1
            else:
                unexpected.append(f"{one.name}: {answer.status_code} {answer.text[:200]}")
            on_answer()
            if len(accepted) + sum(refused.values()) in marks:
                held.append(_worker_bytes(running))

    began = time.monotonic()
    with ThreadPoolExecutor(2 * AT_ONCE) as threads:
        for thread in [threads.submit(some) for _ in range(2 * AT_ONCE)]:
            thread.result()
    held.append(_worker_bytes(running))
    growth = held[-1] - held[len(held) // 2]
    if growth > _FLAT:
        unexpected.append(f"the worker's memory grew by {growth >> 20} MiB")
    if _pids(running) != before_pids:
        unexpected.append(f"the pool has other processes: {before_pids}, then {_pids(running)}")
    return {
        "inputs": count,
        "seed": seed,
        "seconds": round(time.monotonic() - began, 2),
        "accepted": len(accepted),
        "refused": dict(refused.most_common()),
        "unexpected": unexpected,
        "growth": {"worker bytes": growth},
        "worker MiB along the way": [bytes_ >> 20 for bytes_ in held],
    }


def _pids(running: Stack) -> dict[str, int]:
    return {process["shape"]: process["pid"] for process in running.status()["processes"]}


def _worker_bytes(running: Stack) -> int:
    assert running.worker is not None
    return int(psutil.Process(running.worker.pid).memory_info().rss)
