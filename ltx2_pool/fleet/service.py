"""A router's life with Dynamo: registration, presence in discovery, drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from typing import Any

from dynamo.common.utils.namespace import get_worker_namespace
from dynamo.common.utils.prometheus import register_engine_metrics_callback
from dynamo.runtime import DistributedRuntime

from ltx2_pool.fleet.metrics import Metrics
from ltx2_pool.fleet.router import Router, keep_looking, until_somebody_is_there
from ltx2_pool.fleet.settings import RouterSettings
from ltx2_pool.serving.exits import LOST, STOPPED, LastResort
from ltx2_pool.serving.names import FORECASTS, Names
from ltx2_pool.serving.presence import Absent
from ltx2_pool.words.menu import Menu

logger = logging.getLogger(__name__)

UNREGISTER_GRACE = 0.5
"""Seconds between leaving discovery and closing the endpoint: a request that was on its way still gets in."""
LEAVE_TIMEOUT = 3.0
"""Seconds for leaving discovery; a lease that is not renewed ends by itself."""
ABORT_TIMEOUT = 8.0
"""Seconds from the second signal, or the end of the drain, to the end of the process, whatever hangs."""


async def serve(settings: RouterSettings, menu: Menu, last_resort: LastResort) -> int:
    """Register the model once a worker is there, pass requests on until a signal, drain; the exit status."""
    os.environ["DYN_DISCOVERY_BACKEND"] = settings.discovery
    if settings.discovery in ("file", "mem"):
        os.environ.setdefault("DYN_EVENT_PLANE", "zmq")
    loop = asyncio.get_running_loop()
    runtime = DistributedRuntime(loop, settings.discovery, os.environ.get("DYN_REQUEST_PLANE", "tcp"))
    told = asyncio.Event()

    def on_signal() -> None:
        if told.is_set():
            last_resort.arm(0.0, STOPPED)
        told.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    namespace = get_worker_namespace(settings.namespace)
    model = settings.served_model_name or menu.model
    models = [model, *menu.models[1:]]
    workers = f"{namespace}.{settings.worker_component}.{settings.endpoint}"
    metrics = Metrics([str(key) for key in menu.keys])
    router = Router(
        await runtime.endpoint(workers).client(),
        await runtime.endpoint(workers + FORECASTS).client(),
        menu,
        metrics,
        attempts=settings.attempts,
    )
    path = f"{namespace}.{settings.component}.{settings.endpoint}"
    names = Names(runtime, path, models, str(settings.shapes), settings.discovery)
    _publish(runtime, names, metrics, namespace, settings, model)
    ending = asyncio.create_task(told.wait())
    looking = asyncio.create_task(keep_looking(router, settings.interval))
    try:
        arriving = asyncio.create_task(until_somebody_is_there(router, settings.interval))
        await asyncio.wait({arriving, ending}, return_when=asyncio.FIRST_COMPLETED)
        if told.is_set():
            arriving.cancel()
            return STOPPED
        await names.register()
        status = await _serve(runtime, names, router, ending, settings)
        last_resort.arm(ABORT_TIMEOUT, status)
        return status
    finally:
        looking.cancel()


def _publish(
    runtime: Any, names: Names, metrics: Metrics, namespace: str, settings: RouterSettings, model: str
) -> None:
    """Metrics, on Dynamo's system port."""
    register_engine_metrics_callback(
        names.endpoint,
        metrics.registry,
        namespace_name=namespace,
        component_name=settings.component,
        endpoint_name=settings.endpoint,
        model_name=model,
    )


async def _serve(
    runtime: Any, names: Names, router: Router, ending: asyncio.Task[Any], settings: RouterSettings
) -> int:
    serving = asyncio.ensure_future(names.serve(router.generate))
    keeping = asyncio.create_task(names.keep())
    runtime.set_health_status(True)
    logger.info("routing %s to %d workers", ", ".join(names.models), len(router.present))
    await asyncio.wait({serving, keeping, ending}, return_when=asyncio.FIRST_COMPLETED)
    status = STOPPED
    if not ending.done():
        error = next((task.exception() for task in (keeping, serving) if task.done() and not task.cancelled()), None)
        logger.error("%s", error if isinstance(error, Absent) else f"Dynamo serves the endpoint no longer: {error}")
        status = LOST
    keeping.cancel()
    runtime.set_health_status(False)
    logger.info("leaving: %d requests have %g s", router.working, settings.drain_timeout)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LEAVE_TIMEOUT):
            await names.want(False)
    await asyncio.sleep(UNREGISTER_GRACE)
    runtime.shutdown()
    await asyncio.wait({serving}, timeout=settings.drain_timeout)
    if router.working:
        logger.error("%d requests are given up", router.working)
    return status
