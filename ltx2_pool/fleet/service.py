"""A router's life with Dynamo: registration, presence in discovery, drain."""

from __future__ import annotations

import asyncio
import logging
import signal
import uuid
from typing import Any

from dynamo.common.utils.namespace import get_worker_namespace

from ltx2_pool.fleet.metrics import Metrics
from ltx2_pool.fleet.router import Router, keep_looking, until_somebody_is_there
from ltx2_pool.fleet.settings import RouterSettings
from ltx2_pool.serving.exits import ABORT_TIMEOUT, LOST, STOPPED, LastResort
from ltx2_pool.serving.names import FORECASTS, UNREGISTER_GRACE, Names, leave, publish
from ltx2_pool.serving.presence import Absent
from ltx2_pool.serving.runtime import connect
from ltx2_pool.words.menu import Menu

logger = logging.getLogger(__name__)


async def serve(settings: RouterSettings, menu: Menu, last_resort: LastResort) -> int:
    """Register the model once a worker is there, pass requests on until a signal, drain; the exit status."""
    runtime = connect(settings.discovery)
    told = asyncio.Event()

    def on_signal() -> None:
        if told.is_set():
            last_resort.arm(0.0, STOPPED)
        told.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
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
        name=uuid.uuid4().hex,
    )
    path = f"{namespace}.{settings.component}.{settings.endpoint}"
    names = Names(runtime, path, models, str(settings.shapes), settings.discovery)
    publish(names.endpoint, path, metrics.registry, model)
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
    await leave(names)
    await asyncio.sleep(UNREGISTER_GRACE)
    runtime.shutdown()
    await asyncio.wait({serving}, timeout=settings.drain_timeout)
    if router.working:
        logger.error("%d requests are given up", router.working)
    return status
