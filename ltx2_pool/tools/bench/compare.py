"""``benchmark.py compare``: the pool against what people would do without it, in one run, as ratios.

Three ways to serve the same menu through the same frontend, on the same baked caches:

- *in-process*: ``LTX2_POOL_MODE=0``, one generator for all shapes;
- *exec, private*: a pool whose processes are fresh interpreters with weights of their own. With its clients behind one
  lock it stands for the first systems, where whoever came while a shape started waited for it;
- *pool*: forks of the zygote with lent weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Column, Table

from ltx2_pool.tools.bench.client import Client
from ltx2_pool.tools.stack import WORKER, Stack
from ltx2_pool.words.menu import Menu
from ltx2_pool.words.shapes import CacheDirs, Key, Shape

WAYS: dict[str, dict[str, str]] = {
    "in-process": {"LTX2_POOL_MODE": "0"},
    "exec, private": {
        "LTX2_POOL_MODE": "1",
        "LTX2_POOL_SPAWN": "exec",
        "LTX2_POOL_WEIGHTS": "private",
        "LTX2_POOL_MAX_SIZE": "3",
    },
    "pool": {"LTX2_POOL_MODE": "1", "LTX2_POOL_PREWARM": "none", "LTX2_POOL_MAX_SIZE": "3"},
}


class CompareError(Exception):
    """A video was not what was asked for."""


def run(
    model: Path, shapes_file: Path, menu: Menu, cache_root: Path, repeat: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Every way in turn. Raises CompareError, StackError."""
    ways: dict[str, Any] = {}
    for way, options in WAYS.items():
        tell(f"{way}: starting")
        with tempfile.TemporaryDirectory(prefix="ltx2-compare-") as scratch:
            root = cache_root
            if way == "in-process":
                root = Path(scratch) / "cache"
                for shape in menu.shapes[:2]:  # one process makes them all, so it needs what all of them compiled
                    for name in ("torchinductor", "triton"):
                        source = CacheDirs.of(cache_root, Key(shape)).root / name
                        if source.exists():
                            shutil.copytree(source, root / "in-process" / name, dirs_exist_ok=True)
            with Stack(Path(scratch) / "logs", model, shapes_file, root, program=WORKER, **options) as stack:
                ways[way] = asyncio.run(_measure(stack, menu, repeat, way, tell))
    hot = ways["in-process"]["hot_p50_s"]
    lock = ways["exec, private"]["behind_a_lock_s"]
    return {
        "ways": ways,
        "ratios": {
            "pool hot p50 / in-process hot p50": ways["pool"]["hot_p50_s"] / hot,
            "exec, private hot p50 / in-process hot p50": ways["exec, private"]["hot_p50_s"] / hot,
            "pool spawn / exec, private spawn": ways["pool"]["spawn_s"] / ways["exec, private"]["spawn_s"],
            "hot request while another shape spawns / alone: pool": ways["pool"]["beside_p50_s"]
            / ways["pool"]["hot_p50_s"],
            "hot request while another shape spawns / alone: one global lock": lock
            / ways["exec, private"]["hot_p50_s"],
        },
    }


async def _measure(stack: Stack, menu: Menu, repeat: int, way: str, tell: Callable[[str], None]) -> dict[str, Any]:
    a, b = menu.shapes[:2]
    result: dict[str, Any] = {}
    async with Client(f"http://127.0.0.1:{stack.http_port}", menu) as client:

        async def seconds(shape: Shape, number: int) -> float:
            answer = await client.ask(shape, number)
            if answer.problem:
                raise CompareError(f"{way}, {shape.key}: HTTP {answer.status} {answer.problem}")
            return answer.seconds

        tell(f"{way}: the first video of {a.key}")
        result["first_s"] = await seconds(a, 0)
        tell(f"{way}: {repeat} hot videos of {a.key}")
        hot = [await seconds(a, number) for number in range(repeat)]
        result["hot_p50_s"] = statistics.median(hot)
        if way == "in-process":
            return result
        tell(f"{way}: {a.key} while {b.key} starts")
        before = await _spawn_seconds(stack, b)
        cold = asyncio.create_task(seconds(b, 0))
        beside: list[float] = []
        while not cold.done():
            beside.append(await seconds(a, len(beside)))
        result["cold_s"] = await cold
        result["spawn_s"] = await _spawn_seconds(stack, b) - before
        result["beside_p50_s"], result["beside_max_s"] = statistics.median(beside), max(beside)
        result["beside_videos"] = len(beside)
        if way == "exec, private":
            c = menu.shapes[2]
            tell(f"{way}: {a.key} while {c.key} starts, behind one lock")
            lock = asyncio.Lock()

            async def locked(shape: Shape) -> float:
                began = time.monotonic()
                async with lock:
                    await seconds(shape, 0)
                return time.monotonic() - began

            cold = asyncio.create_task(locked(c))
            await asyncio.sleep(0)  # it has the lock
            result["behind_a_lock_s"] = await locked(a)
            await cold
    return result


async def _spawn_seconds(stack: Stack, shape: Shape) -> float:
    """What all starts of the shape took, spawn to READY, as the worker counts it."""
    async with httpx.AsyncClient() as http:
        text = (await http.get(f"http://127.0.0.1:{stack.system_port}/metrics")).raise_for_status().text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "ltx2_pool_cold_spawn_seconds_sum" and sample.labels["shape_key"] == shape.key
    )


def show(result: dict[str, Any], console: Console, out: Path | None) -> None:
    """Print the tables, and write the JSON when asked to."""
    columns = {
        "first_s": "first video",
        "hot_p50_s": "hot p50",
        "spawn_s": "spawn to READY",
        "cold_s": "cold video",
        "beside_p50_s": "hot beside a spawn p50",
        "beside_max_s": "max",
        "behind_a_lock_s": "behind one lock",
    }
    table = Table(Column("seconds", no_wrap=True), *columns.values(), title="the same menu, served in three ways")
    for way, figures in result["ways"].items():
        table.add_row(way, *(f"{figures[name]:.2f}" if name in figures else "" for name in columns))
    console.print(table)
    ratios = Table("ratio", "", title="ratios")
    for name, value in result["ratios"].items():
        ratios.add_row(name, f"{value:.3f}" if value < 10 else f"{value:.0f}")
    console.print(ratios)
    if out is not None:
        with contextlib.suppress(FileExistsError):
            out.parent.mkdir(parents=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
