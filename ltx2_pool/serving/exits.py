"""How a worker's process ends: its exit status, and what ends it when the orderly end hangs."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Awaitable, Callable

import uvloop

logger = logging.getLogger(__name__)

STOPPED = 0
"""Exit status of a worker that was told to stop, and has."""
FAILED = 1
LOST = 3
"""Exit status of a worker that discovery has lost, and that cannot get back: a new process can."""
BROKEN = 4
"""Exit status of a worker in which nothing can be made, whatever is tried."""

ABORT_TIMEOUT = 8.0
"""Seconds from the second signal, or the end of the drain, to the end of the process, whatever hangs."""
WAY_OUT = 15.0
"""Seconds from the end of the serving to the end of the process: threads, directories, the interpreter's own end."""


class LastResort:
    """Ends the process when the orderly end hangs: its children go with it, by the guard."""

    def __init__(self, leave: Callable[[int], None] = os._exit) -> None:
        self._leave = leave
        self._timer: threading.Timer | None = None

    def arm(self, seconds: float, status: int) -> None:
        """Replaces what was armed before."""
        self.disarm()
        self._timer = threading.Timer(seconds, self._fire, (seconds, status))
        self._timer.daemon = True
        try:
            self._timer.start()
        except RuntimeError as error:  # no more threads: whoever waits for the end has to kill
            logger.error("nothing limits the end of this process: %s", error)

    def disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fire(self, seconds: float, status: int) -> None:
        what = "still not ended after another %.0f s: leaving without an orderly end"
        with contextlib.suppress(RuntimeError):  # a log that nobody reads may block, and must not keep us
            saying = threading.Thread(target=logger.critical, args=(what, seconds), daemon=True)
            saying.start()
            saying.join(1.0)
        self._leave(status or FAILED)


def run(main: Callable[[LastResort], Awaitable[int]]) -> int:
    """Run `main` on uvloop; returns its exit status, which the caller has to exit with soon: the last resort waits.

    To close a loop takes a descriptor, and a worker may end because there are none: its status is the same then.
    """
    last_resort = LastResort()
    status: int | None = None

    async def body() -> None:
        nonlocal status
        try:
            status = await main(last_resort)
        finally:
            last_resort.arm(WAY_OUT, FAILED if status is None else status)

    try:
        uvloop.run(body())
    except BaseException as error:
        if status is None or not isinstance(error, OSError | RuntimeError):
            last_resort.disarm()  # the loop is closed, and the caller ends with the error
            raise
        logger.error("the event loop could not be closed: %s", error)
    assert status is not None
    return status
