"""From the file that a child left to what the client gets: base64 in the answer, or a URL in the media store."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import os
import stat
import threading
from pathlib import Path
from typing import Any

from dynamo.common.storage import get_fs, get_media_url

from ltx2_pool.serving.threads import Lane

logger = logging.getLogger(__name__)

MAX_BYTES = 2 << 30
"""No video of any menu comes near this; what is larger is not a video."""
READERS = 4
"""Videos that are read and encoded at a time: each is milliseconds of one core."""
UPLOADS = 16
"""Uploads at a time. One that hangs keeps its place until its thread ends; requests by URL wait for one."""


class DeliveryTimeout(Exception):
    """The video was made and could not be handed over in time."""


class MediaStore:
    """Where videos asked for by URL go (fsspec, through Dynamo's storage helper).

    What is published in a ``file://`` store can be read by everybody (0644, in a directory of 0755), whatever the
    worker's umask: a web server has to. The file that the child made is private, and is never what gets published.
    Nothing here expires what is stored.
    """

    def __init__(self, fs_url: str, http_url: str | None) -> None:
        self._fs: Any = get_fs(fs_url)
        self._http_url = http_url

    def put(self, name: str, data: bytes, abandoned: threading.Event) -> str:
        """Store an MP4 and return its URL. Blocks. One whose client was told meanwhile that it failed is removed."""
        path = f"videos/{name}.mp4"
        self._fs.pipe(path, data)
        if "file" in self._fs.fs.protocol:
            stored = Path(self._fs.path) / path
            stored.chmod(0o644)
            stored.parent.chmod(0o755)
        if abandoned.is_set():
            with contextlib.suppress(Exception):
                self._fs.rm(path)
            logger.warning("%s was stored after the end of its request, and is removed", path)
        url: str = get_media_url(self._fs, path, self._http_url)
        return url


class Deliverer:
    """Hands videos over, each within one deadline for everything: the wait for a thread, the file, the upload."""

    def __init__(self, store: MediaStore | None, timeout: float) -> None:
        self._store = store
        self._timeout = timeout
        self._readers = Lane("read-video", READERS)
        self._uploads = Lane("upload-video", UPLOADS)

    async def deliver(self, path: Path, name: str, as_url: bool) -> tuple[dict[str, str], int]:
        """The field of the answer and the size of the video. The file is gone afterwards, whatever happened.

        Raises DeliveryTimeout, OSError and whatever the store raises.
        """
        abandoned = threading.Event()
        deadline = asyncio.timeout(self._timeout)
        try:
            async with deadline:
                if not as_url:
                    return await self._readers.run(_encoded, path)
                assert self._store is not None
                data = await self._readers.run(take, path)
                return {"url": await self._uploads.run(self._store.put, name, data, abandoned)}, len(data)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise DeliveryTimeout(f"the video was made and could not be handed over in {self._timeout:g} s") from error
        finally:
            abandoned.set()
            discard(path)


def _encoded(path: Path) -> tuple[dict[str, str], int]:
    data = take(path)
    return {"b64_json": base64.b64encode(data).decode()}, len(data)


def take(path: Path) -> bytes:
    """Read what a child left, and unlink it. Blocks. Raises OSError when it is not a plain file of ours.

    The child runs code on what clients sent: it may have left a link to any file that this worker can read, a FIFO
    that never ends, or a file that somebody else still has a name for.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            size = _checked(path, os.fstat(descriptor))
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                data = file.read(size)
        finally:
            os.close(descriptor)
        if len(data) != size:
            raise OSError(f"what the process left at {path} has shrunk from {size} to {len(data)} bytes")
        return data
    finally:
        discard(path)


def _checked(path: Path, found: os.stat_result) -> int:
    for problem, text in (
        (not stat.S_ISREG(found.st_mode), "is not a regular file"),
        (found.st_uid != os.geteuid(), f"belongs to uid {found.st_uid}"),
        (found.st_nlink != 1, f"has {found.st_nlink} links"),
        (found.st_size == 0, "is empty"),
        (found.st_size > MAX_BYTES, f"has {found.st_size} bytes, more than {MAX_BYTES}"),
    ):
        if problem:
            raise OSError(f"what the process left at {path} {text}")
    return found.st_size


def discard(path: Path) -> None:
    """Unlink a video that nobody wants, or that has been read. Never raises."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.error("%s is left behind: %s", path, error)
