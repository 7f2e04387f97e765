"""A request's pictures: fetched, checked and decoded before the job is admitted, so that a bad one costs nothing."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator, Sequence

from ltx2_pool.processes.pictures import PictureReader, PicturesBusy
from ltx2_pool.serving.references import fetch
from ltx2_pool.words.outcomes import NoRoom, QueueFull
from ltx2_pool.words.pictures import Picture, PictureLimits, Size
from ltx2_pool.words.requests import Reference

AT_ONCE = 32
"""Requests whose pictures are under way: each holds as many bytes as a picture may have, or two."""
PER_USER = AT_ONCE * 3 // 4
"""Of one user, so that nobody keeps all others out; the same share as of the pool's queue."""
BUSY_SECONDS = 5.0
"""After how long a client may ask again, when too many pictures wait to be decoded."""


class Intake:
    """Takes pictures in. `reader` decodes them; what they may be is in `limits`."""

    def __init__(self, reader: PictureReader, limits: PictureLimits) -> None:
        self._reader = reader
        self._limits = limits
        self._under_way: collections.Counter[str] = collections.Counter()
        """By user."""

    @property
    def pid(self) -> int | None:
        """Of the process that decodes; None without one."""
        return self._reader.pid

    async def start(self) -> None:
        """Have what decodes ready before the first picture comes. Raises OSError."""
        await self._reader.start()

    @contextlib.asynccontextmanager
    async def taken(
        self, references: Sequence[Reference], sizes: Sequence[Size], user: str
    ) -> AsyncIterator[tuple[tuple[Picture, ...], tuple[int, ...]]]:
        """The pictures, and descriptors of their pixels at those sizes, which are open for as long as this is entered.

        Raises PictureError; QueueFull when too many wait already; NoRoom when this machine has none for it.
        """
        if (waiting := self._under_way.total()) >= AT_ONCE:
            raise QueueFull("picture_queue_full", waiting, BUSY_SECONDS)
        if (of_user := self._under_way[user]) >= PER_USER:
            raise QueueFull("user_queue_full", of_user, BUSY_SECONDS)
        with contextlib.ExitStack() as descriptors:
            self._under_way[user] += 1
            try:
                taken = [await self._take(reference, sizes, descriptors) for reference in references]
            finally:
                self._under_way -= collections.Counter((user,))  # and forget whom nothing is left of
            yield tuple(picture for picture, _ in taken), tuple(pixels for _, pixels in taken)

    async def _take(
        self, reference: Reference, sizes: Sequence[Size], descriptors: contextlib.ExitStack
    ) -> tuple[Picture, int]:
        data = await fetch(reference.text, self._limits)
        try:
            pixels = await self._reader.read(data, tuple(sizes))
        except PicturesBusy as busy:
            raise QueueFull("picture_queue_full", self._under_way.total(), BUSY_SECONDS) from busy
        except OSError as error:
            raise NoRoom(f"pictures cannot be decoded now: {error}") from error
        descriptors.callback(os.close, pixels)
        return Picture(hashlib.sha256(data).hexdigest(), reference.frame, reference.strength), pixels

    async def close(self) -> None:
        """End what decodes them."""
        await self._reader.close()
