#!/usr/bin/env python3
"""Bakes the menu's compile caches, one fresh process for each shape, or proves with --verify that a bake is good."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ltx2_pool.caches import bake
from ltx2_pool.caches.bake import BakeError, Baker, Report
from ltx2_pool.processes.process import Timeouts
from ltx2_pool.processes.subprocesses import ProcessHost
from ltx2_pool.words import device as devices
from ltx2_pool.words import flags
from ltx2_pool.words.device import DeviceError
from ltx2_pool.words.extras import extra
from ltx2_pool.words.menu import Menu, MenuError
from ltx2_pool.words.recipe import RecipeError, VideoSettings
from ltx2_pool.words.settings import SettingsError
from ltx2_pool.words.shapes import Key

if TYPE_CHECKING:
    from ltx2_pool.tools.board import Board

MAX_STATUS = 100
"""The exit status is the number of failed shapes; above 125 it would mean something else to a shell."""
SILENCE = 300.0
"""Seconds. Several shapes that compile at once can keep every core from a process's pings, and nobody waits here."""


def main() -> int:
    parser = flags.argument_parser(
        "warmup.py", __doc__ or "", only=("model", "shapes", "cache_root", *flags.RECIPE, *flags.STARTING)
    )
    parser.add_argument("--only", nargs="+", metavar="KEY", help="bake these shapes only, for instance 768x512@121f")
    parser.add_argument("--force", action="store_true", help="bake again what is baked already")
    parser.add_argument("--fail-fast", action="store_true", help="stop at the first shape that fails")
    parser.add_argument(
        "--timeout", type=float, default=1800, metavar="SECONDS", help="limit for one video, cold ones included [1800]"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="shapes at once, where memory allows [1]")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="bake nothing: run a fresh process on a read-only copy of each cache "
        "and require no compile, no new file and the same video",
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write what was measured as JSON")
    arguments = parser.parse_args()
    if arguments.jobs < 1 or arguments.timeout <= 0:
        parser.error("--jobs and --timeout must be positive")
    try:
        chosen = flags.load(arguments, os.environ)
        menu = Menu.load(chosen.shapes, chosen.checkpoint())
        keys = [menu.get(key) for key in arguments.only] if arguments.only else list(menu.keys)
        # The bake's videos are hashed: they are made alike, whatever the operator serves.
        recipe = chosen.recipe.model_copy(update={"video": VideoSettings()})
        chosen_devices = devices.select(chosen.devices)
        recipe.on(chosen_devices[0].capability)
    except (SettingsError, MenuError, RecipeError, DeviceError) as error:
        parser.error(str(error))
    except KeyError as error:
        parser.error(error.args[0])
    ids = [device.id for device in chosen_devices][: max(menu.offer(key).gpus for key in keys)]
    host = ProcessHost(
        recipe,
        chosen.cache_root,
        Path(tempfile.gettempdir()),
        Timeouts(spawn=600, generation=arguments.timeout, silence=SILENCE),
        spawn=chosen.spawn,
        weights=chosen.weights,
        replace_damaged_caches=False,
        offers=menu.offers,
        devices=ids,
    )
    baker = Baker(menu, recipe, chosen.cache_root, host, ids)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with extra("tools"):
        from ltx2_pool.tools.board import Board
    board = Board(keys, "verify" if arguments.verify else "bake")
    try:
        with bake.lock(chosen.cache_root), board.live():
            reports = asyncio.run(_run(baker, keys, board, arguments))
    except BakeError as error:
        print(f"warmup.py: {error}", file=sys.stderr)
        return MAX_STATUS
    except KeyboardInterrupt:
        print("interrupted: finished shapes are kept, the one in work is not", file=sys.stderr)
        return 130
    failed = [report for report in reports if not report.ok]
    if arguments.report:
        arguments.report.write_text(
            json.dumps({"menu": menu.hash, "ok": not failed, "shapes": [r.as_dict() for r in reports]}, indent=1) + "\n"
        )
    if not (failed or arguments.verify) and set(keys) == set(menu.keys):
        (chosen.cache_root / "IMAGE_SHAPE_HASH").write_text(f"{menu.hash}\n")
    print(f"{len(reports) - len(failed)} of {len(keys)} shapes are good; menu hash {menu.hash}")
    return min(len(keys) - (len(reports) - len(failed)), MAX_STATUS)


async def _run(baker: Baker, keys: Sequence[Key], board: Board, arguments: argparse.Namespace) -> list[Report]:
    reports: list[Report] = []
    slots = asyncio.Semaphore(arguments.jobs)
    stopped = False

    async def one(key: Key) -> None:
        nonlocal stopped
        async with slots:
            if stopped:
                board.state(key, "not tried")
                return
            if arguments.verify:
                report = await baker.verify(key, lambda state: board.state(key, state))
            elif not arguments.force and not baker.state(key):
                report = Report(str(key), ok=True)
                reports.append(report)
                board.state(key, "baked already, skipped")
                return
            else:
                report = await baker.bake(key, lambda state: board.state(key, state))
            reports.append(report)
            board.finished(key, report)
            stopped = arguments.fail_fast and not report.ok

    async with baker.working():
        await asyncio.gather(*(one(key) for key in keys))
    return reports


if __name__ == "__main__":
    sys.exit(main())
