"""The file that a client's ``input_reference`` means: what a ``data:`` URI holds, or an ``https:`` URL leads to.

Nothing else is one: no path, no ``file:``, no ``http:``. URLs are fetched from the hosts that the operator lists, and
redirects followed only to these. Dynamo's client adds that none of their names leads to a private address, at the
lookup and again at the connection. What an error says is for the client, so no address or exception is in it; these
are logged.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import re
import string
from typing import Any
from urllib.parse import unquote_to_bytes

from dynamo.common.http import (
    AiohttpClient,
    HttpConfigurationError,
    HttpConnectionError,
    HttpStatusError,
    HttpTimeoutError,
)
from dynamo.common.http.url_validator import UrlValidationError, UrlValidationPolicy

from ltx2_pool.words.pictures import PictureError, PictureLimits

logger = logging.getLogger(__name__)

MEDIA_TYPES = frozenset(
    {"", "application/octet-stream", "image/jpeg", "image/jpg", "image/png", "image/webp", "image/x-png"}
)
"""What a ``data:`` URI may say that it holds. What it does hold is found out by who decodes it."""

_DATA = "data:"
_HEADER = 256
"""Characters of a ``data:`` URI before the comma."""
_PIECE = 1 << 16
"""Characters of base64 that are decoded before others have a turn: milliseconds at the worst."""
_WHITESPACE = string.whitespace.encode()
_ESCAPE = 3
"""Characters of ``%2B``."""
_URL = re.compile(r"https://([a-z0-9.-]{1,254})(?::443)?(?:[/?#][!-~]*)?", re.IGNORECASE)
"""Nothing in its first part can be read in two ways: no user, no backslash, no letter or dot of another script."""
_MAX_URL = 8192


async def fetch(reference: str, limits: PictureLimits) -> bytes:
    """The bytes of the file, not yet known to be a picture. Raises PictureError and nothing else."""
    if reference[: len(_DATA)].lower() == _DATA:
        return await _held(reference, limits)
    if reference[:6].lower() == "https:":
        return await _fetched(reference, limits)
    also = ", or as an https: URL of a host that this worker fetches from" if limits.hosts else ""
    raise PictureError(f"the picture is no data: URI; send it as data:image/png;base64,...{also}")


async def _held(uri: str, limits: PictureLimits) -> bytes:
    """What a ``data:`` URI holds (RFC 2397), in base64. Others have a turn while a long one is decoded."""
    comma = uri.find(",", 0, _HEADER)
    media_type, *parameters = uri[len(_DATA) : max(comma, 0)].lower().split(";")
    if comma < 0 or not parameters or parameters[-1].strip() != "base64":
        raise PictureError("the picture's data: URI is not in base64; send it as data:image/png;base64,...")
    if media_type.strip() not in MEDIA_TYPES:
        raise PictureError("the picture's data: URI has another media type than image/png, image/jpeg or image/webp")
    if len(uri) > 3 * limits.max_bytes + _HEADER:  # 4/3, and room for whitespace and escapes
        raise _too_large(limits)
    decoded: list[bytes] = []
    size, start, rest, padded = 0, comma + 1, b"", False
    while start < len(uri):
        end = start + _PIECE
        cut = uri.rfind("%", max(start, end - _ESCAPE + 1), end) if end < len(uri) else -1
        end = cut if cut > start else end  # an escape is not cut in two
        rest += _characters(uri[start:end])
        start = end
        whole, rest = rest[: len(rest) // 4 * 4], rest[len(rest) // 4 * 4 :]
        padding = len(whole) - len(whole.rstrip(b"="))
        if (whole and padded) or padding > 2:
            raise _malformed()
        padded = padded or padding > 0
        try:
            decoded.append(base64.b64decode(whole, validate=True))
        except ValueError:
            raise _malformed() from None
        size += len(decoded[-1])
        if size > limits.max_bytes:
            raise _too_large(limits)
        await asyncio.sleep(0)
    if rest:
        raise _malformed()
    return b"".join(decoded)


def _characters(piece: str) -> bytes:
    """Of base64, without what was put between or around them on the way."""
    try:
        characters = piece.encode("ascii")
    except UnicodeEncodeError:
        raise _malformed() from None
    if b"%" in characters:
        characters = unquote_to_bytes(characters)
    return characters.translate(None, _WHITESPACE)


def _malformed() -> PictureError:
    return PictureError("the picture's data: URI is not valid base64: encode the file again, with padding")


def _too_large(limits: PictureLimits) -> PictureError:
    return PictureError(f"the picture is too large: at most {limits.max_bytes} bytes are accepted")


async def _fetched(url: str, limits: PictureLimits) -> bytes:
    """What an ``https:`` URL leads to."""
    if not limits.hosts:
        raise PictureError("this worker fetches no pictures; send it as data:image/png;base64,...")
    _check(url, limits.hosts)
    client = _Client(limits.hosts)  # its own: no connection and no cookie of one client's fetch is there for another's
    try:
        async with asyncio.timeout(limits.timeout):  # Dynamo's starts again with each redirect
            policy = UrlValidationPolicy()
            body: bytes = await client.fetch_bytes(url, limits.timeout, policy=policy, max_bytes=limits.max_bytes)
            return body
    except PictureError:
        raise
    except _TooLarge:
        raise _too_large(limits) from None
    except Exception as error:
        level = logging.ERROR if isinstance(error, HttpConfigurationError) else logging.INFO
        logger.log(level, "a picture could not be fetched: %s: %.500r", type(error).__name__, str(error))
        raise PictureError(f"the picture could not be fetched: {_why(error, limits)}") from error
    finally:
        await client.close()


def _why(error: Exception, limits: PictureLimits) -> str:
    if isinstance(error, HttpStatusError):
        return f"its host answered with status {error.status}"
    if isinstance(error, TimeoutError | HttpTimeoutError):
        return f"it took longer than {limits.timeout:g} s"
    if isinstance(error, HttpConnectionError):
        return "the connection to its host failed"
    if isinstance(error, UrlValidationError):
        return "its host's name leads nowhere, or its URL redirects too often"
    if isinstance(error, HttpConfigurationError):
        return "this worker is not set up for it; send it as data:image/png;base64,..."
    return "its host did not answer as it should"


def is_listed(host: str, hosts: tuple[str, ...]) -> bool:
    """Whether the operator lists a host: by name, or as below ``*.example.com``, which is not listed by that itself."""
    name = host.lower().removesuffix(".")
    for listed in hosts:
        pattern = listed.lower().removesuffix(".")
        if name == pattern or (pattern.startswith("*.") and name.endswith(pattern[1:]) and name != pattern[1:]):
            return True
    return False


def _check(url: str, hosts: tuple[str, ...]) -> None:
    """Raises PictureError for a URL that is not of the listed hosts, or that two programs could read differently."""
    if len(url) > _MAX_URL:
        raise PictureError(f"the picture's URL is longer than {_MAX_URL} characters; send a data: URI")
    match = _URL.fullmatch(url)
    if match is None:
        raise PictureError(
            "the picture's URL is not plain: send https://host/path with the host's name in ASCII, without a user or"
            " a port, and everything else percent-encoded"
        )
    if not is_listed(match[1], hosts):
        raise PictureError("the picture's URL is not of a host that this worker fetches from; send a data: URI")


class _TooLarge(Exception):
    """More came than was asked for."""


class _Client(AiohttpClient):  # type: ignore[misc]  # mypy does not read dynamo
    """Dynamo's client, within the listed hosts. One hop is what its base class leaves to a subclass."""

    def __init__(self, hosts: tuple[str, ...]) -> None:
        super().__init__()
        self._hosts = hosts

    async def _fetch_body_or_redirect(self, url: str, *args: Any, **options: Any) -> tuple[bytes | None, str | None]:
        try:
            body, onward = await super()._fetch_body_or_redirect(url, *args, **options)
        except UrlValidationError as error:  # of one hop, it only says that
            raise _TooLarge from error
        if onward is not None:
            try:
                _check(onward, self._hosts)
            except PictureError:
                raise PictureError(
                    "the picture's URL redirects to where this worker does not fetch from; send a data: URI"
                ) from None
        return body, onward
