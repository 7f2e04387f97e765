"""Pictures that a video starts from or ends with: what a job says of them, and what the operator allows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Frame = Literal["first", "last"]
Size = tuple[int, int]
"""Width and height in pixels."""

MAX_PICTURES = 2
"""Of one job: one for its first frame, one for its last."""
H264_QUALITY = 33
"""Constant rate factor that a picture is compressed with before the model sees it, as its training frames were
(FastVideo pipelines/basic/ltx2/stages/ltx2_image_conditioning.py: DEFAULT_LTX2_IMAGE_CRF)."""


class PictureError(ValueError):
    """A picture that cannot be used, or not be had. The text is for the client: HTTP 400."""


@dataclass(frozen=True)
class Picture:
    """One picture of a job. Its pixels travel apart from it, in shared memory."""

    digest: str
    """SHA-256 of the file as the client gave it."""
    frame: Frame = "first"
    """Which frame of the video it is to be."""
    strength: float = 1.0
    """From 0, which is without effect, to 1: that frame is the picture."""

    def __str__(self) -> str:
        return f"{self.frame}:sha256:{self.digest}:{exactly(self.strength)}"


@dataclass(frozen=True)
class PictureLimits:
    """What is accepted of a client."""

    max_bytes: int = 20 << 20
    """Of the file, as it is sent or fetched."""
    max_pixels: int = 25_000_000
    """Of the picture in it, before it is resized."""
    timeout: float = 10.0
    """Seconds for fetching it, and again for decoding it."""
    hosts: tuple[str, ...] = ()
    """From where ``https:`` references are fetched: ``cdn.example.com``, or ``*.example.com`` for all below it.
    Empty: from nowhere."""


def pixel_bytes(sizes: Iterable[Size]) -> int:
    """Bytes of one picture in RGB, once at each size (width, height)."""
    return sum(3 * width * height for width, height in sizes)


def exactly(number: float) -> str:
    """The shortest text that reads back as this number, whole ones without a point."""
    return repr(number).removesuffix(".0")
