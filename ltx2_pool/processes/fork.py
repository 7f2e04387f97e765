"""One request to the zygote for a fork, and the child that comes of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
from typing import Any, Protocol

from ltx2_pool.processes.forking import MAX_MESSAGE
from ltx2_pool.processes.guard import kill_group
from ltx2_pool.processes.reaping import settle_exit
from ltx2_pool.words.protocol import ProtocolError

logger = logging.getLogger(__name__)


class Zygote(Protocol):
    """What a fork needs of the process that it was asked of."""

    forks: set[Fork]
    """Those that are asked for or alive."""

    def end(self, what: str) -> None:
        """It is gone or useless."""

    def error(self, what: str) -> OSError:
        """What a caller is told."""
        ...


class Fork:
    """One request, and the child that comes of it: what its status socket says, and its end without the zygote."""

    def __init__(self, zygote: Zygote, status: socket.socket) -> None:
        self._zygote = zygote
        self._status = status
        self._loop = asyncio.get_running_loop()
        self._pidfd: int | None = None
        self.pid: int | None = None
        self.answer: asyncio.Future[int] = self._loop.create_future()
        self.exited: asyncio.Future[int] = self._loop.create_future()
        status.setblocking(False)
        self._loop.add_reader(status, self._take)
        zygote.forks.add(self)

    def give_up(self) -> None:
        """The caller does not want it any more: the zygote kills what it has forked when this end is closed."""
        if self.pid is None:
            self._release()
        elif not self.exited.done():
            kill_group(self.pid)  # its end is still awaited

    def adopt(self) -> bool:
        """The zygote is reaped. Read what it still said; then the child is this process's own. True when it lives."""
        while self in self._zygote.forks and self._take():
            pass
        if self not in self._zygote.forks:
            return False
        if self.pid is None:
            self._fail("ended before it forked")
            return False
        self._loop.remove_reader(self._status)
        try:
            if self._pidfd is None:
                self._pidfd = os.pidfd_open(self.pid)
            self._loop.add_reader(self._pidfd, self._on_exit)
        except Exception as error:
            # Gone without a status, or nothing is left to watch it with; in the second case it must not live on.
            logger.error("process %d cannot be adopted from the zygote: %s", self.pid, error)
            if not isinstance(error, ProcessLookupError):
                kill_group(self.pid)
            self._settle(-signal.SIGKILL)
            return False
        return True

    def _on_exit(self) -> None:
        """The adopted child has ended, or had ended and been reaped by the zygote, which could not say so any more."""
        assert self.pid is not None
        assert self._pidfd is not None
        self._loop.remove_reader(self._pidfd)
        status = -int(signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            kill_group(self.pid)  # what it left behind; not yet reaped, so the number is still the group's
            status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._settle(status)

    def _take(self) -> bool:
        """Take in one message. False when there is none."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._status, MAX_MESSAGE, 1)
        except BlockingIOError:
            return False
        except OSError:
            data, descriptors = b"", []
        if descriptors:
            self._pidfd = descriptors[0]
        if not data:
            self._loop.remove_reader(self._status)
            self._zygote.end("ended" if self.pid is not None else "ended, or took a request without an answer")
            return False
        try:
            self._on_message(data)
        except ProtocolError as error:
            self._loop.remove_reader(self._status)
            self._zygote.end(f"broke the protocol: {error}")
            return False
        return True

    def _on_message(self, data: bytes) -> None:
        if self.pid is None:
            kind, value = parse(data, pid=int, refused=str)
            if kind == "refused":
                self._fail(f"cannot fork: {value}")
                return
            if value <= 1:  # to kill its group would be to kill this process's own, or every process
                raise ProtocolError(f"no child has the pid {value}")
            self.pid = value
            if not self.answer.done():
                self.answer.set_result(value)
        else:
            _, status = parse(data, exited=int)
            self._settle(status)

    def _fail(self, why: str) -> None:
        self._release()
        if not self.answer.done():
            self.answer.set_exception(self._zygote.error(why))

    def _settle(self, status: int) -> None:
        assert self.pid is not None
        self._release()
        settle_exit(self.exited, self.pid, status)

    def _release(self) -> None:
        if self not in self._zygote.forks:
            return
        self._zygote.forks.discard(self)
        self._loop.remove_reader(self._status)
        self._status.close()
        if self._pidfd is not None:
            os.close(self._pidfd)


def parse(data: bytes, **known: type) -> tuple[str, Any]:
    """A message of the zygote, one key and its value. Raises ProtocolError when it is none of those known here."""
    try:
        message = json.loads(data)
    except ValueError as error:
        raise ProtocolError(f"not JSON: {data[:80]!r}") from error
    if isinstance(message, dict) and len(message) == 1:
        ((kind, value),) = message.items()
        if kind in known and type(value) is known[kind]:
            return kind, value
    raise ProtocolError(f"expected {' or '.join(known)}: {data[:80]!r}")
