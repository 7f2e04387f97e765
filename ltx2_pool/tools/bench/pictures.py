"""Hostile pictures through what reads them: each is refused with an error for its sender, or decoded. Nothing else."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from ltx2_pool.processes.guard import Guard
from ltx2_pool.processes.pictures import AT_ONCE, PictureReader
from ltx2_pool.serving.references import fetch
from ltx2_pool.tools.bench.hostile import LISTED, Hostile, hostile
from ltx2_pool.words.pictures import PictureError, PictureLimits, pixel_bytes

SIZES = ((768, 512), (384, 256))
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
