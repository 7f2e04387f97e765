"""Reading jobs for many clients at once, and waking those who wait for a change."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict

from ltx2_pool.gateway.jobs import Job
from ltx2_pool.gateway.store import Store, StoreError

READ_TIMEOUT = 5.0
"""Seconds after which a read is given up, for everybody who waits behind it."""


class Reader:
    """One query at a time for all who ask meanwhile: two thousand clients that poll cost as many queries as one."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._asked: dict[str, asyncio.Future[Job | None]] = {}
        self._reading: asyncio.Task[None] | None = None

    async def get(self, id: str) -> Job | None:
        """A job as it is now; None when there is none. Raises StoreError."""
        if id not in self._asked:
            self._asked[id] = asyncio.get_running_loop().create_future()
        answer = self._asked[id]
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
        return await asyncio.shield(answer)

    async def _read(self) -> None:
        while self._asked:
            asked, self._asked = self._asked, {}
            try:
                async with asyncio.timeout(READ_TIMEOUT):
                    found = await self._store.get_many(list(asked))
            except Exception as error:
                if isinstance(error, TimeoutError):
                    error = StoreError(f"no answer for {READ_TIMEOUT:g} s")
                for future in asked.values():
                    future.set_exception(error)
                    future.exception()  # whoever asked may be gone
            else:
                for id, future in asked.items():
                    future.set_result(found.get(id))


class News:
    """Tells who waits for a job that it has changed, in this process. Others' changes are found by looking."""

    def __init__(self) -> None:
        self._waiting: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    def tell(self, id: str) -> None:
        for event in self._waiting.get(id, ()):
            event.set()

    async def wait(self, id: str, timeout: float) -> None:
        """Return at the job's next change, or after the timeout."""
        event = asyncio.Event()
        self._waiting[id].add(event)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await event.wait()
        finally:
            self._waiting[id].discard(event)
            if not self._waiting[id]:
                del self._waiting[id]
