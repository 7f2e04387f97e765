"""A video's bytes over HTTP: ranges, conditions, and never more than a piece of it in memory (RFC 9110, 13 and 14)."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ltx2_pool.gateway.content import Content
from ltx2_pool.gateway.errors import ApiError
from ltx2_pool.gateway.stills import Unreadable

logger = logging.getLogger(__name__)


def span(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte, and the one after the last, of a Range header; None for all of it. Raises ApiError 416.

    Several ranges at once, other units and what is no range at all are answered with the whole.
    """
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", (header or "").replace(" ", ""))
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match[1], match[2]
    if not first:
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(size, int(last) + 1) if last else size
        if last and int(last) < int(first):
            return None
    if start >= stop:
        raise ApiError(416, f"the video has {size} bytes", headers={"content-range": f"bytes */{size}"})
    return start, stop


async def respond(request: Request, content: Content, path: str, size: int, etag: str, media_type: str) -> Response:
    """The answer to a request for a stored file. Raises ApiError 416 and, when the store fails, 503."""
    quoted = f'"{etag}"'
    headers = {"etag": quoted, "accept-ranges": "bytes", "cache-control": "private, max-age=3600"}
    if _matches(request.headers.get("if-none-match"), quoted):
        return Response(status_code=304, headers=headers)
    condition = request.headers.get("if-range")
    ranged = request.method == "GET" and condition in (None, quoted)  # no other method has ranges
    part = span(request.headers.get("range"), size) if ranged else None
    start, stop = part or (0, size)
    headers["content-length"] = str(stop - start)
    if part:
        headers["content-range"] = f"bytes {start}-{stop - 1}/{size}"
    if request.method == "HEAD":
        return Response(headers=headers, media_type=media_type)
    with reading(path):
        pieces = await content.read(path, start, stop)
    return StreamingResponse(pieces, 206 if part else 200, headers, media_type)


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Around what reads from the content store: turns whatever its client throws into ApiError."""
    try:
        yield
    except Unreadable as error:
        raise ApiError(409, "no picture can be made of this video", code="video_unreadable") from error
    except Exception as error:
        logger.error("%s cannot be read: %s: %s", path, type(error).__name__, error)
        raise ApiError(503, "the video cannot be read now", code="content_unavailable", retry_after=5) from error


def _matches(header: str | None, etag: str) -> bool:
    return header is not None and (
        header.strip() == "*" or etag in (tag.strip().removeprefix("W/") for tag in header.split(","))
    )
