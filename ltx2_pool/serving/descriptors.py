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
import time
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

FEW = 4
"""Fewer are a shortage."""
ENOUGH = 12
"""As many end it."""
RESERVE = 6
"""Held, and given back in a shortage: to leave discovery takes some, too."""
PATIENCE = 60.0
"""Seconds of a shortage after which another process may do better than this one."""
INTERVAL = 0.5
"""Seconds between two looks."""


def spare(most: int = ENOUGH) -> int:
    """How many more descriptors this process may open now; looks for `most` at most."""
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

    def look(self) -> None:
        """A request has come, and may have taken the last one."""
        if not self.short and spare(FEW) < FEW:
            self._seen.set()

    async def watch(self, tell: Callable[[], Awaitable[None]], interval: float = INTERVAL) -> None:
        """Call `tell` whenever `short` has changed. Raises Exhausted after `PATIENCE`; never returns."""
        since = 0.0
        try:
            while True:
                if not self._reserve and not self.short:
                    self._reserve = _take(RESERVE)
                left = spare()
                if not self.short and (left < FEW or self._seen.is_set()):
                    self.short, since = True, time.monotonic()
                    self._give_back()
                    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
                    logger.error(
                        "%d of %d descriptors are left: no requests until there are more; raise ulimit -n", left, limit
                    )
                    await tell()
                elif self.short and left >= ENOUGH:
                    self.short = False
                    logger.warning("there are descriptors again: back into discovery")
                    await tell()
                elif self.short and time.monotonic() - since > PATIENCE:
                    raise Exhausted(f"fewer than {ENOUGH} descriptors have been left for {PATIENCE:.0f} s")
                self._seen.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._seen.wait(), interval)
        finally:
            self._give_back()

    def _give_back(self) -> None:
        for descriptor in self._reserve:
            os.close(descriptor)
        self._reserve = []
