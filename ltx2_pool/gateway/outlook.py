"""What can be said of the pool behind the frontend: its models, shapes and queue, and how long a client should wait."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ltx2_pool.gateway.upstream import Busy, Upstream
from ltx2_pool.words.menu import Menu

T = TypeVar("T")

logger = logging.getLogger(__name__)

FRESH = 1.0
"""Seconds for which an answer of the frontend or of the workers is good."""
PATIENCE = 0.5
"""Seconds to wait for an answer of the frontend or of the workers, before the last one is taken."""
UNKNOWN_WAIT = 5.0
"""Seconds to tell a client when nobody knows better."""
POLLS_PER_SECOND = 100
"""Above so many status calls a second, clients that listen are told to ask less often than once a second."""
_KEY = re.compile(r"\d{1,5}x\d{1,5}@\d{1,5}f(\+.{1,256})?")
_ORDER = ("unavailable", "cold", "draining", "loading", "spawning", "encoding", "generating", "ready")
"""States of a shape's process, the best last: what is shown of several workers."""


class _Process(BaseModel):
    shape: str | None = None
    state: str = ""


class _Device(BaseModel):
    budget: int | float | None = None
    held: int | float | None = None
    leases: int | None = None
    processes: int | None = None


class _Worker(BaseModel):
    """What is used of a worker's status."""

    model_config = ConfigDict(protected_namespaces=(), allow_inf_nan=False)

    model: str | None = None
    health: str | None = None
    running: int | None = None
    waiting: int | None = None
    expected_wait_s: float | None = None
    max_size: int | None = None
    version: str | None = None
    devices: dict[str, _Device] = {}
    shapes: list[str] = []
    processes: list[_Process] = []
    unavailable: dict[str, Any] = {}
    waiting_by_shape: dict[str, int] = {}

    @property
    def view(self) -> dict[str, Any]:
        return self.model_dump(exclude={"shapes", "processes", "unavailable", "waiting_by_shape"})


class _Cached(Generic[T]):
    """An answer that is asked for at most once at a time, and again when it is old. Who asks waits for a moment, and
    then takes the last one."""

    def __init__(self, ask: Callable[[], Awaitable[T]], nothing: T) -> None:
        self._ask, self._last, self._until, self._asked = ask, nothing, 0.0, 0.0
        self._asking: asyncio.Task[None] | None = None

    async def get(self) -> T:
        if time.monotonic() >= self._until:
            if self._asking is None or self._asking.done():
                self._asking, self._asked = asyncio.create_task(self._refresh()), time.monotonic()
            await asyncio.wait({self._asking}, timeout=max(0, self._asked + PATIENCE - time.monotonic()))
        return self._last

    async def _refresh(self) -> None:
        try:
            self._last = await self._ask()
        except Exception as error:
            logger.warning("%s: %s", type(error).__name__, error)
        self._until = time.monotonic() + FRESH


class Outlook:
    """Asks the frontend and the workers, not more often than every second, whoever asks here."""

    def __init__(self, upstream: Upstream, menu: Menu | None, concurrency: int) -> None:
        self._upstream, self._menu, self._concurrency = upstream, menu, concurrency
        self._models = _Cached[list[dict[str, Any]]](self._ask_models, [])
        self._statuses = _Cached[list[_Worker]](self._ask_statuses, [])
        self._polls: deque[float] = deque(maxlen=10 * POLLS_PER_SECOND)
        self._default = menu.model if menu is not None else ""

    async def models(self) -> list[dict[str, Any]]:
        """Those that are served now; none while the frontend does not answer."""
        return await self._models.get()

    async def _ask_models(self) -> list[dict[str, Any]]:
        try:
            models: list[object] = list(await self._upstream.models())
        except Busy:
            return []
        return [model for model in models if isinstance(model, dict) and isinstance(model.get("id"), str)]

    async def _ask_statuses(self) -> list[_Worker]:
        workers = []
        for status in await self._upstream.statuses():
            try:
                workers.append(_Worker.model_validate(status))
            except ValidationError as error:
                logger.warning("a worker's status cannot be understood: %s", error.errors()[0]["msg"])
        return workers

    async def model(self, asked: str | None) -> str | None:
        """The model that a request is for: the one asked for, or the first; None when it is none of ours, "" when
        nobody can tell."""
        served = [str(model["id"]) for model in await self.models()]
        if served and not self._default:
            self._default = served[0]
        if asked is None:
            return self._default
        ours = self._menu.models if self._menu is not None else ()
        return None if served and asked not in (*served, *ours) else asked

    async def wait(self, queued: int, typical: float) -> float:
        """Seconds that a job accepted now waits: what the workers say, and what waits here besides."""
        said = [worker.expected_wait_s or 0 for worker in await self._statuses.get()]
        here = queued * typical / self._concurrency
        return min(said) + here if said else here or UNKNOWN_WAIT

    def poll_after(self, typical: float) -> float:
        """Seconds after which a client that asks for a job's status should ask again; a job takes `typical` seconds."""
        now = time.monotonic()
        self._polls.append(now)
        while now - self._polls[0] > 1:
            self._polls.popleft()
        # At random, so that those who came together do not come together again.
        usual = min(1.0, max(0.25, typical / 4)) if typical else 1.0
        return min(10.0, max(usual, len(self._polls) / POLLS_PER_SECOND)) * random.uniform(1, 1.5)

    async def pool(self) -> dict[str, Any]:
        """The pool for the page: models, shapes with their states, workers with their devices."""
        models, workers = await asyncio.gather(self.models(), self._statuses.get())
        return {
            "models": [str(model["id"]) for model in models],
            "shapes": [self._shape(key, workers) for key in self._keys(workers)],
            "workers": [worker.view for worker in workers],
        }

    def _keys(self, workers: list[_Worker]) -> list[str]:
        if self._menu is not None:
            return [str(key) for key in self._menu.keys]
        return list(dict.fromkeys(key for worker in workers for key in worker.shapes if _KEY.fullmatch(key)))

    def _shape(self, text: str, workers: list[_Worker]) -> dict[str, Any]:
        state = "cold" if workers else "unknown"
        for worker in workers:
            found = [process.state for process in worker.processes if process.shape == text]
            found += ["unavailable"] if text in worker.unavailable else []
            state = max([state, *found], key=lambda s: _ORDER.index(s) if s in _ORDER else 1)
        waiting = sum(worker.waiting_by_shape.get(text, 0) for worker in workers)
        shape: dict[str, Any] = {"key": text, "state": state, "waiting": waiting}
        plain, _, variant = text.partition("+")
        size, _, frames = plain.removesuffix("f").partition("@")
        shape |= {"size": size, "num_frames": int(frames), "model": variant or None}
        if self._menu is not None:
            shape["seconds"] = round((int(frames) - 1) / self._menu.fps, 2)
            shape["image"] = next((o.image for o in self._menu.offers if str(o.key) == text), True)
        return shape
