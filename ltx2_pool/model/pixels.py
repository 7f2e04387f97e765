"""From a client's file to the pixels that the model is shown: decode, compress as H.264, resize and crop.

The last two do what FastVideo does (pipelines/basic/ltx2/stages/ltx2_image_conditioning.py), without torch, and the
result is rounded to whole levels. Where the picture itself is read otherwise than there:

- Transparent parts become white, as on a page. FastVideo drops the alpha channel, which brings to light whatever
  colours a drawing program has left below it.
- 16-bit gray keeps its upper eight bits, as 16-bit colour does.

The same as there: the first frame of an animation, and the orientation that EXIF tells. Colour profiles are ignored:
numbers are taken for sRGB. What comes here is hostile: call it in a process that may be lost (:mod:`.picture`).
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import Any, Literal

import av
import av.logging
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile
from PIL.Image import Transpose

from ltx2_pool.words.pictures import H264_QUALITY, PictureError

Kind = Literal["PNG", "JPEG", "WEBP"]
Pixels = npt.NDArray[np.uint8]
"""Rows, columns, and red, green, blue."""

MIN_SIDE = 16
"""Pixels: one macroblock of H.264."""
MAX_SIDE = 16384
"""Pixels: x264 takes no more."""
MAX_RATIO = 8
"""Of the longer side to the shorter. Of a longer strip, next to nothing would be left in a video."""

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""What undoes each orientation of EXIF. ImageOps.exif_transpose also rewrites the rest of EXIF, and fails where
that is damaged: then a picture would be refused, or lie on its side, for what nobody looks at."""
_ROWS = 32
"""So many rows of the result are computed at a time: this bounds the memory that floating point takes."""

ImageFile.LOAD_TRUNCATED_IMAGES = False
Image.MAX_IMAGE_PIXELS = None  # `decode` has a limit of its own, and an error that says what to do
av.logging.set_libav_level(av.logging.PANIC)


def decode(file: bytes, max_pixels: int) -> Pixels:
    """The picture in a PNG, JPEG or WebP file, upright and opaque.

    Raises PictureError for everything that is not one, MemoryError when there is too little for it.
    """
    kind = kind_of(file)
    if kind == "WEBP":  # its decoder makes room for the whole picture as soon as it is opened
        _check_size(*_webp_size(file), max_pixels)
    try:
        with Image.open(io.BytesIO(file), formats=[kind]) as image:
            _check_size(*image.size, max_pixels)
            image.load()
            turn = _UPRIGHT.get(_orientation(image))
            opaque = _opaque(image)
        return np.asarray(opaque if turn is None else opaque.transpose(turn))
    except (PictureError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise whatever a damaged file makes them stumble over
        raise PictureError(
            f"the picture cannot be decoded: the {kind} file is damaged or incomplete; save it again"
        ) from error


def kind_of(file: bytes) -> Kind:
    """The format, by the first bytes. Raises PictureError when it is none that is accepted."""
    if file.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if file.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if file.startswith(b"RIFF") and file[8:12] == b"WEBP":
        return "WEBP"
    what = "is empty" if not file else "is no PNG, JPEG or WebP file"
    raise PictureError(f"the picture {what}: send a PNG, JPEG or WebP file")


def as_video_frame(pixels: Pixels) -> Pixels:
    """The picture as it looks when it has been a frame of a video: that is what the model was trained on.

    An odd last row or column is lost. One thread: with more, x264 cuts the picture into slices, one for each core, and
    the same picture becomes other pixels on another machine. So they do in FastVideo; on one core, they are these.
    """
    height, width = (side // 2 * 2 for side in pixels.shape[:2])
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        options = {"crf": str(H264_QUALITY), "preset": "veryfast"}
        stream: Any = container.add_stream("libx264", rate=1, options=options)
        stream.width, stream.height = width, height
        stream.codec_context.thread_count = 1
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[:height, :width]), format="rgb24")
        del pixels
        frame = frame.reformat(format="yuv420p", threads=1)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file) as container:
        source = container.streams.video[0]
        source.codec_context.thread_count = 1
        decoded: Any = next(container.decode(source))
    return np.asarray(decoded.to_ndarray(format="rgb24", threads=1))


def resized(pixels: Pixels, width: int, height: int) -> Iterator[Pixels]:
    """Blocks of rows, from the top, of the picture resized to cover width x height, and cut to it around its centre.

    Bilinear between the four nearest pixels, as torch's ``interpolate`` without antialiasing.
    """
    rows, columns = pixels.shape[:2]
    scale = max(height / rows, width / columns)
    top, bottom, down = _between(rows, math.ceil(rows * scale), height)
    left, right, across = _between(columns, math.ceil(columns * scale), width)
    first = left[0]
    needed = pixels[:, first : right[-1] + 1]
    left, right, across = left - first, right - first, across[None, :, None]
    for start in range(0, height, _ROWS):
        block = slice(start, start + _ROWS)
        lines = _mix(needed[top[block]], needed[bottom[block]], down[block, None, None])
        result = _mix(lines.take(left, axis=1), lines.take(right, axis=1), across)
        yield np.rint(result).clip(0, 255).astype(np.uint8)


def _mix(one: npt.NDArray[Any], other: npt.NDArray[Any], share: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """`share` of the other, and the rest of the one."""
    mixed = other.astype(np.float32)
    mixed -= one
    mixed *= share
    mixed += one
    return mixed


def _between(
    source: int, resized_to: int, kept: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """For each of the middle `kept` places of an axis that is resized: two neighbours in the source, and how far from
    the first to the second. Single precision, as torch computes it."""
    start = (resized_to - kept) // 2
    step = np.float32(source) / np.float32(resized_to)
    places = np.arange(start, start + kept, dtype=np.float32)
    at = np.maximum((places + np.float32(0.5)) * step - np.float32(0.5), np.float32(0))
    low = np.minimum(at.astype(np.intp), source - 1)
    return low, np.minimum(low + 1, source - 1), (at - low).astype(np.float32)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    this = f"the picture has {width}x{height} pixels"
    if width * height > max_pixels:
        raise PictureError(f"{this}: at most {max_pixels} in all are accepted; make it smaller")
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_SIDE:
        raise PictureError(f"{this}: each side must have from {MIN_SIDE} to {MAX_SIDE}; resize it")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise PictureError(f"{this}: the longer side may be at most {MAX_RATIO} times the shorter; crop it")


def _webp_size(file: bytes) -> tuple[int, int]:
    """Width and height as the header says (RFC 9649)."""
    chunk, body = file[12:16], file[20:30]
    if len(body) == 10:
        if chunk == b"VP8X":
            return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
        if chunk == b"VP8L" and body[0] == 0x2F:
            bits = int.from_bytes(body[1:5], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        if chunk == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
            return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    raise PictureError("the picture cannot be decoded: the WEBP file is damaged or incomplete; save it again")


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(_ORIENTATION)
    except MemoryError:
        raise
    except Exception:  # damaged EXIF says nothing
        return None


def _opaque(image: Image.Image) -> Image.Image:
    """In RGB, on white."""
    if image.mode.startswith("I"):
        return _opaque_gray(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    page = Image.new("RGB", layer.size, "white")
    page.paste(layer, mask=layer.getchannel("A"))
    return page


def _opaque_gray(image: Image.Image) -> Image.Image:
    """Of 16-bit gray. Pillow's own conversion has changed between its versions."""
    levels = np.asarray(image)
    gray = (levels >> 8).clip(0, 255).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray[levels == transparent] = 255
    return Image.fromarray(gray).convert("RGB")
