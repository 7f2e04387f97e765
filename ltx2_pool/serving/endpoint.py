"""A worker's life with Dynamo: registration, health, presence in discovery, and the way out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from dynamo.common.utils.namespace import get_worker_namespace

from ltx2_pool import __version__
from ltx2_pool.processes.pictures import PictureReader
from ltx2_pool.serving.delivery import Deliverer, MediaStore
from ltx2_pool.serving.demand import Listener
from ltx2_pool.serving.descriptors import Descriptors, Exhausted
from ltx2_pool.serving.exits import ABORT_TIMEOUT, BROKEN, FAILED, LOST, STOPPED, LastResort
from ltx2_pool.serving.handler import Counters, VideoHandler
from ltx2_pool.serving.intake import Intake
from ltx2_pool.serving.names import UNREGISTER_GRACE, BehindRouter, Names, leave, publish
from ltx2_pool.serving.presence import Absent
from ltx2_pool.serving.threads import Lane
from ltx2_pool.serving.traffic import Traffic
from ltx2_pool.words import requests
from ltx2_pool.words.menu import Menu
from ltx2_pool.words.outcomes import OnEvent, Video
from ltx2_pool.words.requests import Job
from ltx2_pool.words.settings import Settings
from ltx2_pool.words.shapes import Key

logger = logging.getLogger(__name__)

Health = Literal["starting", "able", "unable", "broken"]

REGISTER_TIMEOUT = 120.0
"""Seconds for registering the model."""
BROKEN_DRAIN = 30.0
"""Seconds that a broken worker drains at most: what it could still make is made by then."""
SETTLE = 3.0
"""Seconds for the answers of requests that were given up to leave."""


class Pool(Protocol):
    """What makes the videos."""

    listener: Listener
    """To be told what the fleet is asked for."""

    async def start(self) -> None:
        """Returns when enough is hot."""

    async def generate(self, job: Job, on_event: OnEvent, user: str = "", pixels: Sequence[int] = ()) -> Video: ...

    async def close(self, drain_timeout: float = 0) -> None: ...

    def abort(self) -> None:
        """Refuse every job that is not done, now."""

    def status(self) -> dict[str, Any]: ...

    @property
    def health(self) -> Health: ...

    async def health_after(self, known: Health) -> Health:
        """Waits until the health is different from `known`."""


class Series(Counters, Protocol):
    """The metrics of the worker."""

    @property
    def registry(self) -> Any: ...


@dataclass(frozen=True)
class End:
    """Why the worker ends, how long admitted jobs may take, and the exit status."""

    why: str
    status: int
    drain: float = 0


async def serve(
    runtime: Any,
    pool: Pool,
    menu: Menu,
    settings: Settings,
    metrics: Series,
    traffic: Traffic,
    last_resort: LastResort | None = None,
    recipes: Mapping[Key, str] | None = None,
) -> int:
    """Register with Dynamo once the pool is ready, serve until a signal or the worst, drain; the exit status.

    `recipes`: what the videos of each key say they were made with (`words.requests.Job.recipe`).
    """
    last_resort = last_resort or LastResort()
    return await Worker(runtime, pool, menu, settings, metrics, traffic, last_resort, recipes).run()


class Worker:
    """One worker, from the start of its pool to its last answer."""

    def __init__(
        self,
        runtime: Any,
        pool: Pool,
        menu: Menu,
        settings: Settings,
        metrics: Series,
        traffic: Traffic,
        last_resort: LastResort,
        recipes: Mapping[Key, str] | None = None,
    ) -> None:
        self._runtime = runtime
        self._pool = pool
        self._menu = menu
        self._settings = settings
        self._metrics = metrics
        self._traffic = traffic
        self._last_resort = last_resort
        self._model = settings.served_model_name or menu.model
        store = None
        if settings.media_output_fs_url:
            store = MediaStore(settings.media_output_fs_url, settings.media_output_http_url)
        limits = requests.Limits(max_prompt_chars=settings.max_prompt_chars, urls=store is not None)
        deliverer = Deliverer(store, settings.delivery_timeout)
        self._descriptors = Descriptors()
        self._intake = Intake(PictureReader(settings.pictures), settings.pictures)
        self._handler = VideoHandler(
            pool,
            menu,
            self._model,
            limits,
            deliverer,
            metrics,
            traffic,
            on_request=self._descriptors.look,
            intake=self._intake,
            recipes=recipes,
        )
        self._namespace = get_worker_namespace(settings.namespace)
        path = self._path = f"{self._namespace}.{settings.component}.{settings.endpoint}"
        names = [self._model, *menu.models[1:]]
        self._names: Names | BehindRouter = Names(runtime, path, names, str(settings.model), settings.discovery)
        if settings.router:
            self._names = BehindRouter(runtime, path, names, pool.status, pool.listener, settings.discovery)
        self._ending: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        self._aborted = asyncio.Event()
        self._serving: asyncio.Future[Any] | None = None
        self._acted_on: Health = "able"

    async def run(self) -> int:
        """Returns the exit status. Raises what the start of the pool or the registration raises."""
        end = End("an error, or cut off", FAILED)
        with self._signals():
            try:
                self._publish()
                end = await self._until_the_end()
            finally:
                await self._shut_down(end)
        return end.status

    def _end(self, end: End) -> None:
        """The first reason to end counts."""
        if not self._ending.done():
            self._ending.set_result(end)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first signal drains, the next one does not wait for anything."""
        loop = asyncio.get_running_loop()
        told = 0

        def on_signal() -> None:
            nonlocal told
            told += 1
            if told == 1:
                self._end(End("told to stop", STOPPED, self._settings.drain_timeout))
                return
            logger.warning("told to stop again: jobs that are not done are given up")
            if not self._aborted.is_set():
                self._last_resort.arm(ABORT_TIMEOUT, STOPPED)
            self._aborted.set()
            self._pool.abort()
            self._handler.give_up()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _publish(self) -> None:
        """Metrics and status, on Dynamo's system port."""
        self._runtime.register_engine_route("video/status", self._status)
        publish(self._names.endpoint, self._path, self._metrics.registry, self._model)
        port = os.environ.get("DYN_SYSTEM_PORT", "")
        if port.isdigit() and int(port):
            logger.info("metrics and status are on system port %s", port)
        else:
            logger.warning("no metrics and no status: DYN_SYSTEM_PORT is %s", repr(port) if port else "not set")

    async def _status(self, _body: object) -> dict[str, Any]:
        status = self._pool.status()
        if self._intake.pid is not None:
            status["helpers"] = {**status.get("helpers", {}), "pictures": self._intake.pid}
        return {
            "version": __version__,
            "model": self._model,
            "menu": self._menu.hash,
            "models": list(self._names.models),
            "shapes": [str(key) for key in self._menu.keys],
            "traffic": self._traffic.scores(),
            "health": self._pool.health,
            **status,
        }

    async def _until_the_end(self) -> End:
        starting = asyncio.create_task(self._pool.start())
        await _first(starting, self._ending)
        if not starting.done():
            end = self._ending.result()
            self._last_resort.arm(self._settings.term_grace + ABORT_TIMEOUT, end.status)
            starting.cancel()
            await asyncio.wait({starting})
            return end
        await starting
        registering = asyncio.create_task(self._open())
        either: set[asyncio.Future[Any]] = {registering, self._ending}
        await asyncio.wait(either, timeout=REGISTER_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
        if not registering.done():
            registering.cancel()
            if not self._ending.done():
                self._end(End(f"could not register within {REGISTER_TIMEOUT:.0f} s", LOST))
            end = self._ending.result()
            self._last_resort.arm(self._settings.term_grace + ABORT_TIMEOUT, end.status)
            return end
        await registering
        # Dynamo lets running handlers finish without a limit; _shut_down sets one.
        self._serving = asyncio.ensure_future(self._names.serve(self._handler.generate))
        self._runtime.set_health_status(True)
        logger.info(
            "serving %s: %d shapes (menu %s) at %s",
            ", ".join(self._names.models),
            len(self._menu.offers),
            self._menu.hash,
            self._namespace,
        )
        watches = [
            asyncio.create_task(self._kept_up(watch))
            for watch in (self._follow_health, self._watch_descriptors, self._keep_present, self._traffic.keep)
        ]
        try:
            await _first(self._serving, self._ending)
            if not self._ending.done():
                error = None if self._serving.cancelled() else self._serving.exception()
                self._end(End(f"Dynamo serves the endpoint no longer: {error or 'no reason given'}", LOST))
            return self._ending.result()
        finally:
            for watch in watches:
                watch.cancel()
            await asyncio.wait(watches)

    async def _open(self) -> None:
        """Register, with all that the first request may need."""
        if any(offer.image for offer in self._menu.offers):
            try:
                await self._intake.start()
            except OSError as error:  # it is tried again with each picture
                logger.error("pictures cannot be decoded now: %s", error)
        await self._names.register()

    async def _kept_up(self, watch: Callable[[], Awaitable[None]]) -> None:
        """A watch that fails says so and begins again: it must not fail in silence, nor end a worker that serves."""
        while True:
            try:
                await watch()
                return
            except Exception:
                logger.exception("a watch failed, and begins again")
                await asyncio.sleep(1)

    async def _follow_health(self) -> None:
        """Out of discovery while nothing could be made, so that nobody's requests are refused here at once."""
        while not self._ending.done():
            health = self._pool.health
            if health == self._acted_on:
                await self._pool.health_after(health)
                continue
            if health == "unable":
                logger.error("no shape can be made now: leaving discovery until one can; %s", self._why())
                await self._welcome()
            elif health == "able":
                logger.warning("videos can be made again: back into discovery; %s", self._why())
                await self._welcome()
            elif health == "broken":
                logger.error("nothing can be made here, whatever is tried; %s", self._why())
                self._runtime.set_health_status(False)
                drain = min(BROKEN_DRAIN, self._settings.drain_timeout)
                self._end(End("nothing can be made here, whatever is tried", BROKEN, drain))
                return
            self._acted_on = health

    async def _watch_descriptors(self) -> None:
        try:
            await self._descriptors.watch(self._welcome)
        except Exhausted as error:
            self._end(End(str(error), LOST, self._settings.drain_timeout))

    async def _welcome(self) -> None:
        """In discovery, and healthy, or out of both: as requests are welcome or not."""
        if not self._welcomes:
            self._runtime.set_health_status(False)
        await self._names.want(self._welcomes)
        self._runtime.set_health_status(self._welcomes)  # which may have changed meanwhile

    @property
    def _welcomes(self) -> bool:
        return self._pool.health == "able" and not self._descriptors.short and not self._ending.done()

    def _why(self) -> str:
        return f"status {json.dumps(self._pool.status(), default=str)[:4000]}"

    async def _keep_present(self) -> None:
        try:
            await self._names.keep()
        except Absent as error:
            self._end(End(str(error), LOST, self._settings.drain_timeout))

    async def _shut_down(self, end: End) -> None:
        """Out of discovery, a grace, the drain; then nothing is waited for any longer.

        The pool is closed once, and that is awaited. When something hangs, the last resort ends the process.
        """
        level = logging.ERROR if end.status else logging.INFO
        logger.log(level, "ending with status %d: %s; jobs have %.0f s", end.status, end.why, end.drain)
        self._runtime.set_health_status(False)
        if self._serving is not None:
            await leave(self._names)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._aborted.wait(), UNREGISTER_GRACE)
        # Ends what serve_endpoint waits for, and nothing that a handler is doing.
        self._runtime.shutdown()
        closing = asyncio.ensure_future(self._pool.close(end.drain))
        await self._done_or_aborted({closing} | ({self._serving} if self._serving else set()), end.drain)
        if not self._aborted.is_set():
            self._last_resort.arm(self._settings.term_grace + SETTLE + ABORT_TIMEOUT, end.status)
        if self._handler.working:
            logger.error("%d requests are given up", self._handler.working)
        self._handler.give_up()
        left = False
        if self._serving is not None:
            await asyncio.wait({self._serving}, timeout=SETTLE)
            left = not self._serving.done()
            if left:
                logger.error("%d requests did not end when they were given up", self._handler.working)
        await closing
        await self._intake.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(SETTLE):
                await Lane("save-traffic", 1).run(self._traffic.save)
        if not left:
            self._last_resort.disarm()
        logger.info("ended: %s", end.why)

    async def _done_or_aborted(self, futures: set[asyncio.Future[Any]], timeout: float) -> None:
        aborted = asyncio.ensure_future(self._aborted.wait())
        done = asyncio.ensure_future(asyncio.wait(futures))
        try:
            await asyncio.wait({aborted, done}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            aborted.cancel()
            done.cancel()


async def _first(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
