"""What a process gives up for good before it reads what a stranger sent.

With no descriptor to be had, it opens no file and no socket; what it has open, it keeps. Landlock adds that it can
neither signal nor trace a process that has not given up the same (Linux Documentation/userspace-api/landlock.rst). A
kernel without Landlock is no reason to fail: the limits hold on every kernel.
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
import signal
import struct

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
# linux/landlock.h. The numbers of the system calls are the same on every architecture.
_CREATE_RULESET, _RESTRICT_SELF = 444, 446
_CREATE_RULESET_VERSION = 1
_FILES = (1 << 13) - 1
"""Every access to files and directories that the first version knows: read, write, execute, make, remove."""
_NETWORK, _NETWORK_SINCE = 0b11, 4
"""Bind and connect with TCP."""
_SCOPE, _SCOPE_SINCE = 0b11, 6
"""Signals, and abstract unix sockets, of processes outside."""


def die_with(parent: int) -> None:
    """Be killed when the parent, of this pid, dies. Exits at once when that has happened already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def give_up(*, memory: int, written: int, seconds: float) -> bool:
    """From now on: no file or socket can be opened, and no process of others be reached.

    At most `memory` bytes of address space can be had, and files that are open be written up to `written` bytes of
    length. After so many seconds, or seconds of CPU time, a signal ends the process. Returns whether Landlock is in
    force. Import before whatever is needed after.
    """
    number: int
    for number in (signal.SIGALRM, signal.SIGXCPU, signal.SIGXFSZ, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    confined = _confine()
    cpu = math.ceil(seconds) + 1
    for what, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_FSIZE, written),
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_AS, memory),
    ):
        resource.setrlimit(what, (limit, limit))
    return confined


def _confine() -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(ctypes.c_long(_CREATE_RULESET), None, ctypes.c_size_t(0), _CREATE_RULESET_VERSION)
    if version < 1:
        return False
    handled = struct.pack("=Q", _FILES)
    if version >= _NETWORK_SINCE:
        handled += struct.pack("=Q", _NETWORK)
    if version >= _SCOPE_SINCE:
        handled += struct.pack("=Q", _SCOPE)
    ruleset = libc.syscall(ctypes.c_long(_CREATE_RULESET), handled, ctypes.c_size_t(len(handled)), 0)
    if ruleset < 0:
        return False
    try:
        no_new_privileges = libc.prctl(_PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0)))
        return bool(no_new_privileges == 0 and libc.syscall(ctypes.c_long(_RESTRICT_SELF), ruleset, 0) == 0)
    finally:
        os.close(ruleset)
