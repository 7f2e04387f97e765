"""``benchmark.py spawn``: how long until a shape process is READY, by a fork of the zygote and by an interpreter."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from ltx2_pool.processes.process import Timeouts
from ltx2_pool.processes.subprocesses import ProcessHost
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.shapes import Key, Shape

WAYS: tuple[tuple[Literal["zygote", "exec"], Literal["shared", "private"]], ...] = (
    ("exec", "private"),
    ("zygote", "private"),
    ("zygote", "shared"),
)


async def run(recipe: Recipe, shape: Shape, cache_root: Path, repeat: int, console: Console) -> dict[str, Any]:
    """Spawn `repeat` processes each way, one after the other, without a warm-up video. Raises ProcessLost.

    The zygote's own start and the loading of the lent weights happen once for a worker and are reported separately.
    """
    results: dict[str, Any] = {"shape": shape.key, "repeat": repeat, "ways": {}}
    for spawn, weights in WAYS:
        way = f"{spawn}, {weights} weights"
        with tempfile.TemporaryDirectory(prefix="ltx2-spawn-") as scratch, console.status(way) as status:
            host = ProcessHost(recipe, cache_root, Path(scratch), Timeouts(), spawn=spawn, weights=weights)
            try:
                await host.start()
                status.update(f"{way}: what is shared by all processes")
                began = time.monotonic()
                await host.prepare()
                once = time.monotonic() - began
                seconds = []
                for number in range(repeat + (spawn == "zygote")):
                    status.update(f"{way}: process {number + 1}")
                    process = host.process(Key(shape))
                    began = time.monotonic()
                    try:
                        await host.start_process(process)
                        seconds.append(time.monotonic() - began)
                    finally:
                        process.kill()
                        await process.exited()
                if spawn == "zygote":  # the first one waited for the zygote
                    first = seconds.pop(0)
                    once = max(once, first)
            finally:
                await host.close()
        results["ways"][way] = {"once_s": once, "ready_s": seconds, "median_s": statistics.median(seconds)}
    baseline = results["ways"]["exec, private weights"]["median_s"]
    for entry in results["ways"].values():
        entry["ratio"] = entry["median_s"] / baseline
    return results


def show(results: dict[str, Any], console: Console, out: Path | None) -> None:
    """Print the table, and write the JSON when asked to."""
    table = Table(
        "way",
        "spawn to READY s",
        "of exec",
        "once for all s",
        title=f"{results['shape']}: median of {results['repeat']}, without a warm-up video",
    )
    for way, entry in results["ways"].items():
        table.add_row(way, f"{entry['median_s']:.2f}", f"1/{1 / entry['ratio']:.0f}", f"{entry['once_s']:.1f}")
    console.print(table)
    if out is not None:
        out.write_text(json.dumps(results, indent=1) + "\n")
