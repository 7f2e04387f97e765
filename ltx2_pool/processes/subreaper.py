"""The subreaper flag of this process: orphans of a zygote become its children, while anybody here needs that."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import Any

_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37

_subreapers = 0
_was_subreaper = False


@contextlib.contextmanager
def subreaper() -> Iterator[None]:
    """Set it (prctl(2), PR_SET_CHILD_SUBREAPER); who leaves last sets it back."""
    global _subreapers, _was_subreaper
    if not _subreapers:
        before = ctypes.c_int()
        _prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before))
        _was_subreaper = bool(before.value)
        _prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1))
    _subreapers += 1
    try:
        yield
    finally:
        _subreapers -= 1
        if not _subreapers and not _was_subreaper:
            _prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(0))


def _prctl(option: int, value: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
