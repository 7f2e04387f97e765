"""What can be said of the pool behind the frontend: its models, shapes and queue, and how long a client should wait."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Generic, TypeVar

from ltx2_pool.gateway.upstream import Busy, Upstream
from ltx2_pool.words.menu import Menu

T = TypeVar("T")

FRESH = 1.0
"""Seconds for which an answer of the frontend or of the workers is good."""
UNKNOWN_WAIT = 5.0
"""Seconds to tell a client when nobody knows better."""
POLLS_PER_SECOND = 100
"""Above so many status calls a second, clients that listen are told to ask less often than once a second."""
_ORDER = ("unavailable", "cold", "draining", "loading", "spawning", "encoding", "generating", "ready")
"""States of a shape's process, the best last: what is shown of several workers."""


class _Cached(Generic[T]):
    """An answer that is asked for at most once at a time, and again when it is old."""

    def __init__(self, ask: Callable[[], Awaitable[T]], nothing: T) -> None:
        self._ask, self._last, self._until = ask, nothing, 0.0
        self._turn = asyncio.Lock()

    async def get(self) -> T:
        if time.monotonic() >= self._until:
            async with self._turn:
                if time.monotonic() >= self._until:
                    self._last = await self._ask()
                    self._until = time.monotonic() + FRESH
        return self._last


class Outlook:
    """Asks the frontend and the workers, not more often than every second, whoever asks here."""

    def __init__(self, upstream: Upstream, menu: Menu | None, concurrency: int) -> None:
        self._upstream, self._menu, self._concurrency = upstream, menu, concurrency
        self._models = _Cached[list[dict[str, Any]]](self._ask_models, [])
        self._statuses = _Cached[list[dict[str, Any]]](upstream.statuses, [])
        self._polls: deque[float] = deque(maxlen=10 * POLLS_PER_SECOND)
        self._default = menu.model if menu is not None else ""

    async def models(self) -> list[dict[str, Any]]:
        """Those that are served now; none while the frontend does not answer."""
        return await self._models.get()

    async def _ask_models(self) -> list[dict[str, Any]]:
        try:
            return await self._upstream.models()
        except Busy:
            return []

    async def model(self, asked: str | None) -> str | None:
        """The model that a request is for: the one asked for, or the first; None when it is none of ours, "" when
        nobody can tell."""
        served = [str(model.get("id")) for model in await self.models()]
        if served and not self._default:
            self._default = served[0]
        if asked is None:
            return self._default
        ours = self._menu.models if self._menu is not None else ()
        return None if served and asked not in (*served, *ours) else asked

    async def wait(self, queued: int, typical: float) -> float:
        """Seconds that a job accepted now waits: what the workers say, and what waits here besides."""
        said = [float(status.get("expected_wait_s") or 0) for status in await self._statuses.get()]
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
        models, statuses = await asyncio.gather(self.models(), self._statuses.get())
        return {
            "models": [str(model.get("id")) for model in models],
            "shapes": [self._shape(key, statuses) for key in self._keys(statuses)],
            "workers": [_worker(status) for status in statuses],
        }

    def _keys(self, statuses: list[dict[str, Any]]) -> list[str]:
        if self._menu is not None:
            return [str(key) for key in self._menu.keys]
        return list(dict.fromkeys(str(key) for status in statuses for key in status.get("shapes", ())))

    def _shape(self, text: str, statuses: list[dict[str, Any]]) -> dict[str, Any]:
        state = "cold" if statuses else "unknown"
        for status in statuses:
            found = [p["state"] for p in status.get("processes", ()) if p.get("shape") == text]
            found += ["unavailable"] if text in status.get("unavailable", {}) else []
            state = max([state, *found], key=lambda s: _ORDER.index(s) if s in _ORDER else 1)
        waiting = sum(int(status.get("waiting_by_shape", {}).get(text, 0)) for status in statuses)
        shape: dict[str, Any] = {"key": text, "state": state, "waiting": waiting}
        plain, _, variant = text.partition("+")
        size, _, frames = plain.removesuffix("f").partition("@")
        shape |= {"size": size, "num_frames": int(frames), "model": variant or None}
        if self._menu is not None:
            shape["seconds"] = round((int(frames) - 1) / self._menu.fps, 2)
            shape["image"] = next((o.image for o in self._menu.offers if str(o.key) == text), True)
        return shape


def _worker(status: Mapping[str, Any]) -> dict[str, Any]:
    known = ("model", "health", "running", "waiting", "expected_wait_s", "max_size", "version")
    devices = {
        name: {k: device.get(k) for k in ("budget", "held", "leases", "processes")}
        for name, device in status.get("devices", {}).items()
    }
    return {**{name: status.get(name) for name in known}, "devices": devices}
