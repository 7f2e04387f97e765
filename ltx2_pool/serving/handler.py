"""One request of the frontend, from its JSON to its answer; and how each failure becomes an HTTP status.

What the frontend makes of each exception was measured on ai-dynamo 1.6.0: only InvalidArgument's text reaches the
client (400); HttpError(429|500|503) arrives as that status with a generic text; TimeoutError becomes 504. HttpError 408
and 504, EngineShutdown and an exception raised before the generator's first step quarantine the worker for 5 s, so none
of them is used here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from dynamo.common.protocols.video_protocol import NvVideosResponse, VideoData
from dynamo.llm.exceptions import HttpError, InvalidArgument

from ltx2_pool.serving.delivery import Deliverer, DeliveryTimeout
from ltx2_pool.serving.traffic import Traffic
from ltx2_pool.words import requests
from ltx2_pool.words.menu import Menu
from ltx2_pool.words.outcomes import JobFailed, JobTimeout, OnEvent, Poisonous, ProcessLost, QueueFull, Rejected, Video
from ltx2_pool.words.pictures import Picture, PictureError, Size
from ltx2_pool.words.protocol import Phase, Step
from ltx2_pool.words.requests import Delivery, Job, Reference, RequestError
from ltx2_pool.words.shapes import Key

logger = logging.getLogger(__name__)


class Maker(Protocol):
    """What makes the videos."""

    async def generate(self, job: Job, on_event: OnEvent, user: str = "", pixels: Sequence[int] = ()) -> Video: ...


class Taker(Protocol):
    """What gets the pictures that requests refer to."""

    def taken(
        self, references: Sequence[Reference], sizes: Sequence[Size], user: str
    ) -> contextlib.AbstractAsyncContextManager[tuple[tuple[Picture, ...], tuple[int, ...]]]: ...


class Counters(Protocol):
    """The series that are counted here: rejections by reason, and the phases of a job by shape."""

    @property
    def rejections(self) -> Any: ...

    @property
    def phase(self) -> Any: ...


class GivenUp(Exception):
    """The worker is ending, and this request is not waited for any longer."""


class VideoHandler:
    """Turns a request of the frontend into a job, and its outcome into what the frontend understands.

    Each request has one task that does all the work, from admission to the bytes of the answer, and owns the video's
    file. The generator that Dynamo iterates owns that task: however the generator ends, the task has ended before it.
    """

    def __init__(
        self,
        pool: Maker,
        menu: Menu,
        model: str,
        limits: requests.Limits,
        deliverer: Deliverer,
        metrics: Counters,
        traffic: Traffic,
        on_request: Callable[[], None] = lambda: None,
        intake: Taker | None = None,
        recipes: Mapping[Key, str] | None = None,
    ) -> None:
        """`on_request` is called for each request before anything else; without an `intake`, pictures are refused.

        `recipes`: of each key, the digest of all that besides a request decides what a video's bytes are.
        """
        self._intake = intake
        self._recipes = recipes or {}
        self._pool = pool
        self._on_request = on_request
        self._menu = menu
        self._model = model
        self._limits = limits
        self._deliverer = deliverer
        self._metrics = metrics
        self._traffic = traffic
        self._working: set[asyncio.Task[dict[str, Any]]] = set()
        self._given_up = False

    @property
    def working(self) -> int:
        """How many requests are being worked on."""
        return len(self._working)

    def give_up(self) -> None:
        """Answer every request that is not done, and every one still to come, with 503 now."""
        self._given_up = True
        for work in self._working:
            work.cancel()

    async def generate(self, request: dict[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
        """One /v1/videos request. An async generator: raising at call time would quarantine the worker."""
        self._on_request()
        try:
            job, delivery, references = requests.parse(request, uuid.uuid4().hex, self._menu, self._limits)
            if references and self._intake is None:
                raise RequestError("this worker takes no pictures: it makes video from text only")
        except RequestError as error:
            logger.info("request %s refused: %s", context.id(), error)
            self._metrics.rejections.labels("invalid").inc()
            raise InvalidArgument(str(error)) from error
        if context.is_stopped():  # its client left while it waited in Dynamo's own queue
            return
        logger.info("job %s request=%s shape=%s steps=%d seed=%d", job.id, context.id(), job.key, job.steps, job.seed)
        logger.debug("job %s prompt=%r", job.id, job.prompt)
        began = time.monotonic()
        created = int(time.time())
        steps: asyncio.Queue[Step | None] = asyncio.Queue()
        gone = asyncio.ensure_future(context.async_killed_or_stopped())
        made = _Made(replace(job, recipe=self._recipes.get(job.key, "")))
        work = asyncio.create_task(self._make(made, delivery, references, steps.put_nowait))
        self._working.add(work)
        for end in (gone, work):
            end.add_done_callback(lambda _: steps.put_nowait(None))
        try:
            while (step := await steps.get()) is not None:
                # Only for a stream: else the frontend folds all items and keeps the first one's status.
                progress = 100 * step.done // step.total
                yield self._response(made, created=created, status="in_progress", progress=progress)
            if not work.done():
                logger.info("job %s cancelled by its client after %.1f s", job.id, time.monotonic() - began)
                return
            try:
                answer = work.result()
            except asyncio.CancelledError:  # the work's own: by give_up
                raise as_dynamo(job, GivenUp("the worker is ending and does not wait for this job")) from None
            except Exception as error:
                raise as_dynamo(job, error) from error
            yield self._response(made, created=created, **answer)
        finally:
            try:
                await _ended(gone, work)
            finally:
                self._working.discard(work)

    async def _make(
        self,
        made: _Made,
        delivery: Delivery,
        references: tuple[Reference, ...],
        on_step: Callable[[Step], None],
    ) -> dict[str, Any]:
        """Make the video and hand it over: the fields of the answer."""
        if self._given_up:
            raise GivenUp("the worker is ending and takes no more jobs")
        job, began = made.job, time.monotonic()
        counted = False

        def count() -> None:
            """Traffic is what was admitted: a flood that is refused must not decide what is kept hot."""
            nonlocal counted
            if not counted:
                counted = True
                self._traffic.count(job.key)

        def on_event(event: Phase | Step) -> None:
            count()
            if delivery.stream and isinstance(event, Step):
                on_step(event)

        async with self._pictures(job, references, delivery.user) as (pictures, pixels):
            made.job = job = replace(job, pictures=pictures)
            video = await self._pool.generate(job, on_event, user=delivery.user, pixels=pixels)
        # Nothing is awaited between here and deliver(), which owns the file.
        count()
        try:
            where, size = await self._deliverer.deliver(video.path, f"{job.key}-{job.id}", delivery.as_url)
        except BaseException as error:
            client_left = isinstance(error, asyncio.CancelledError) and not self._given_up
            if not client_left:
                self._metrics.rejections.labels("delivery").inc()
            raise
        seconds = time.monotonic() - began
        self._metrics.phase.labels(str(job.key), "respond").observe(max(0.0, seconds - sum(video.phases.values())))
        phases = " ".join(f"{name}={value:.3f}" for name, value in video.phases.items())
        logger.info("job %s done shape=%s seconds=%.3f bytes=%d %s", job.id, job.key, seconds, size, phases)
        return {
            "inference_time_s": seconds - video.phases.get("queue", 0),
            "data": [VideoData(output_format="mp4", fps=job.fps, audio_sample_rate=video.sample_rate or None, **where)],
        }

    @contextlib.asynccontextmanager
    async def _pictures(
        self, job: Job, references: tuple[Reference, ...], user: str
    ) -> AsyncIterator[tuple[tuple[Picture, ...], tuple[int, ...]]]:
        """The job's pictures. What is wrong with them is counted as what is wrong with any request."""
        if not references or self._intake is None:
            yield (), ()
            return
        async with contextlib.AsyncExitStack() as stack:
            began = time.monotonic()
            try:
                sizes = self._menu.offer(job.key).picture_sizes
                pictures, pixels = await stack.enter_async_context(self._intake.taken(references, sizes, user))
            except PictureError:
                self._metrics.rejections.labels("invalid").inc()
                raise
            except Rejected as rejected:
                self._metrics.rejections.labels(rejected.reason).inc()
                raise
            seconds = time.monotonic() - began
            self._metrics.phase.labels(str(job.key), "pictures").observe(seconds)
            logger.info("job %s pictures=%s seconds=%.3f", job.id, ",".join(map(str, pictures)), seconds)
            yield pictures, pixels

    def _response(self, made: _Made, **fields: Any) -> dict[str, Any]:
        model = made.job.variant or self._model
        response: dict[str, Any] = NvVideosResponse(id=video_id(made.job), model=model, **fields).model_dump()
        return response


@dataclass
class _Made:
    """What a request asks for: its job, which gets its pictures on the way."""

    job: Job


def video_id(job: Job) -> str:
    """The answer's id: with the request, all that it takes to make the same bytes again.

    The shape, because a request for 1280x720 is served as 1280x736; seed and steps, because a request need not name
    them; the pictures' digests, because a URL may have something else tomorrow. More is in the MP4 (`Job.comment`).
    """
    parts = ["video", job.id, job.shape.key, f"seed{job.seed}", f"steps{job.steps}"]
    parts += [f"{picture.frame}-{picture.digest[:16]}" for picture in job.pictures]
    return "_".join(parts)


async def _ended(*futures: asyncio.Future[Any]) -> None:
    """Cancel what is not done, and return when all of it is: also when the caller is cancelled meanwhile."""
    cancelled: asyncio.CancelledError | None = None
    for future in futures:
        future.cancel()
        while not future.done():
            try:
                await asyncio.wait({future})
            except asyncio.CancelledError as error:
                cancelled = error
        if not future.cancelled():
            future.exception()  # it has been seen: nobody is told again when it is collected
    if cancelled is not None:
        raise cancelled


def as_dynamo(job: Job, error: Exception) -> Exception:
    """The exception that the frontend maps to the right status; says in the log what the client is not told."""
    if isinstance(error, JobFailed) and error.kind == "refused":
        logger.warning("job %s refused by the pipeline: %s", job.id, error)
        return _invalid(f"the pipeline refused the request: {(error.error.splitlines() or [''])[0]}")
    if isinstance(error, JobTimeout) or (isinstance(error, ProcessLost) and error.reason == "gen_timeout"):
        logger.error("job %s not done in time: %s", job.id, error)
        return TimeoutError(str(error))
    if isinstance(error, PictureError):
        logger.info("job %s refused: %s", job.id, error)
        return _invalid(str(error))
    if isinstance(error, Poisonous):
        logger.warning("job %s refused: %s", job.id, error)
        return _invalid(str(error))
    if isinstance(error, Rejected | ProcessLost | DeliveryTimeout | GivenUp):
        busy = isinstance(error, QueueFull)
        again = "try again" if (wait := getattr(error, "retry_after", None)) is None else _in_seconds(wait)
        logger.log(
            logging.WARNING if busy else logging.ERROR, "job %s not done: %s; its client may %s", job.id, error, again
        )
        text = f"too many requests wait; {again}" if busy else f"the video could not be made now; {again}"
        return _http(429 if busy else 503, text)
    logger.error(
        "job %s failed: %s: %s",
        job.id,
        type(error).__name__,
        error,
        exc_info=not isinstance(error, JobFailed | OSError),
    )
    return _http(500, "the video could not be made")


def _in_seconds(wait: float) -> str:
    return f"try again in {max(1, math.ceil(wait))} s"


def _invalid(text: str) -> Exception:
    error: Exception = InvalidArgument(text)
    return error


def _http(status: int, text: str) -> Exception:
    error: Exception = HttpError(status, text)
    return error
