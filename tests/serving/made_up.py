"""A made-up pool, a made-up Dynamo and a made-up store: what the endpoint is tested with."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem
from prometheus_client import CollectorRegistry

from ltx2_pool.serving.demand import Listener
from ltx2_pool.words.outcomes import (
    JobFailed,
    JobTimeout,
    NoRoom,
    OnEvent,
    Poisonous,
    PoolClosed,
    ProcessLost,
    QueueFull,
    Unavailable,
    Video,
)
from ltx2_pool.words.protocol import Phase, Step
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import Key

CONTENT = b"a made-up video"
FAILURES: dict[str, Callable[[Job], Exception]] = {
    "no room": lambda job: NoRoom("the run directory is full"),
    "queue full": lambda job: QueueFull("queue_full", 9, 12.2),
    "unavailable": lambda job: Unavailable("its processes do not start", 30),
    "poisonous": lambda job: Poisonous("these parameters ended two processes"),
    "timeout": lambda job: JobTimeout("not done by its deadline"),
    "gen timeout": lambda job: ProcessLost(job.shape.key, "gen_timeout", "took too long"),
    "lost": lambda job: ProcessLost(job.shape.key, "gen_eof", "was killed"),
    "refused": lambda job: JobFailed(Key(job.shape), "refused", "no such token\nand more"),
    "soft": lambda job: JobFailed(Key(job.shape), "soft", "it did not work"),
    "a bug": lambda job: KeyError("a bug"),
}
"""Prompts with which the made-up pool fails, and how."""
STATUSES = {
    "no room": 503,
    "queue full": 429,
    "unavailable": 503,
    "lost": 503,
    "soft": 500,
    "a bug": 500,
    "timeout": 504,
    "gen timeout": 504,
    "poisonous": 400,
    "refused": 400,
}
"""What a client is told of each."""


async def until(condition: Callable[[], object], timeout: float = 20) -> None:
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110 - any condition, of any object
            await asyncio.sleep(0.005)


class MadeUpPool:
    """Makes the same video for everybody; holds jobs with the prompt "hold" until they are released."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.leave: Callable[[Path], None] = lambda path: path.write_bytes(CONTENT) and None
        self.users: list[str] = []
        self.asked: list[Job] = []
        self.pictures: list[Any] = []
        """Of each job, its pictures and their pixels."""
        self.held: dict[str, asyncio.Future[None]] = {}
        self.cancelled: list[str] = []
        self.steps = asyncio.Event()
        self.ready = asyncio.Event()
        self.ready.set()
        self.hot: list[str] = []
        """Keys that it has made, the last one last: the last K stay hot."""
        self.places = int(os.environ.get("MADE_UP_PLACES", "100"))
        self.cold = 0
        self.closes = 0
        self.closing = False
        self.drain_timeout = -1.0
        self.aborted = False
        self.listener = Listener()
        self._health: Any = "able"
        self._changed = asyncio.Event()

    @property
    def health(self) -> Any:
        return self._health

    @health.setter
    def health(self, health: Any) -> None:
        self._health = health
        self._changed.set()

    async def health_after(self, known: Any) -> Any:
        while self._health == known:
            self._changed.clear()
            await self._changed.wait()
        return self._health

    async def start(self) -> None:
        await self.ready.wait()

    async def generate(self, job: Job, on_event: OnEvent, user: str = "", pixels: Sequence[int] = ()) -> Video:
        self.users.append(user)
        self.asked.append(job)
        seen = [os.pread(descriptor, 1 << 26, 0) for descriptor in pixels]
        self.pictures.append(list(zip(job.pictures, seen, strict=True)))
        if self.closing:
            raise PoolClosed("the worker is shutting down")
        if job.prompt in FAILURES:
            raise FAILURES[job.prompt](job)
        if (key := str(job.key)) not in self.hot:
            self.cold += 1
        self.hot = [*(other for other in self.hot if other != key), key][-self.places :]
        on_event(Phase(job_id=job.id, phase="text"))
        for done in range(job.steps):
            on_event(Step(job_id=job.id, done=done, total=job.steps))
        self.steps.set()
        if job.prompt == "hold":
            self.held[job.id] = asyncio.get_running_loop().create_future()
            try:
                await self.held[job.id]
            except asyncio.CancelledError:
                self.cancelled.append(job.id)
                raise
            finally:
                del self.held[job.id]
        path = self.directory / f"{job.id}.mp4"
        self.leave(path)
        return Video(path, 24000, {"queue": 0.0, "denoise": 0.0})

    def release(self, error: Exception | None = None) -> None:
        for future in list(self.held.values()):
            if not future.done() and error is None:
                future.set_result(None)
            elif not future.done() and error is not None:
                future.set_exception(error)

    async def close(self, drain_timeout: float = 0) -> None:
        assert not self.closing, "two closes at once"
        self.closing = True
        self.closes += 1
        self.drain_timeout = drain_timeout
        if self.held:
            await asyncio.wait(self.held.values(), timeout=drain_timeout)
        self.release(PoolClosed("the drain is over"))

    def abort(self) -> None:
        self.aborted = True
        self.release(PoolClosed("aborted"))

    def status(self) -> dict[str, Any]:
        running = len(self.held)
        forecast = {"leases": 1, "free": 1 - running, "work": 1.0 * running, "processes": dict.fromkeys(self.hot, 1)}
        return {
            "running": running,
            "last_errors": ["disk on fire"],
            "forecast": forecast,
            "cold": self.cold,
            "routers": self.listener.routers(time.monotonic()),
        }


class Counts:
    """Metrics that only count."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.counted: Counter[tuple[str, ...]] = Counter()

    @property
    def rejections(self) -> Any:
        return self

    @property
    def phase(self) -> Any:
        return self

    def labels(self, *labels: str) -> Any:
        return _Series(self.counted, labels)


class _Series:
    def __init__(self, counted: Counter[tuple[str, ...]], labels: tuple[str, ...]) -> None:
        self._counted, self._labels = counted, labels

    def inc(self) -> None:
        self._counted[self._labels] += 1

    def observe(self, _value: float) -> None:
        self._counted[self._labels] += 1


class Context:
    """A client of the frontend, which may leave."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    def id(self) -> str:
        return "request"

    def is_stopped(self) -> bool:
        return self.gone.is_set()

    async def async_killed_or_stopped(self) -> bool:
        return await self.gone.wait()


class Endpoint:
    """An endpoint of Dynamo in one process: `served` lets requests in while it is served."""

    def __init__(self) -> None:
        self.listed = False
        self.cannot_enter: Exception | None = None
        self.entered = 0
        self.stop = asyncio.Event()
        self.requests: set[asyncio.Task[Any]] = set()
        self._handler: Any = None

    def connection_id(self) -> int:
        return 7

    async def client(self) -> Any:
        return self

    def instance_ids(self) -> list[int]:
        return [3, 7] if self.listed else [3]

    async def register_endpoint_instance(self) -> None:
        if self.cannot_enter:
            raise self.cannot_enter
        self.entered += 1
        self.listed = True

    async def unregister_endpoint_instance(self) -> None:
        if not self.listed:
            raise ValueError("missing key")
        self.listed = False

    async def serve_endpoint(self, handler: Any, **options: Any) -> None:
        assert options["graceful_shutdown"]
        self._handler = handler
        self.listed = True
        await self.stop.wait()
        while self.requests:
            await asyncio.wait(self.requests)

    @property
    def served(self) -> bool:
        return self._handler is not None

    def ask(self, prompt: str = "fine", context: Context | None = None, **fields: Any) -> asyncio.Task[Any]:
        """Answers with the last item; raises what the handler does."""

        async def go() -> Any:
            items = self._handler({"model": "m", "prompt": prompt, **fields}, context or Context())
            async with contextlib.aclosing(items):
                return [item async for item in items][-1]

        task = asyncio.create_task(go())
        self.requests.add(task)
        task.add_done_callback(self.requests.discard)
        return task


class Runtime:
    """The rest of Dynamo."""

    def __init__(self) -> None:
        self.made = Endpoint()
        self.healthy: bool | None = None
        self.routes: dict[str, Any] = {}

    def endpoint(self, _name: str) -> Endpoint:
        return self.made

    def set_health_status(self, healthy: bool) -> None:
        self.healthy = healthy

    def register_engine_route(self, name: str, route: Any) -> None:
        self.routes[name] = route

    def shutdown(self) -> None:
        self.made.stop.set()


class HangingFileSystem(AbstractFileSystem):
    """A store that hangs until it is let go, and remembers what it was given."""

    protocol = "hanging"
    cachable = False
    let_go = threading.Event()
    stored: dict[str, bytes] = {}  # noqa: RUF012 - one for all, as a store is
    waiting = 0

    def pipe_file(self, path: str, value: bytes, **_options: Any) -> None:
        type(self).waiting += 1
        self.let_go.wait()
        self.stored[path] = value

    def rm(self, path: str, **_options: Any) -> None:
        self.stored.pop(path)

    @classmethod
    def start_again(cls) -> None:
        cls.let_go = threading.Event()
        cls.stored = {}
        cls.waiting = 0


fsspec.register_implementation("hanging", HangingFileSystem, clobber=True)


async def collect(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]
