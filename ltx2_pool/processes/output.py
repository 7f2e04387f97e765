"""What a child prints: its last lines are kept, all of them are logged, and nothing in them is ever interpreted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import deque

output_logger = logging.getLogger("ltx2_pool.model.child")

TAIL_LINES = 50
_MAX_LINE = 2000
"""Characters of one line of output that are kept."""
_CHUNK = 1 << 16
_CLOSE_TIMEOUT = 1.0


class OutputTail:
    """Drains a pipe that holds a process's stdout and stderr. It owns the pipe's read end `fd`."""

    def __init__(self, name: str, fd: int) -> None:
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.name = name
        """As which its lines are logged."""
        self._pipe = os.fdopen(fd, "rb", buffering=0)
        self._task = asyncio.create_task(self._drain())

    async def close(self) -> None:
        """Take in what is left in the pipe of a process that has ended, and release it."""
        # Only a grandchild in a group of its own could still hold it open.
        await asyncio.wait([self._task], timeout=_CLOSE_TIMEOUT)
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await self._task
        self._pipe.close()  # a task that was cancelled before it began has closed nothing

    async def _drain(self) -> None:
        reader = asyncio.StreamReader(limit=_CHUNK)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self._pipe
        )
        rest = b""
        try:
            while chunk := await reader.read(_CHUNK):
                *lines, rest = (rest + chunk).replace(b"\r", b"\n").split(b"\n")
                rest = rest[-_CHUNK:]
                for line in lines:
                    self._keep(line)
            self._keep(rest)
        finally:
            transport.close()

    def _keep(self, raw: bytes) -> None:
        line = raw[:_MAX_LINE].decode(errors="replace").rstrip()
        if line:
            self.tail.append(line)
            output_logger.info("[%s] %s", self.name, line)
