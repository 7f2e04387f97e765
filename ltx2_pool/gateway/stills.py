"""Stills of a video: a thumbnail and a spritesheet, made when they are asked for the first time."""

from __future__ import annotations

import asyncio
import io
import math
from typing import Any, Literal

from ltx2_pool.gateway.content import Content

Variant = Literal["thumbnail", "spritesheet"]
NAMES: dict[Variant, str] = {"thumbnail": "thumbnail.webp", "spritesheet": "spritesheet.jpg"}
TYPES: dict[Variant, str] = {"thumbnail": "image/webp", "spritesheet": "image/jpeg"}
COLUMNS, ROWS = 4, 4
TILE = 320
"""Pixels of a tile's longer side, and twice that of the thumbnail's, at most."""


class Unreadable(ValueError):
    """The file is no video."""


MAKE_TIMEOUT = 60.0


class Stills:
    """Makes stills, two at a time and each once, and keeps them beside the video."""

    def __init__(self, content: Content) -> None:
        self._content = content
        self._turn = asyncio.Semaphore(2)
        self._making: dict[str, asyncio.Task[int]] = {}

    async def of(self, path: str, variant: Variant) -> tuple[str, int]:
        """Path and size in bytes of a still of the video at `path`."""
        still = f"{path.rpartition('/')[0]}/{NAMES[variant]}"
        if size := await self._content.size(still):
            return still, size
        if still not in self._making:
            self._making[still] = asyncio.create_task(self._made(path, still, variant))
            self._making[still].add_done_callback(lambda _: self._making.pop(still))
        return still, await asyncio.shield(self._making[still])

    async def _made(self, path: str, still: str, variant: Variant) -> int:
        async with self._turn:
            data = await self._content.run(MAKE_TIMEOUT, path, self._make, path, variant)
            size = (await self._content.write(still, data)).size
        if await self._content.size(path) is None:  # removed meanwhile, before the still was there
            await self._content.remove(path.rpartition("/")[0])
            raise FileNotFoundError(path)
        return size

    def _make(self, path: str, variant: Variant) -> bytes:
        with self._content.open(path) as file:
            return thumbnail(file) if variant == "thumbnail" else spritesheet(file)


def thumbnail(file: Any) -> bytes:
    """A WebP of the first frame."""
    image = _frames(file, 1)[0]
    image.thumbnail((2 * TILE, 2 * TILE))
    out = io.BytesIO()
    image.save(out, "WEBP", quality=80)
    return out.getvalue()


def spritesheet(file: Any) -> bytes:
    """A JPEG of up to 16 frames, spread evenly over the video, row by row."""
    from PIL import Image

    frames = _frames(file, COLUMNS * ROWS)
    for frame in frames:
        frame.thumbnail((TILE, TILE))
    width, height = frames[0].size
    columns = min(COLUMNS, len(frames))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(frames) / columns) * height))
    for number, frame in enumerate(frames):
        sheet.paste(frame, (number % columns * width, number // columns * height))
    out = io.BytesIO()
    sheet.save(out, "JPEG", quality=85)
    return out.getvalue()


def _frames(file: Any, number: int) -> list[Any]:
    """Up to that many frames as pictures, evenly spread. Raises Unreadable."""
    import av

    try:
        return _decoded(file, number)
    except (av.FFmpegError, IndexError) as error:
        raise Unreadable(str(error)) from error


def _decoded(file: Any, number: int) -> list[Any]:
    import av

    with av.open(file) as container:
        stream = container.streams.video[0]
        total = max(1, stream.frames)
        wanted = {total * place // min(number, total) for place in range(min(number, total))}
        found = []
        for place, frame in enumerate(container.decode(stream)):
            if place in wanted:
                found.append(frame.to_image())
            if len(found) == len(wanted):
                break
    if not found:
        raise Unreadable("the video has no frames")
    return found
