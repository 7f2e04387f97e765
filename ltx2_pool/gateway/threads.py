"""Calls that block, in threads of their own: one that hangs costs its thread, and neither its caller nor the exit."""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_Call = tuple["concurrent.futures.Future[Any]", Callable[[], Any]]


class Threads:
    """At most so many daemon threads. What hangs is given up at its deadline, and not asked again until it is over."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._hung: Counter[str] = Counter()

    async def run(self, timeout: float, about: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The function's result. Raises what it raises, and TimeoutError; at once while a call about the same hangs."""
        if self._hung[about]:
            raise TimeoutError(f"{about}: an earlier call still hangs")
        future = self.begin(lambda: function(*args, **kwargs))
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            if future.done() and not future.cancelled():  # its own
                raise
            if not future.cancel():  # it runs
                self._hung[about] += 1
                loop = asyncio.get_running_loop()
                future.add_done_callback(lambda _: _told(loop, self._over, about))
            raise TimeoutError(f"{about}: no answer for {timeout:g} s") from None

    def begin(self, function: Callable[[], T]) -> concurrent.futures.Future[T]:
        """Start a call that nobody need wait for."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._calls.put((future, function))
        if len(self._threads) < self._number:
            self._threads.append(threading.Thread(target=self._serve, name="content", daemon=True))
            self._threads[-1].start()
        return future

    def _over(self, about: str) -> None:
        self._hung[about] -= 1
        self._hung += Counter()  # drops what is zero

    def _serve(self) -> None:
        while True:
            future, function = self._calls.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
            del future, function


def _told(loop: asyncio.AbstractEventLoop, function: Callable[[str], None], about: str) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, about)
