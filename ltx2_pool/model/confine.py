"""Keep a child from writing the compile caches of the other shapes: what torch finds in a cache, it runs.

All children have one uid, so file permissions do not part them. Landlock does (Linux Documentation/userspace-api/
landlock.rst): a process gives up rights for good, with everything it starts. It only knows what is allowed, hence all
siblings of the way to the caches are. What is not covered: reading; mounts that show the caches at another path as
well; and threads that run already when :func:`confine` is called, so call it before any is started. A confined process
can trace no process outside either, and so cannot read the worker's memory or environment, unless it is root.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import struct
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

# linux/landlock.h. The numbers of the system calls are the same on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
_PR_SET_NO_NEW_PRIVS = 38

_WRITE_FILE = 1 << 1
_ENTRIES = sum(1 << bit for bit in range(4, 13))
"""Remove and make entries of any kind in a directory."""
_REFER = 1 << 13
_TRUNCATE = 1 << 14
_REFER_SINCE, _TRUNCATE_SINCE = 2, 3
"""The first versions of Landlock's interface that know them."""
SHARED_MEMORY = Path("/dev/shm")
"""Where POSIX shared memory is made; FastVideo does (distributed/parallel_state.py: get_same_node_ranks)."""


def confine_to_cache(environ: Mapping[str, str]) -> bool:
    """`confine` this process to the compile cache that its environment names: not to the caches beside that."""
    named = environ.get("TORCHINDUCTOR_CACHE_DIR")
    if not named:
        return False
    own = Path(named).parent
    caches = own.parent.resolve()
    shared = SHARED_MEMORY.resolve()
    if shared in (caches, *caches.parents):  # they need to make new files there, and Landlock knows no exceptions
        print(f"not confined to {own}: the caches are in {SHARED_MEMORY}", file=sys.stderr, flush=True)
        return False
    return confine([own], caches)


def confine(writable: Sequence[Path], forbidden: Path) -> bool:
    """From now on, nothing below `forbidden` can be written but `writable`, which is made if need be.

    Nor can new entries be made directly in the directories above `forbidden`; temporary files go elsewhere when theirs
    is one of them. Returns whether it is in force: a kernel without Landlock is no reason to fail.
    """
    version = _call(_CREATE_RULESET, None, ctypes.c_size_t(0), _CREATE_RULESET_VERSION)
    if version < _REFER_SINCE:  # it forbids every rename between two directories, and Triton's cache needs those
        return False
    on_file = _WRITE_FILE | (_TRUNCATE if version >= _TRUNCATE_SINCE else 0)
    on_directory = on_file | _ENTRIES | _REFER
    try:
        for path in writable:
            path.mkdir(parents=True, exist_ok=True)
        forbidden = forbidden.resolve(strict=True)
        handled = struct.pack("=Q", on_directory)
        ruleset = _call(_CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), 0)
        if ruleset < 0:
            return False
        try:
            for path in (*_siblings(forbidden), *(path.resolve() for path in writable)):
                _allow(ruleset, path, on_file, on_directory)
            if ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))) < 0:
                return False
            if _call(_RESTRICT_SELF, ruleset, 0) < 0:
                return False
        finally:
            os.close(ruleset)
    except OSError:
        return False
    _move_temporary_files()
    return True


def _siblings(forbidden: Path) -> Iterator[Path]:
    """Everything beside the way from the root to `forbidden`."""
    for step in (*reversed(forbidden.parents[:-1]), forbidden):
        with contextlib.suppress(PermissionError):  # what cannot be listed stays forbidden
            yield from (entry for entry in step.parent.iterdir() if entry != step)


def _allow(ruleset: int, path: Path, on_file: int, on_directory: int) -> None:
    try:
        # A link is not followed: where it leads is allowed already, or is not to be.
        number = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return  # gone in the meantime
    try:
        mode = os.fstat(number).st_mode
        if not stat.S_ISLNK(mode):
            rights = on_directory if stat.S_ISDIR(mode) else on_file
            _call(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, struct.pack("=Qi", rights, number), 0)
    finally:
        os.close(number)


def _move_temporary_files() -> None:
    before = tempfile.tempdir
    tempfile.tempdir = None
    try:
        os.environ["TMPDIR"] = tempfile.gettempdir()  # the first of the usual places that can be written
    except FileNotFoundError:
        tempfile.tempdir = before


def _call(number: int, *arguments: object) -> int:
    return int(ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *arguments))
