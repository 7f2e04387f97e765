"""The videos, in any store that fsspec knows: written whole, read in pieces, removed with all that was made of them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import fsspec

from ltx2_pool.gateway.threads import Threads

P = ParamSpec("P")
T = TypeVar("T")

PIECE = 256 * 1024
"""Bytes that are read at a time."""
READ_TIMEOUT = 15.0
WRITE_TIMEOUT = 120.0
REMOVE_TIMEOUT = 30.0
"""Seconds that the store has for one step."""
THREADS = 32


@dataclass(frozen=True)
class Stored:
    path: str
    """In this store."""
    size: int
    etag: str
    """SHA-256, in hex."""


class Content:
    """Files below one directory of a store: ``<job>/<name>``.

    Raises OSError, of which TimeoutError is one, and what else a store's client throws.
    """

    def __init__(self, url: str) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(url)
        self._local = "file" in self._fs.protocol
        self._threads = Threads(THREADS)

    async def run(self, timeout: float, path: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call what uses a file in a thread. While a job's files hang, only that job's callers are told so."""
        return await self._threads.run(timeout, path.partition("/")[0], function, *args, **kwargs)

    async def write(self, path: str, data: bytes) -> Stored:
        """A file, which is there as a whole or not at all."""
        return await self.run(WRITE_TIMEOUT, path, self._write, path, data)

    def _write(self, path: str, data: bytes) -> Stored:
        full = self._full(path)
        self._fs.makedirs(full.rpartition("/")[0], exist_ok=True)
        if self._local:
            _write_file(Path(full), data)
        else:  # one put, which a store shows when it is done
            self._fs.pipe_file(full, data)
        return Stored(path, len(data), hashlib.sha256(data).hexdigest())

    async def read(self, path: str, start: int, stop: int) -> AsyncIterator[bytes]:
        """Open a file; then its bytes from `start` to before `stop`, in pieces."""
        file = await self.run(READ_TIMEOUT, path, self.open, path, start)
        return self._pieces(path, file, stop - start)

    async def _pieces(self, path: str, file: Any, left: int) -> AsyncIterator[bytes]:
        try:
            while left:
                piece = await self.run(READ_TIMEOUT, path, file.read, min(PIECE, left))
                if not piece:
                    raise OSError("the file is shorter than it was")
                left -= len(piece)
                yield piece
        finally:
            self._threads.begin(file.close)

    def open(self, path: str, start: int = 0) -> Any:
        """A file to read in a thread."""
        # Store clients read ahead by megabytes, which is memory for each client; a local file needs none.
        options = {} if self._local else {"block_size": 4 * PIECE}
        file = self._fs.open(self._full(path), "rb", **options)
        file.seek(start)
        return file

    def check(self) -> None:
        """Raise OSError when nothing can be written there."""
        directory = f"check-{uuid.uuid4().hex}"
        self._write(f"{directory}/file", b"")
        self._remove(directory)

    async def size(self, path: str) -> int | None:
        """Bytes; None when there is no such file."""
        try:
            return int(await self.run(READ_TIMEOUT, path, self._fs.size, self._full(path)))
        except FileNotFoundError:
            return None

    async def remove(self, path: str) -> None:
        """A file, or all files of a job; nothing when there is none."""
        await self.run(REMOVE_TIMEOUT, path, self._remove, path)

    async def remove_others(self, path: str) -> None:
        """Videos beside this one, and what was to become one."""
        await self.run(REMOVE_TIMEOUT, path, self._remove_others, path)

    def _remove_others(self, path: str) -> None:
        directory, _, own = path.rpartition("/")
        for found in self._fs.ls(self._full(directory), detail=False):
            name = str(found).rpartition("/")[2]
            if name != own and ".mp4" in name:
                self._remove(f"{directory}/{name}")

    def _remove(self, path: str) -> None:
        try:
            self._fs.rm(self._full(path), recursive=True)
        except FileNotFoundError:
            return

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}"


def _write_file(path: Path, data: bytes) -> None:
    """On the disk, its name too, before anybody is told of it."""
    being_written = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        with being_written.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        being_written.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            being_written.unlink()
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
