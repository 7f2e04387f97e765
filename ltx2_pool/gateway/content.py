"""The videos, in any store that fsspec knows: written whole, read in pieces, removed with all that was made of them."""

from __future__ import annotations

import asyncio
import hashlib
import os
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import fsspec

PIECE = 256 * 1024
"""Bytes that are read at a time."""


@dataclass(frozen=True)
class Stored:
    path: str
    """In this store."""
    size: int
    etag: str
    """SHA-256, in hex."""


class Content:
    """Files below one directory of a store: ``<job>/<name>``. Raises OSError, and what else a store's client throws."""

    def __init__(self, url: str) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(url)

    async def write(self, path: str, data: bytes) -> Stored:
        """A new file. Until this returns nobody knows its name, so half a file is never read."""
        return await asyncio.to_thread(self._write, path, data)

    def _write(self, path: str, data: bytes) -> Stored:
        self._fs.makedirs(self._full(path).rpartition("/")[0], exist_ok=True)
        with self._fs.open(self._full(path), "wb") as file:
            file.write(data)
            file.flush()
            if "file" in self._fs.protocol:  # on the disk before the job is called completed
                os.fsync(file.fileno())
        return Stored(path, len(data), hashlib.sha256(data).hexdigest())

    async def read(self, path: str, start: int, stop: int) -> AsyncIterator[bytes]:
        """Open a file; then its bytes from `start` to before `stop`, in pieces."""
        file = await asyncio.to_thread(self.open, path, start)
        return _pieces(file, stop - start)

    def open(self, path: str, start: int = 0) -> Any:
        """A file to read in a thread."""
        # Store clients read ahead by megabytes, which is memory for each client; a local file needs none.
        options = {} if "file" in self._fs.protocol else {"block_size": 4 * PIECE}
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
            return int(await asyncio.to_thread(self._fs.size, self._full(path)))
        except FileNotFoundError:
            return None

    async def remove(self, path: str) -> None:
        """A file, or all files of a job; nothing when there is none."""
        await asyncio.to_thread(self._remove, path)

    def _remove(self, path: str) -> None:
        try:
            self._fs.rm(self._full(path), recursive=True)
        except FileNotFoundError:
            return

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}"


async def _pieces(file: Any, left: int) -> AsyncIterator[bytes]:
    try:
        while left:
            piece = await asyncio.to_thread(file.read, min(PIECE, left))
            if not piece:
                raise OSError("the file is shorter than it was")
            left -= len(piece)
            yield piece
    finally:
        await asyncio.to_thread(file.close)
