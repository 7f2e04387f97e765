"""The guard: a tiny process that outlives the worker by a moment and takes its whole process tree with it.

PDEATHSIG ends a shape process when its parent dies, but not what that process started (compilers, inductor's compile
workers). The guard holds the read end of a pipe whose write end only the worker has. When the worker dies, by SIGKILL
too, the pipe ends and the guard kills every process group it was told of. It needs only the standard library, starts
in some 20 ms and is idle until then.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from typing import IO

_CLOSE_TIMEOUT = 5.0


class GuardLost(OSError):
    """The guard died, and another could not be started in its place."""


class Guard:
    """The worker's end. Children must be leaders of process groups of their own."""

    def __init__(self) -> None:
        self._groups: set[int] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The guard's pid, None before `start`."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the guard process. Raises OSError when that is refused."""
        self._closed = False
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__], stdin=subprocess.PIPE, start_new_session=True
        )
        os.set_blocking(_pipe(process), False)
        self._process = process
        for group in self._groups:
            self._write("+", group)

    def watch(self, group: int) -> None:
        """Kill this process group when the worker dies. Raises GuardLost when nothing is there to do it."""
        self._groups.add(group)
        try:
            self._tell("+", group)
        except (OSError, subprocess.SubprocessError) as error:
            raise GuardLost(f"the guard died and could not be started again: {error}") from error

    def forget(self, group: int) -> None:
        """The group's leader is reaped: its number may soon be somebody else's."""
        self._groups.discard(group)
        try:
            self._tell("-", group)
        except (OSError, subprocess.SubprocessError) as error:
            logging.getLogger(__name__).error(
                "no guard could be started: were this worker killed now, its processes would live on (%s)", error
            )

    def close(self) -> None:
        """End the guard. Groups still watched are killed."""
        self._closed = True
        process, self._process = self._process, None
        if process is not None:
            _end(process)

    def _tell(self, sign: str, group: int) -> None:
        if self._closed:
            return
        if self._process is not None:
            try:
                self._write(sign, group)
                return
            except (BrokenPipeError, BlockingIOError):
                # Somebody killed it, or it is stopped. It must not outlive its successor: what it knows grows old.
                process, self._process = self._process, None
                process.kill()
                _end(process)
        elif not self._groups:
            return
        self.start()  # it learns all the groups, this change included

    def _write(self, sign: str, group: int) -> None:
        if self._process is not None:
            os.write(_pipe(self._process), f"{sign}{group}\n".encode())


def _pipe(process: subprocess.Popen[bytes]) -> int:
    if process.stdin is None:
        raise BrokenPipeError("the guard has no pipe")
    return process.stdin.fileno()


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    try:
        process.wait(_CLOSE_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(_CLOSE_TIMEOUT)


def kill_group(group: int) -> None:
    """SIGKILL a process group; nothing happens when it is gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _main(told: IO[str]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups: set[int] = set()
    for line in told:
        (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
    for group in groups:
        kill_group(group)


if __name__ == "__main__":
    _main(sys.stdin)
