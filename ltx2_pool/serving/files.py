"""The files of videos: made empty for each attempt by the worker, written by a child, removed by the worker."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def make_empty(path: Path) -> None:
    """An empty file that only we can read; its directory is made again if somebody has tidied up. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))


def remove(path: Path) -> None:
    """Remove it if it is there and can be removed."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
