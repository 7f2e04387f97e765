"""Blocking calls in daemon threads of their own: one that hangs delays neither other work nor the end of the process.

asyncio's default executor does both: its few threads are shared by everybody, and the interpreter waits for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Lane:
    """At most `width` calls at a time, each in a thread of its own. A call that hangs keeps its place."""

    def __init__(self, name: str, width: int) -> None:
        self._name = name
        self._places = asyncio.Semaphore(width)

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """What `function` returns or raises. Cancelling the wait does not stop the thread: nothing could."""
        await self._places.acquire()
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()

        def settle(value: T | None, error: BaseException | None) -> None:
            self._places.release()
            if result.done():
                return
            if error is not None:
                result.set_exception(error)
            else:
                result.set_result(value)  # type: ignore[arg-type]

        def call() -> None:
            value: T | None = None
            failure: BaseException | None = None
            try:
                value = function(*arguments)
            except BaseException as error:
                failure = error
            with contextlib.suppress(RuntimeError):  # the loop has been closed, and nobody waits any more
                loop.call_soon_threadsafe(settle, value, failure)

        try:
            threading.Thread(target=call, name=self._name, daemon=True).start()
        except RuntimeError as error:  # no more threads on this machine, or the interpreter is on its way out
            self._places.release()
            raise OSError(f"no thread could be started: {error}") from error
        return await result
