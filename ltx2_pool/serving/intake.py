"""A request's pictures: fetched, checked and decoded before the job is admitted, so that a bad one costs nothing."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import AsyncIterator, Sequence

from ltx2_pool.processes.pictures import IN_LINE, PictureReader, PicturesBusy
from ltx2_pool.serving.references import fetch
from ltx2_pool.words.outcomes import NoRoom, QueueFull
from ltx2_pool.words.pictures import Picture, PictureLimits, Size
from ltx2_pool.words.requests import Reference

BUSY_SECONDS = 5.0
"""After how long a client may ask again, when too many pictures wait to be decoded."""


class Intake:
    """Takes pictures in. `reader` decodes them; what they may be is in `limits`."""

    def __init__(self, reader: PictureReader, limits: PictureLimits) -> None:
        self._reader = reader
        self._limits = limits

    @contextlib.asynccontextmanager
    async def taken(
        self, references: Sequence[Reference], sizes: Sequence[Size]
    ) -> AsyncIterator[tuple[tuple[Picture, ...], tuple[int, ...]]]:
        """The pictures, and descriptors of their pixels at those sizes, which are open for as long as this is entered.

        Raises PictureError; QueueFull when too many wait already; NoRoom when this machine has none for it.
        """
        pictures: list[Picture] = []
        held: list[int] = []
        with contextlib.ExitStack() as descriptors:
            for reference in references:
                data = await fetch(reference.text, self._limits)
                try:
                    pixels = await self._reader.read(data, tuple(sizes))
                except PicturesBusy as busy:
                    raise QueueFull("picture_queue_full", IN_LINE, BUSY_SECONDS) from busy
                except OSError as error:
                    raise NoRoom(f"pictures cannot be decoded now: {error}") from error
                descriptors.callback(os.close, pixels)
                digest = hashlib.sha256(data).hexdigest()
                pictures.append(Picture(digest, reference.frame, reference.strength))
                held.append(pixels)
            yield tuple(pictures), tuple(held)

    async def close(self) -> None:
        """End what decodes them."""
        await self._reader.close()
