"""The zygote's own side: import what every shape process needs, then fork a child on each request.

Run as ``python -m ltx2_pool.processes.forking FD PROGRAM MODULE...``: the worker's control socket, what a fork calls,
and what to import before. Both are written ``module:function`` or ``module``. The worker's side, with the protocol, is
:mod:`ltx2_pool.processes.zygote`.

The zygote computes nothing, creates no CUDA context and starts no Python thread, because none of these survives a fork.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ltx2_pool.processes.guard import kill_group

MAX_MESSAGE = 1 << 16
_MAX_DESCRIPTORS = 8
_MAX_REASON = 1000
_TITLE = "ltx2-zygote"
"""Of the process, and of a fork before it is told its shape. Short enough for the kernel's 15 characters."""


def main() -> NoReturn:
    """Import, say so, and fork until the worker's end of the socket is closed."""
    number, program, *preload = sys.argv[1:]
    control = socket.socket(fileno=int(number))
    # Python 3.12 warns at every fork of a process with threads. torch's native ones are idle and hold no lock here.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    skipped = _preload(preload)
    with contextlib.suppress(ImportError):
        import setproctitle

        setproctitle.setproctitle(_TITLE)
    Zygote(control, program).serve(skipped)
    os._exit(0)


def resolve(name: str) -> Callable[..., object] | None:
    """Import ``module`` or ``module:function``, and return the function if one is named."""
    module, _, function = name.partition(":")
    found = importlib.import_module(module)
    return getattr(found, function) if function else None


def why_not_to_fork() -> str | None:
    """Why a fork of this process would be unsafe, None when it is safe."""
    threads = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    if threads:
        return f"Python threads run in it: {', '.join(threads)}"
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "CUDA is initialised in it"
    return None


def _preload(names: Sequence[str]) -> dict[str, str]:
    """Import and call all of them; what cannot be is skipped, because a fork can still do it and say what is wrong."""
    skipped = {}
    for name in names:
        try:
            function = resolve(name)
            if function is not None:
                function()
        except Exception as error:
            traceback.print_exc()
            skipped[name] = f"{type(error).__name__}: {error}"[:_MAX_REASON]
    return skipped


@dataclass(frozen=True)
class _Child:
    pid: int
    pidfd: int
    status: socket.socket
    """Where its end is reported. The worker closes the other end to have it killed."""


class Zygote:
    """Serves requests in one thread. What it has open itself is closed in every fork."""

    def __init__(self, control: socket.socket, program: str) -> None:
        self._control = control
        self._program = program
        # Whatever the imports have opened belongs to the libraries, and they expect to find it in a fork.
        self._libraries = _open_descriptors() - {control.fileno()}
        self._children: dict[int, _Child] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ, self._on_request)
        self._serving = True

    def serve(self, skipped: dict[str, str]) -> None:
        """Returns when the worker is gone; the children are then killed."""
        _report(self._control, "ready", skipped)
        while self._serving:
            for key, _ in self._selector.select():
                key.data()

    def _on_request(self) -> None:
        request, descriptors, _, _ = socket.recv_fds(self._control, MAX_MESSAGE, _MAX_DESCRIPTORS)
        if not request:
            for pid in self._children:
                kill_group(pid)
            self._serving = False
            return
        if not descriptors:
            return  # this process has no more of them: the worker sees its end closed without an answer
        status, others = socket.socket(fileno=descriptors[0]), descriptors[1:]
        try:
            if not others or not self._fork(status, json.loads(request), *others):
                status.close()
        finally:
            for descriptor in others:
                os.close(descriptor)

    def _fork(self, status: socket.socket, request: dict[str, Any], output: int, *inherited: int) -> bool:
        """Fork a child and tell the worker. False when refused. Does not return in the child."""
        if reason := why_not_to_fork():
            _report(status, "refused", reason)
            return False
        try:
            pid = os.fork()
        except OSError as error:
            _report(status, "refused", str(error))
            return False
        if pid == 0:
            self._become_child(status, request, output, inherited)
        # Also done by the child: whoever comes first, the group exists before anybody hears of its number.
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            kill_group(pid)
            os.waitpid(pid, 0)
            _report(status, "refused", str(error))
            return False
        child = self._children[pid] = _Child(pid, pidfd, status)
        self._selector.register(pidfd, selectors.EVENT_READ, lambda: self._on_exit(child))
        self._selector.register(status, selectors.EVENT_READ, lambda: self._on_given_up(child))
        _report(status, "pid", pid, pidfd)
        return True

    def _on_given_up(self, child: _Child) -> None:
        if child.pid in self._children:  # not in the same batch of events as its exit
            self._selector.unregister(child.status)
            kill_group(child.pid)

    def _on_exit(self, child: _Child) -> None:
        del self._children[child.pid]
        self._selector.unregister(child.pidfd)
        os.close(child.pidfd)
        with contextlib.suppress(KeyError):
            self._selector.unregister(child.status)
        kill_group(child.pid)  # what it left behind; not yet reaped, so the number is still the group's
        _report(child.status, "exited", os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1]))
        child.status.close()

    def _become_child(
        self, status: socket.socket, request: dict[str, Any], output: int, inherited: Sequence[int]
    ) -> NoReturn:
        code = 1
        try:
            os.setpgid(0, 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            self._close_all_but(self._libraries | {0, 1, 2, *inherited}, status)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            os.environ.update(request["environment"])
            program = resolve(self._program)
            assert program is not None, f"{self._program} names no function"
            program(*inherited)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(code)

    def _close_all_but(self, kept: set[int], *others: socket.socket) -> None:
        """Close the descriptors of the zygote and of the child's siblings, and no number twice."""
        self._selector.close()
        for one in (self._control, *others, *(child.status for child in self._children.values())):
            one.detach()
        for number in _open_descriptors() - kept:
            with contextlib.suppress(OSError):
                os.close(number)


def _open_descriptors() -> set[int]:
    listed = [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]
    return {number for number in listed if _is_open(number)}  # all but the directory's own, which is closed by now


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _report(to: socket.socket, kind: str, value: object, *descriptors: int) -> None:
    """One message. A worker that is gone or has given up finds out by itself."""
    if isinstance(value, str):
        value = value[:_MAX_REASON]
    with contextlib.suppress(OSError):
        socket.send_fds(
            to, [json.dumps({kind: value}).encode()], descriptors, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        )


if __name__ == "__main__":
    main()
