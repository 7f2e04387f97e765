"""What to do when descriptors run out.

Dynamo 1.6 needs one for each request, to connect back to the frontend; where there is none, the frontend is not told,
and the request hangs until this worker is out of discovery. So a worker that is short of them leaves, which answers
those that hang, and comes back when there are enough.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

FEW = 4
"""Fewer are a shortage."""
RESERVE = 6
"""Held where there are enough, and given back in a shortage: to leave discovery takes some, too."""
ENOUGH = 24
"""As many end a shortage: the reserve, and what a dozen requests take."""
PATIENCE = 60.0
"""Seconds in a shortage, with no calm of as many looks between, after which another process may do better."""
CALM = 60
"""Looks without a shortage after which the last one is forgotten."""
INTERVAL = 0.5
"""Seconds between two looks. Looks are counted, and not seconds: a process that was stopped has not looked."""


def spare(most: int) -> int:
    """How many more descriptors this process may open now; takes `most` at most, for a moment, to see."""
    taken = _take(most)
    for descriptor in taken:
        os.close(descriptor)
    return len(taken)


def _take(most: int) -> list[int]:
    taken: list[int] = []
    with contextlib.suppress(OSError):
        taken.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        while len(taken) < most:
            taken.append(os.dup(taken[0]))
    return taken


class Exhausted(Exception):
    """There have been too few for too long."""


class Descriptors:
    """Looks at intervals, and whenever a request has come; says when a shortage begins and when it has ended."""

    def __init__(self) -> None:
        self.short = False
        self._reserve: list[int] = []
        self._seen = asyncio.Event()
        self._short_looks = 0
        self._calm_looks = 0

    def look(self) -> None:
        """A request has come, and may have taken the last one."""
        if not self.short and spare(FEW) < FEW:
            self._seen.set()

    async def watch(self, tell: Callable[[], Awaitable[None]], interval: float = INTERVAL) -> None:
        """Call `tell` whenever `short` has changed. Raises Exhausted after `PATIENCE`; never returns.

        When `tell` has failed it may be called again: what it is to tell is kept.
        """
        try:
            if self.short:
                await tell()
            while True:
                seen = self._seen.is_set()
                self._seen.clear()
                if self.short:
                    await self._in_a_shortage(tell, interval)
                elif seen or spare(FEW) < FEW:
                    self.short, self._calm_looks = True, 0
                    self._give_back()
                    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
                    logger.error(
                        "descriptors are short, of %d: no requests until there are more; raise ulimit -n", limit
                    )
                    await tell()
                else:
                    self._in_calm()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._seen.wait(), interval)
        finally:
            self._give_back()

    async def _in_a_shortage(self, tell: Callable[[], Awaitable[None]], interval: float) -> None:
        self._short_looks += 1
        if self._short_looks * interval > PATIENCE:  # also when they are enough whenever nobody is served
            raise Exhausted(f"fewer than {ENOUGH} descriptors have been left for {PATIENCE:.0f} s in all")
        if spare(ENOUGH) >= ENOUGH:
            self.short = False
            logger.warning("there are descriptors again: back into discovery")
            await tell()

    def _in_calm(self) -> None:
        self._calm_looks += 1
        if self._calm_looks >= CALM:
            self._short_looks = 0
        if not self._reserve and self._calm_looks % CALM == 1 and spare(ENOUGH) >= ENOUGH:
            self._reserve = _take(RESERVE)

    def _give_back(self) -> None:
        for descriptor in self._reserve:
            os.close(descriptor)
        self._reserve = []
