"""Is this worker in discovery, as it should be? It falls out when its lease lapses, and nobody puts it back.

A lease lapses when it is not renewed for 10 s: the process was stopped, descriptors ran out (with the file backend a
renewal opens a file), the store was away. Measured on ai-dynamo 1.6.0: the worker then runs on, healthy by its own
account, and the frontend answers 404 for it until somebody restarts it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

logger = logging.getLogger(__name__)

INTERVAL = 2.5
"""Seconds between two looks."""
MISSES = 3
"""Looks in a row that must miss the worker before it counts as absent."""
GIVE_UP = 60.0
"""Seconds of registering again in vain after which a new process is the better try."""
CLUSTER_INTERVAL = 30.0
"""Seconds between two looks where a cluster decides: its readiness probes may take a while, and no lease can lapse."""
_LOOK = 0.5
"""Seconds that one look waits for the worker to appear: a watch that has just begun knows of nobody yet."""


class Directory(Protocol):
    """Discovery, as one worker sees it."""

    async def listed(self) -> bool:
        """Whether other processes would find this worker."""

    async def enter(self) -> None:
        """Make it found. May be called when it is."""

    async def leave(self) -> None:
        """Make it not found. May raise when it is not."""


class Absent(Exception):
    """The worker is not in discovery, and registering again does not help."""


ANSWER_TIMEOUT = 10.0
"""Seconds for discovery to answer."""


class Presence:
    """Keeps a worker in discovery while it should be there, and out of it while not."""

    def __init__(
        self, directory: Directory, *, interval: float = INTERVAL, misses: int = MISSES, give_up: float = GIVE_UP
    ) -> None:
        self._directory = directory
        self._interval = interval
        self._misses = misses
        self._tries = max(1.0, give_up / interval)
        self._wanted = True
        self._turn = asyncio.Lock()

    async def want(self, wanted: bool) -> None:
        """Enter or leave discovery; what fails is tried again by :meth:`keep`. Never raises but when cancelled."""
        self._wanted = wanted
        await self._carry_out()

    async def keep(self) -> None:
        """Look at regular intervals, and put right what is not as it should be. Raises Absent when that is in vain.

        Tries are counted and not seconds: a process that was stopped in between has not tried.
        """
        missed = tried = 0
        with contextlib.suppress(Exception):
            async with asyncio.timeout(ANSWER_TIMEOUT):
                await self._directory.listed()  # begins to watch while there are descriptors for it
        while True:
            await asyncio.sleep(self._interval)
            wanted = self._wanted
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT):
                    listed = await self._directory.listed()
            except Exception as error:
                # No descriptor, no store: nothing is known, and that is not an absence.
                logger.warning("discovery cannot be looked at: %s", error)
                continue
            if listed == wanted or wanted != self._wanted:
                if tried:
                    logger.warning("%s discovery again, as it should be", "in" if listed else "out of")
                missed = tried = 0
                continue
            missed += 1
            if missed < self._misses:
                continue
            if wanted and tried >= self._tries:
                raise Absent(
                    f"not in discovery, and registering again did not help {tried} times in some "
                    f"{tried * self._interval:.0f} s"
                )
            tried += 1
            if tried == 1:
                logger.error("this worker is %s discovery: trying again to %s", *_words(wanted))
            await self._carry_out()

    async def _carry_out(self) -> None:
        async with self._turn:
            wanted = self._wanted
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT):
                    await (self._directory.enter() if wanted else self._directory.leave())
            except Exception as error:
                logger.warning("could not %s discovery now: %s", _words(wanted)[1], error)


async def want_all(presences: Iterable[Presence], wanted: bool) -> None:
    """As :meth:`Presence.want`, of all."""
    await asyncio.gather(*(one.want(wanted) for one in presences))


async def keep_all(presences: Iterable[Presence]) -> None:
    """As :meth:`Presence.keep`, of all, until one is given up."""
    keeping = [asyncio.ensure_future(one.keep()) for one in presences]
    try:
        await asyncio.gather(*keeping)
    finally:
        for one in keeping:
            one.cancel()


def presence(directory: Directory, discovery: str) -> Presence:
    """For a discovery backend, by its name.

    In a Kubernetes cluster a worker is also absent while its pod is not ready, whatever it does itself: that is no
    reason to end it.
    """
    if discovery == "kubernetes":
        return Presence(directory, interval=CLUSTER_INTERVAL, give_up=math.inf)
    return Presence(directory)


def _words(wanted: bool) -> tuple[str, str]:
    return ("not in", "enter") if wanted else ("still in", "leave")


class DynamoDirectory:
    """Dynamo's discovery, whichever backend: looks through a client of our own endpoint, as the frontend does."""

    def __init__(self, endpoint: Any, register_model: Callable[[], Awaitable[None]]) -> None:
        self._endpoint = endpoint
        self._register_model = register_model
        self._client: Any = None
        self._doubtful = True

    async def listed(self) -> bool:
        """Raises whatever Dynamo does when it cannot begin to watch at all."""
        if self._doubtful:
            try:
                self._client = await self._endpoint.client()
                self._doubtful = False
            except Exception:  # descriptors have run out: the old watch needs no new one
                if self._client is None:
                    raise
        mine = self._endpoint.connection_id()
        try:
            async with asyncio.timeout(_LOOK):
                while mine not in self._client.instance_ids():  # noqa: ASYNC110 - Dynamo offers no event for one instance
                    await asyncio.sleep(0.1)
        except TimeoutError:
            self._doubtful = True  # perhaps it is the watch that has died: the next look uses another
            return False
        return True

    async def enter(self) -> None:
        # A lapsed lease takes the model's card away too, and only both together make the model served.
        await self._endpoint.register_endpoint_instance()
        await self._register_model()

    async def leave(self) -> None:
        """Only the instance. The model's card stays, so that clients whom nobody else serves get 503 instead of 404.

        Measured on ai-dynamo 1.6.0; such a model is not in ``/v1/models`` either.
        """
        await self._endpoint.unregister_endpoint_instance()
