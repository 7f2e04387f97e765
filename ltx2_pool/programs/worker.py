#!/usr/bin/env python3
"""The worker: serves LTX-2 video behind the Dynamo frontend, one shape-pinned process for each hot shape."""

from __future__ import annotations

import asyncio
import fcntl
import functools
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

import httpx
import uvloop

from ltx2_pool.caches import manifest
from ltx2_pool.processes.host import ProcessHost
from ltx2_pool.processes.process import Timeouts
from ltx2_pool.serving.metrics import Metrics
from ltx2_pool.serving.pool import Limits, SubprocessPool
from ltx2_pool.serving.traffic import Traffic
from ltx2_pool.tools import doctor, plan, statusview, terminal
from ltx2_pool.words import requests
from ltx2_pool.words import settings as settings_module
from ltx2_pool.words.protocol import Memory
from ltx2_pool.words.settings import Settings, SettingsError
from ltx2_pool.words.shapes import Menu, MenuError, Shape


def main() -> int:
    parser = settings_module.argument_parser("worker.py", __doc__ or "")
    parser.add_argument(
        "--plan", action="store_true", help="print what would be started (shapes, K, memory, caches) and start nothing"
    )
    parser.add_argument(
        "command", nargs="?", choices=("serve", "status", "doctor"), default="serve",
        help="serve [default]; status: of the worker at DYN_SYSTEM_PORT; doctor: is this machine fit to serve",
    )  # fmt: skip
    arguments = parser.parse_args()
    if arguments.command == "status":
        return _status(os.environ.get("DYN_SYSTEM_PORT", ""))
    try:
        settings = settings_module.load(arguments, os.environ)
    except SettingsError as error:
        parser.error(str(error))
    if arguments.command == "doctor":
        return 0 if doctor.show(doctor.examine(settings, os.environ), terminal.console()) else 1
    _start_logging(settings)
    try:
        menu = Menu.load(settings.shapes)
        menu.check_image(settings.image_shape_hash)
        _check_system_port(os.environ.get("DYN_SYSTEM_PORT"))
        settings.check_model()
        traffic = Traffic(settings.traffic_file or settings.cache_root / "traffic.json")
        prewarm = settings.shapes_to_prewarm(menu, traffic)
        if arguments.plan:
            plan.show(settings, menu, prewarm)
            return 0
        gpu_lock = _lock_gpu()
        problems = _check_caches(settings, menu)
        run_dir = settings.make_run_dir()
    except (MenuError, SettingsError, OSError) as error:
        print(f"worker.py: {error}", file=sys.stderr)
        return 2
    try:
        uvloop.run(_serve(settings, menu, run_dir, traffic, prewarm, problems.keys()))
    finally:
        os.close(gpu_lock)
        traffic.save()
        shutil.rmtree(run_dir, ignore_errors=True)
    return 0


def _start_logging(settings: Settings) -> None:
    """One line an event on stderr; Dynamo's JSON lines, with its own, when DYN_LOGGING_JSONL is on."""
    if os.environ.get("DYN_LOGGING_JSONL", "").lower() in ("1", "true", "yes", "on"):
        from dynamo.runtime.logging import LogHandler

        logging.basicConfig(level=settings.log_level, handlers=[LogHandler()], format="%(message)s")
    else:
        logging.basicConfig(
            level=settings.log_level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
        )
    for name in ("asyncio", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _status(port: str) -> int:
    if not port.isdigit():
        print("worker.py: set DYN_SYSTEM_PORT to the system port of the worker to look at", file=sys.stderr)
        return 2
    url = f"http://127.0.0.1:{port}"
    try:
        statusview.show(statusview.fetch(url), terminal.console())
    except (httpx.HTTPError, ValueError) as error:
        print(f"worker.py: no worker answers at {url}: {error}", file=sys.stderr)
        return 1
    return 0


def _lock_gpu() -> int:
    """Hold this machine's first visible GPU for one worker; returns the lock's descriptor. Raises SettingsError.

    Two workers would each count on all of its memory. Without a GPU nothing is locked.
    """
    uuid = manifest.device_uuid()
    if uuid is None:
        return os.open(os.devnull, os.O_RDONLY)
    path = Path(tempfile.gettempdir()) / f"ltx2-pool-{uuid}.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 20).decode(errors="replace") or "unknown"
        os.close(descriptor)
        raise SettingsError(
            f"another worker (pid {holder}) serves this GPU ({uuid}): stop it, or give this one another GPU with "
            "CUDA_VISIBLE_DEVICES"
        ) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def _check_caches(settings: Settings, menu: Menu) -> dict[str, list[manifest.Mismatch]]:
    """Hold every shape's baked cache against what this worker would bake, as LTX2_CACHE_POLICY says."""
    if not (settings.pool_mode and settings.compile):
        return {}
    problems = manifest.check(settings.cache_root, settings.recipe, menu.shapes)
    lines = [manifest.describe(key, mismatches) for key, mismatches in problems.items()]
    if lines and settings.cache_policy == "strict":
        raise SettingsError("LTX2_CACHE_POLICY=strict and these caches will not hit:\n  " + "\n  ".join(lines))
    for line in lines:
        logging.warning("first video will compile: %s", line)
    logging.info(
        "%d of %d shapes are baked in %s", len(menu.shapes) - len(lines), len(menu.shapes), settings.cache_root
    )
    return problems


def _check_system_port(port: str | None) -> None:
    """Dynamo 1.6 reads DYN_SYSTEM_PORT into a signed 16-bit number and dies with a traceback when it does not fit."""
    if port and not (port.lstrip("-").isdigit() and int(port) < 2**15):
        raise SettingsError(f"DYN_SYSTEM_PORT must be a number below 32768 (Dynamo reads it as 16 bits), not {port!r}")


async def _serve(
    settings: Settings,
    menu: Menu,
    run_dir: Path,
    traffic: Traffic,
    prewarm: list[Shape],
    not_baked: Collection[str],
) -> None:
    from dynamo.runtime import DistributedRuntime

    from ltx2_pool.serving import endpoint

    os.environ["DYN_DISCOVERY_BACKEND"] = settings.discovery
    if settings.discovery in ("file", "mem"):
        # Neither NATS nor etcd: what a single host needs.
        os.environ.setdefault("DYN_EVENT_PLANE", "zmq")
    request_plane = os.environ.get("DYN_REQUEST_PLANE", "tcp")
    runtime = DistributedRuntime(asyncio.get_running_loop(), settings.discovery, request_plane)
    metrics = Metrics([shape.key for shape in menu.shapes])
    for shape in menu.shapes:
        metrics.baked.labels(shape.key).set(settings.pool_mode and shape.key not in not_baked)
    backend: endpoint.Backend
    if settings.pool_mode:
        known = plan.measured(settings, [shape for shape in menu.shapes if shape.key not in not_baked])
        backend = _pool(settings, menu, run_dir, metrics, prewarm, known)
    else:
        from ltx2_pool.processes.inprocess import InProcessGenerator

        backend = InProcessGenerator(settings.recipe, settings.cache_root, run_dir)
    await endpoint.serve(runtime, backend, menu, settings, metrics, traffic)


def _pool(
    settings: Settings,
    menu: Menu,
    run_dir: Path,
    metrics: Metrics,
    prewarm: list[Shape],
    known: Mapping[Shape, Memory],
) -> SubprocessPool:
    timeouts = Timeouts(
        spawn=settings.spawn_timeout,
        weights=settings.weights_timeout,
        generation=settings.generation_timeout,
        cancel=settings.cancel_grace,
        term=settings.term_grace,
    )
    return SubprocessPool(
        ProcessHost(settings.recipe, timeouts, spawn=settings.spawn, weights=settings.weights),
        settings.cache_root,
        run_dir,
        capacity=plan.capacity(settings, known),
        gpu_concurrency=settings.gpu_concurrency,
        limits=Limits(settings.max_queue, settings.max_queue_per_shape, settings.job_timeout),
        warm_up=functools.partial(requests.warm_up, menu) if settings.warm else None,
        prewarm=prewarm,
        ready_min=settings.ready_min,
        metrics=metrics,
    )


if __name__ == "__main__":
    sys.exit(main())
