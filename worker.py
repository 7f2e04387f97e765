#!/usr/bin/env python3
"""The worker: serves LTX-2 video behind the Dynamo frontend, one shape-pinned process for each hot shape."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sys
from pathlib import Path

import uvloop

from ltx2_pool import manifest
from ltx2_pool import settings as settings_module
from ltx2_pool.settings import Settings, SettingsError
from ltx2_pool.shapes import Menu, MenuError


def main() -> int:
    settings = settings_module.parse(None, os.environ, "worker.py", __doc__ or "")
    logging.basicConfig(
        level=settings.log_level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    try:
        menu = Menu.load(settings.shapes)
        menu.check_image(settings.image_shape_hash)
        _check_system_port(os.environ.get("DYN_SYSTEM_PORT"))
        settings.check_model()
        _check_caches(settings, menu)
        run_dir = settings.make_run_dir()
    except (MenuError, SettingsError, OSError) as error:
        print(f"worker.py: {error}", file=sys.stderr)
        return 2
    try:
        uvloop.run(_serve(settings, menu, run_dir))
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)
    return 0


def _check_caches(settings: Settings, menu: Menu) -> None:
    """Hold every shape's baked cache against what this worker would bake, as LTX2_CACHE_POLICY says."""
    if not (settings.pool_mode and settings.compile):
        return
    problems = manifest.check(settings.cache_root, settings.recipe, menu.shapes)
    lines = [manifest.describe(key, mismatches) for key, mismatches in problems.items()]
    if lines and settings.cache_policy == "strict":
        raise SettingsError("LTX2_CACHE_POLICY=strict and these caches will not hit:\n  " + "\n  ".join(lines))
    for line in lines:
        logging.warning("first video will compile: %s", line)
    logging.info(
        "%d of %d shapes are baked in %s", len(menu.shapes) - len(lines), len(menu.shapes), settings.cache_root
    )


def _check_system_port(port: str | None) -> None:
    """Dynamo 1.6 reads DYN_SYSTEM_PORT into a signed 16-bit number and dies with a traceback when it does not fit."""
    if port and not (port.lstrip("-").isdigit() and int(port) < 2**15):
        raise SettingsError(f"DYN_SYSTEM_PORT must be a number below 32768 (Dynamo reads it as 16 bits), not {port!r}")


async def _serve(settings: Settings, menu: Menu, run_dir: Path) -> None:
    from dynamo.runtime import DistributedRuntime

    from ltx2_pool import endpoint

    os.environ["DYN_DISCOVERY_BACKEND"] = settings.discovery
    if settings.discovery in ("file", "mem"):
        # Neither NATS nor etcd: what a single host needs.
        os.environ.setdefault("DYN_EVENT_PLANE", "zmq")
    request_plane = os.environ.get("DYN_REQUEST_PLANE", "tcp")
    runtime = DistributedRuntime(asyncio.get_running_loop(), settings.discovery, request_plane)
    await endpoint.serve(runtime, _backend(settings, run_dir), menu, settings)


def _backend(settings: Settings, run_dir: Path) -> "endpoint.Backend":  # noqa: F821, UP037
    if not settings.pool_mode:
        from ltx2_pool.inprocess import InProcessGenerator

        return InProcessGenerator(settings.recipe, settings.cache_root, run_dir)
    from ltx2_pool.pool import SubprocessPool
    from ltx2_pool.process import ExecSpawner, Timeouts

    return SubprocessPool(
        ExecSpawner(),
        settings.recipe,
        settings.cache_root,
        run_dir,
        max_size=settings.pool_max_size,
        gpu_concurrency=settings.gpu_concurrency,
        timeouts=Timeouts(
            spawn=settings.spawn_timeout,
            generation=settings.generation_timeout,
            cancel=settings.cancel_grace,
            term=settings.term_grace,
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
