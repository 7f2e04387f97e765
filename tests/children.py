"""What tests of real children share: gates that they wait at, what they may leave open, and patience with them."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ltx2_pool.model import confine

DEADLINE = 90.0
CONFINED = [sys.executable, "-m", "ltx2_pool.tools.imaginary", "--confined"]
"""An imaginary child that is confined as a real one is."""
needs_landlock = pytest.mark.skipif(
    confine._call(confine._CREATE_RULESET, None, ctypes.c_size_t(0), confine._CREATE_RULESET_VERSION)
    < confine._REFER_SINCE,
    reason="this kernel has no Landlock, or an old one",
)


async def until(condition: Callable[[], object], seconds: float = DEADLINE) -> None:
    """Wait for something that only looking tells."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - any condition, of any object
            await asyncio.sleep(0.005)


class Gate:
    """A FIFO that a child waits at until the test opens it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)

    async def wait_for_child(self) -> int:
        """Returns the writing end once a child waits at the gate."""
        async with asyncio.timeout(DEADLINE):
            while True:
                with contextlib.suppress(OSError):  # ENXIO: nobody reads yet
                    return os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
                await asyncio.sleep(0.005)

    async def open(self) -> None:
        os.close(await self.wait_for_child())


def open_files() -> dict[str, str]:
    """What this process has open, by descriptor."""
    files = {}
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the directory's own
            files[fd.name] = str(fd.readlink())
    return files
