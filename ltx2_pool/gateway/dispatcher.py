"""Takes jobs from the store, has them made, and settles each: the one place where a job ends.

A job is worked on by one dispatcher at a time, under a claim that a heartbeat renews. When the dispatcher dies, the
claim runs out and another takes the job over; when it was only slow, it notices that its claim is gone, and what it
made counts for nothing. Every way in which the making can go has one line in :meth:`Dispatcher._outcome`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from ltx2_pool.gateway.content import Content, Stored
from ltx2_pool.gateway.jobs import Claimed, storable
from ltx2_pool.gateway.metrics import GatewayMetrics
from ltx2_pool.gateway.news import News
from ltx2_pool.gateway.settings import GatewaySettings
from ltx2_pool.gateway.store import Refused, Store, StoreError
from ltx2_pool.gateway.upstream import Away, Busy, Failed, Lost

logger = logging.getLogger(__name__)

LOOK_EVERY = 0.5
"""Seconds between looks for jobs that other gateways have accepted, or that may be tried again."""
SWEEP_EVERY = 2.0
CLOSE_TIMEOUT = 15.0
"""Seconds for what is begun when the gateway closes: a statement has less."""
TELL_EVERY = 0.25
"""Seconds between two writes of a job's progress."""
WRITES = 6
"""Times that a video is written before it counts as lost: with the pauses between them, some three seconds."""


class Maker(Protocol):
    """What makes the videos: :class:`~ltx2_pool.gateway.upstream.Upstream`."""

    async def make(self, body: dict[str, object], on_progress: Callable[[int], None]) -> bytes: ...


class _NotStored(Exception):
    """The content store did not take the video."""


class _NoLongerOurs(Exception):
    """The job was deleted, or another dispatcher has it."""


@dataclass
class _Work:
    """A job in work here."""

    job: Claimed
    token: str
    progress: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)
    stored: Stored | None = None
    began: float = field(default_factory=time.monotonic)

    @property
    def path(self) -> str:
        """Where its video goes: no two dispatchers ever write, or remove, the same file."""
        return f"{self.job.id}/{self.token}.mp4"


class Dispatcher:
    """Run as a task; :meth:`close` lets what is in work finish for a while."""

    def __init__(
        self,
        store: Store,
        content: Content,
        maker: Maker,
        news: News,
        metrics: GatewayMetrics,
        settings: GatewaySettings,
    ) -> None:
        self._store, self._content, self._maker, self._news = store, content, maker, news
        self._metrics, self._settings = metrics, settings
        self._wake = asyncio.Event()
        self._sweep_now = asyncio.Event()
        self._works: dict[str, tuple[_Work, asyncio.Task[None]]] = {}
        """By token: after a pause that was too long, this dispatcher may take over its own job."""
        self._loops: list[asyncio.Task[None]] = []
        self._closing = False
        self._away_until = 0.0
        self.typical = 0.0
        """Seconds that a job takes here, as a moving average; 0 when nobody knows."""

    def start(self) -> None:
        self._closing = False
        self._loops = [
            asyncio.create_task(self._repeat(self._claim, self._wake, LOOK_EVERY)),
            asyncio.create_task(self._repeat(self._sweep, self._sweep_now, SWEEP_EVERY)),
        ]

    def wake(self) -> None:
        """There is a job to be had."""
        self._wake.set()

    def stop_deleted(self, id: str) -> None:
        """A job was deleted: stop it if it is in work here, and remove what is left of it."""
        for work, _ in self._works.values():
            if work.job.id == id:
                work.news.set()
        self._sweep_now.set()

    async def close(self) -> None:
        """Take no more jobs, wait for those in work, and put back what is not done in time."""
        self._closing = True
        self._wake.set()
        self._sweep_now.set()
        # Not cancelled, as long as it can be helped: nobody would know whether a claim was made, or a job failed.
        _, late = await asyncio.wait(self._loops, timeout=CLOSE_TIMEOUT)
        for loop in late:
            loop.cancel()
        if late:
            await asyncio.wait(late)
        tasks = [task for _, task in self._works.values()]
        if tasks:
            logger.info("draining %d jobs for up to %g s", len(tasks), self._settings.drain_timeout)
            _, late = await asyncio.wait(tasks, timeout=self._settings.drain_timeout)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)

    async def _repeat(self, step: Callable[[], Awaitable[None]], wake: asyncio.Event, every: float) -> None:
        """Take the step when woken, and every so often; what goes wrong is logged, and tried again."""
        while not self._closing:
            try:
                await step()
            except Exception as error:
                logger.error("%s: %s: %s", step.__name__, type(error).__name__, error)
                await asyncio.sleep(1)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(every):
                    await wake.wait()
            wake.clear()

    async def _claim(self) -> None:
        """Take jobs until there are none, or enough are in work."""
        while len(self._works) < self._settings.concurrency and not self._closing:
            if time.monotonic() < self._away_until:
                return  # a queue of a thousand jobs would ask a frontend that is away a thousand times a second
            token = secrets.token_hex(16)
            job = await self._store.claim(token, self._settings.claim_timeout, self._settings.job_timeout)
            if job is None:
                return
            if job.taken_over:
                self._metrics.attempts.labels("again").inc()
                logger.warning("job %s is handed out for the %d. time", job.id, job.attempts)
            else:
                self._metrics.attempts.labels("first").inc()
            work = _Work(job, token)
            self._works[token] = (work, asyncio.create_task(self._work(work)))
            self._metrics.in_work.set(len(self._works))
            self._news.tell(job.id)

    async def _sweep(self) -> None:
        """Fail what is overdue, and remove what is deleted or expired: its content first, then its row."""
        for id in await self._store.overdue(self._settings.job_timeout, self._settings.retention):
            self._metrics.ended.labels("timeout").inc()
            logger.error("job %s was not made in time", id)
            self._news.tell(id)
            with contextlib.suppress(Exception):
                await self._content.remove(id)
        stuck: list[str] = []
        while not self._closing and (remains := await self._store.remains(skip=stuck)):
            for id, expired in remains:
                try:
                    await self._content.remove(id)
                except Exception as error:
                    logger.error("job %s cannot be removed yet: %s: %s", id, type(error).__name__, error)
                    stuck.append(id)
                    continue
                if await self._store.forget(id):
                    self._metrics.ended.labels("expired" if expired else "deleted").inc()
                    logger.info("job %s is removed (%s)", id, "expired" if expired else "deleted")
                self._news.tell(id)

    async def _work(self, work: _Work) -> None:
        """One job, from its claim to its settlement."""
        job = work.job
        beating = asyncio.create_task(self._beat(work))
        making = asyncio.create_task(self._made(work))
        try:
            await asyncio.wait({beating, making}, return_when=asyncio.FIRST_COMPLETED)
            if making.done():
                await self._settled(work, making)
            else:
                await _ended(making)  # which closes the connection, and so stops the GPU
                logger.info("job %s is stopped: deleted, or taken over by another gateway", job.id)
                await self._abandoned(work)
        except asyncio.CancelledError:  # the gateway is closing
            await _ended(making)
            with contextlib.suppress(Exception):
                if await self._store.release(job.id, work.token, 0, counted=False) and work.stored is not None:
                    await self._content.remove(work.path)
            raise
        finally:
            await _ended(beating)
            del self._works[work.token]
            self._metrics.in_work.set(len(self._works))
            self._wake.set()
            self._news.tell(job.id)

    async def _beat(self, work: _Work) -> None:
        """Renew the claim, and write the progress down; returns when the job is no longer ours."""
        job, every = work.job, self._settings.claim_timeout / 3
        sure_until = time.monotonic() + self._settings.claim_timeout
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(every):
                    await work.news.wait()
            work.news.clear()
            began = time.monotonic()
            try:
                async with asyncio.timeout(every):
                    if not await self._store.beat(job.id, work.token, self._settings.claim_timeout, work.progress):
                        return
                sure_until = began + self._settings.claim_timeout
            except (StoreError, TimeoutError) as error:
                logger.warning("job %s: its claim is not renewed: %s", job.id, error)
                if time.monotonic() > sure_until:
                    return
                await asyncio.sleep(min(1, every))
            self._news.tell(job.id)
            await asyncio.sleep(TELL_EVERY)

    async def _made(self, work: _Work) -> bytes:
        def on_progress(progress: int) -> None:
            if progress > work.progress:
                work.progress = progress
                work.news.set()

        job = work.job
        if job.attempts > self._settings.attempts:
            raise Failed("server_error", f"the video was begun {job.attempts - 1} times, and lost each time")
        async with asyncio.timeout(max(0, job.left)):
            return await self._maker.make(job.body, on_progress)

    async def _settled(self, work: _Work, making: asyncio.Future[bytes]) -> None:
        """Write the outcome down, for as long as the database needs and the claim is ours."""
        pause, refused, writes = 0.1, False, 0
        while True:
            try:
                await self._outcome(work, making)
                return
            except _NoLongerOurs:
                logger.info("job %s: what came of it counts for nothing, it was deleted or taken over", work.job.id)
                await self._abandoned(work)
                return
            except Refused as error:
                logger.error("job %s: the database does not take its outcome: %s", work.job.id, error)
                if refused:
                    return  # the claim runs out
                refused, making = (
                    True,
                    _failing(Failed("server_error", "the gateway failed: the database does not take the outcome")),
                )
            except StoreError as error:
                logger.error("job %s: its outcome is not written yet: %s", work.job.id, error)
            except _NotStored as error:
                logger.error("job %s: the video cannot be stored: %s", work.job.id, error)
                if (writes := writes + 1) == WRITES:
                    # Where the store is, is nobody's business.
                    making = _failing(Lost("the video cannot be stored"))
            await asyncio.sleep(pause)
            pause = min(5, 2 * pause)

    async def _outcome(self, work: _Work, making: asyncio.Future[bytes]) -> None:
        job, retention = work.job, self._settings.retention
        try:
            data = making.result()
            if work.stored is None:
                work.stored = await self._write(work.path, data)
            stored = work.stored
            ours = await self._store.complete(job.id, work.token, work.path, stored.size, stored.etag, retention)
            if ours:
                took = time.monotonic() - work.began
                self._away_until = 0.0
                self.typical = took if not self.typical else 0.8 * self.typical + 0.2 * took
                self._metrics.ended.labels("completed").inc()
                self._metrics.seconds.observe(max(0.0, self._settings.job_timeout - job.left + took))
                self._metrics.bytes.inc(stored.size)
                logger.info("job %s done seconds=%.3f bytes=%d attempt=%d", job.id, took, stored.size, job.attempts)
                if job.attempts > 1:  # what others wrote, and nobody will ever name
                    with contextlib.suppress(Exception):
                        await self._content.remove_others(work.path)
        except Failed as failed:
            ours = await self._fail(work, failed.code, failed.message)
        except TimeoutError:
            ours = await self._fail(work, "timeout", "the video was not made in time")
        except Busy as busy:
            pause = random.uniform(0.5, 2)
            if isinstance(busy, Away):
                self._away_until = time.monotonic() + pause
            ours = await self._again(work, "busy", str(busy), pause, counted=False)
        except Lost as lost:
            if job.attempts >= self._settings.attempts:
                ours = await self._fail(work, "server_error", f"the video was lost {job.attempts} times: {lost}")
            else:
                pause = min(30, 2 ** (job.attempts - 1)) * random.uniform(0.5, 1)
                ours = await self._again(work, "lost", str(lost), pause, counted=True)
        except (StoreError, _NotStored):
            raise
        except Exception as error:
            logger.exception("job %s", job.id)
            ours = await self._fail(work, "server_error", f"the gateway failed: {type(error).__name__}")
        if not ours:
            raise _NoLongerOurs

    async def _write(self, path: str, data: bytes) -> Stored:
        try:
            return await self._content.write(path, data)
        except Exception as error:  # whatever the store's client throws
            raise _NotStored(f"{type(error).__name__}: {error}") from error

    async def _fail(self, work: _Work, code: str, message: str) -> bool:
        ours = await self._store.fail(work.job.id, work.token, code, message, self._settings.retention)
        if ours:
            self._metrics.ended.labels("timeout" if code == "timeout" else "failed").inc()
            logger.warning("job %s failed: %s: %s", work.job.id, code, storable(message, 2000))
            if work.job.attempts > 1 or work.stored is not None:  # a video that was stored, and nobody will ever name
                with contextlib.suppress(Exception):
                    await self._content.remove(work.job.id)
        return ours

    async def _again(self, work: _Work, reason: str, why: str, after: float, *, counted: bool) -> bool:
        self._metrics.retries.labels(reason).inc()
        logger.log(
            logging.WARNING if counted else logging.INFO, "job %s is tried again in %.1f s: %s", work.job.id, after, why
        )
        return await self._store.release(work.job.id, work.token, after, counted)

    async def _abandoned(self, work: _Work) -> None:
        """Leave nothing behind of a job that is no longer ours."""
        with contextlib.suppress(Exception):
            found = (await self._store.get_many([work.job.id])).get(work.job.id)
            if work.stored is not None and found is None:
                await self._content.remove(work.job.id)
            elif work.stored is not None and found is not None and found.content != work.path:
                await self._content.remove(work.path)
        with contextlib.suppress(StoreError):
            await self._store.give_back(work.job.id, work.token)
        self._sweep_now.set()


def _failing(error: Exception) -> asyncio.Future[bytes]:
    future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    future.set_exception(error)
    return future


async def _ended(task: asyncio.Task[object]) -> None:
    """Cancel it, and wait until it has ended."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()
