"""A worker program over the made-up pool, for a real frontend: a test steers it through files in $MADE_UP_DIR."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import logging
import os
import sys
from pathlib import Path

from dynamo.runtime import DistributedRuntime

from ltx2_pool.serving import endpoint, exits
from ltx2_pool.serving.traffic import Traffic
from ltx2_pool.words import flags
from ltx2_pool.words.menu import Menu
from tests.serving.made_up import Counts, MadeUpPool


async def steer(pool: MadeUpPool, directory: Path) -> None:
    """The file ``release`` releases the jobs that are held, the file ``health`` says how the pool is."""
    while True:
        await asyncio.sleep(0.02)
        if (directory / "release").exists():
            pool.release()
        with contextlib.suppress(FileNotFoundError):
            pool.health = (directory / "health").read_text()


async def serve(directory: Path, last_resort: exits.LastResort) -> int:
    settings = flags.load(argparse.Namespace(), os.environ)
    runtime = DistributedRuntime(asyncio.get_running_loop(), settings.discovery, "tcp")
    pool = MadeUpPool(directory)
    if (directory / "not ready").exists():
        pool.ready.clear()
    steering = asyncio.create_task(steer(pool, directory))
    try:
        menu = Menu.load(settings.shapes)
        traffic = Traffic(directory / "traffic.json")
        return await endpoint.serve(runtime, pool, menu, settings, Counts(), traffic, last_resort)
    finally:
        steering.cancel()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sys.exit(exits.run(functools.partial(serve, Path(os.environ["MADE_UP_DIR"]))))
