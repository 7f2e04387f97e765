"""The Dynamo side: registration, the request handler, how errors become HTTP statuses, and shutdown.

What the frontend makes of each exception was measured on ai-dynamo 1.6.0: only InvalidArgument's text reaches the
client (400); HttpError(429|500|503) arrives as that status with a generic text; TimeoutError becomes 504. HttpError 408
and 504, EngineShutdown and an exception raised before the generator's first step quarantine the worker for 5 s, so none
of them is used here.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

from dynamo.common.protocols.video_protocol import NvVideosResponse, VideoData
from dynamo.common.storage import get_fs, upload_to_fs
from dynamo.common.utils.graceful_shutdown import graceful_shutdown_with_discovery
from dynamo.common.utils.namespace import get_worker_namespace
from dynamo.common.utils.prometheus import register_engine_metrics_callback
from dynamo.llm import ModelInput, ModelType, WorkerType, register_model
from dynamo.llm.exceptions import HttpError, InvalidArgument

from ltx2_pool import __version__
from ltx2_pool.processes.process import JobFailed, OnEvent, ProcessLost
from ltx2_pool.serving.metrics import Metrics
from ltx2_pool.serving.pool import JobTimeout, Poisonous, QueueFull, Rejected, Video
from ltx2_pool.serving.traffic import Traffic
from ltx2_pool.words import requests
from ltx2_pool.words.protocol import Phase, Step
from ltx2_pool.words.requests import Job, RequestError
from ltx2_pool.words.settings import Settings
from ltx2_pool.words.shapes import Menu

logger = logging.getLogger(__name__)

UNREGISTER_GRACE = 0.5
"""Seconds between leaving discovery and closing the endpoint: a request that was on its way still gets in."""


class Backend(Protocol):
    """What makes the videos: the pool, or the in-process generator."""

    async def start(self) -> None: ...

    async def generate(self, job: Job, on_event: OnEvent) -> Video: ...

    async def close(self, drain_timeout: float = 0) -> None: ...

    def abort(self) -> None: ...

    def status(self) -> dict[str, Any]: ...


class MediaStore:
    """Where videos asked for by URL go (fsspec, through Dynamo's storage helper)."""

    def __init__(self, fs_url: str, http_url: str | None) -> None:
        self._fs = get_fs(fs_url)
        self._http_url = http_url

    async def put(self, name: str, data: bytes) -> str:
        """Store an MP4 and return its URL. Raises OSError when the store refuses."""
        url: str = await upload_to_fs(self._fs, f"videos/{name}.mp4", data, self._http_url)
        return url


class VideoHandler:
    """Turns a request of the frontend into a job, and its outcome into what the frontend understands."""

    def __init__(
        self,
        backend: Backend,
        menu: Menu,
        model: str,
        limits: requests.Limits,
        store: MediaStore | None,
        metrics: Metrics,
        traffic: Traffic,
    ) -> None:
        self._backend = backend
        self._menu = menu
        self._model = model
        self._limits = limits
        self._store = store
        self._metrics = metrics
        self._traffic = traffic

    async def generate(self, request: dict[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
        """One /v1/videos request. An async generator: raising at call time would quarantine the worker."""
        if request.get("_HEALTH_CHECK"):
            yield self._response("health", created=int(time.time()))
            return
        try:
            job, delivery = requests.parse(request, uuid.uuid4().hex, self._menu, self._limits)
        except RequestError as error:
            logger.info("request %s refused: %s", context.id(), error)
            self._metrics.rejections.labels("invalid").inc()
            raise InvalidArgument(str(error)) from error
        # The key in the id tells which shape was made: a request for 1280x720 is served as 1280x736.
        video_id = f"video_{job.id}_{job.shape.key}"
        created = int(time.time())
        began = time.monotonic()
        logger.info(
            "job %s request=%s shape=%s steps=%d seed=%d admitted", job.id, context.id(), job.shape, job.steps, job.seed
        )
        logger.debug("job %s prompt=%r", job.id, job.prompt)
        self._traffic.count(job.shape)
        try:
            video: Video | None = None
            async for item in self._watched(job, context):
                if isinstance(item, Video):
                    video = item
                elif isinstance(item, Step) and delivery.stream:
                    # Without stream the frontend folds all items and keeps the first one's status.
                    yield self._response(
                        video_id, created=created, status="in_progress", progress=100 * item.done // item.total
                    )
            if video is None:
                logger.info("job %s cancelled by its client after %.1f s", job.id, time.monotonic() - began)
                return
            data = await asyncio.to_thread(_take, video.path)
            if delivery.as_url:
                assert self._store is not None
                where = {"url": await self._store.put(f"{job.shape.key}-{job.id}", data)}
            else:
                where = {"b64_json": (await asyncio.to_thread(base64.b64encode, data)).decode()}
        except Exception as error:
            raise _as_dynamo(job, error) from error
        seconds = time.monotonic() - began
        self._metrics.phase.labels(job.shape.key, "respond").observe(seconds - sum(video.phases.values()))
        phases = " ".join(f"{name}={value:.3f}" for name, value in video.phases.items())
        logger.info("job %s done shape=%s seconds=%.3f bytes=%d %s", job.id, job.shape, seconds, len(data), phases)
        yield self._response(
            video_id,
            created=created,
            inference_time_s=seconds - video.phases.get("queue", 0),
            data=[VideoData(output_format="mp4", fps=job.fps, audio_sample_rate=video.sample_rate or None, **where)],
        )

    async def _watched(self, job: Job, context: Any) -> AsyncIterator[Phase | Step | Video]:
        """The job's events and its video; ends without one when the client has gone."""
        if context.is_stopped():
            return
        events: asyncio.Queue[Phase | Step] = asyncio.Queue()
        gone = asyncio.ensure_future(context.async_killed_or_stopped())
        work = asyncio.create_task(self._backend.generate(job, events.put_nowait))
        try:
            while True:
                event = asyncio.ensure_future(events.get())
                await asyncio.wait({event, work, gone}, return_when=asyncio.FIRST_COMPLETED)
                if event.done():
                    yield event.result()
                    continue
                event.cancel()
                if work.done():
                    yield work.result()
                return
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
                with contextlib.suppress(asyncio.CancelledError, JobFailed, ProcessLost, Rejected):
                    _discard(await work)

    def _response(self, video_id: str, **fields: Any) -> dict[str, Any]:
        response: dict[str, Any] = NvVideosResponse(id=video_id, model=self._model, **fields).model_dump()
        return response


def _take(path: Path) -> bytes:
    try:
        return path.read_bytes()
    finally:
        path.unlink(missing_ok=True)


def _discard(video: Video) -> None:
    video.path.unlink(missing_ok=True)


def _as_dynamo(job: Job, error: Exception) -> Any:
    """The exception that the frontend maps to the right status."""
    if isinstance(error, JobFailed) and error.kind == "refused":
        logger.warning("job %s refused by the pipeline: %s", job.id, error)
        return InvalidArgument(f"the pipeline refused the request: {error.error.splitlines()[0]}")
    if isinstance(error, JobTimeout) or (isinstance(error, ProcessLost) and error.reason == "gen_timeout"):
        logger.error("job %s not done in time: %s", job.id, error)
        return TimeoutError(str(error))
    if isinstance(error, QueueFull):
        logger.warning("job %s refused: %s", job.id, error)
        return HttpError(429, str(error))
    if isinstance(error, Poisonous):
        logger.warning("job %s refused: %s", job.id, error)
        return InvalidArgument(str(error))
    if isinstance(error, ProcessLost | Rejected):
        logger.error("job %s not done: %s", job.id, error)
        return HttpError(503, "the video could not be made now; try again")
    logger.error("job %s failed: %s", job.id, error, exc_info=not isinstance(error, JobFailed))
    return HttpError(500, "the video could not be made")


async def serve(
    runtime: Any, backend: Backend, menu: Menu, settings: Settings, metrics: Metrics, traffic: Traffic
) -> None:
    """Register with Dynamo once the backend is ready, serve until SIGTERM or SIGINT, and drain."""
    model = settings.served_model_name or menu.model
    store = None
    if settings.media_output_fs_url:
        store = MediaStore(settings.media_output_fs_url, settings.media_output_http_url)
    limits = requests.Limits(max_prompt_chars=settings.max_prompt_chars, urls=store is not None)
    handler = VideoHandler(backend, menu, model, limits, store, metrics, traffic)
    namespace = get_worker_namespace(settings.namespace)
    endpoint = runtime.endpoint(f"{namespace}.{settings.component}.{settings.endpoint}")
    shutdown = asyncio.Event()
    stopping: asyncio.Task[None] | None = None

    def on_signal() -> None:
        """The first signal drains, the next one does not wait for anything."""
        nonlocal stopping
        if stopping is None:
            stopping = asyncio.create_task(
                graceful_shutdown_with_discovery(
                    runtime, [endpoint], shutdown_event=shutdown, grace_period_s=UNREGISTER_GRACE
                )
            )
        else:
            logger.warning("told to stop again: jobs that are not done are given up")
            backend.abort()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)

    async def status(_body: object) -> dict[str, Any]:
        return {
            "version": __version__,
            "model": model,
            "menu": menu.hash,
            "shapes": [shape.key for shape in menu.shapes],
            "traffic": traffic.scores(),
            **backend.status(),
        }

    runtime.register_engine_route("video/status", status)
    register_engine_metrics_callback(
        endpoint,
        metrics.registry,
        namespace_name=namespace,
        component_name=settings.component,
        endpoint_name=settings.endpoint,
        model_name=model,
    )
    port = os.environ.get("DYN_SYSTEM_PORT", "")
    if port.isdigit() and int(port):
        logger.info("metrics and status are on system port %s", port)
    else:
        logger.warning("no metrics and no status: DYN_SYSTEM_PORT is %s", repr(port) if port else "not set")
    starting = asyncio.create_task(backend.start())
    told = asyncio.create_task(shutdown.wait())
    await asyncio.wait({starting, told}, return_when=asyncio.FIRST_COMPLETED)
    if told.done():
        starting.cancel()
        await asyncio.wait({starting})
        await backend.close()
        return
    told.cancel()
    await starting
    await register_model(
        ModelInput.Text, ModelType.Videos, endpoint, str(settings.model), model, worker_type=WorkerType.Aggregated
    )
    runtime.set_health_status(True)
    logger.info("serving %s: %d shapes (menu %s) at %s", model, len(menu.shapes), menu.hash, namespace)

    async def close_when_told() -> None:
        await shutdown.wait()
        await backend.close(settings.drain_timeout)

    closer = asyncio.create_task(close_when_told())
    try:
        # Dynamo lets running handlers finish without a limit; close() above sets one.
        await endpoint.serve_endpoint(handler.generate, graceful_shutdown=True, metrics_labels=[("model", model)])
    finally:
        closer.cancel()
        await backend.close()
