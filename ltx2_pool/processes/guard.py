"""The guard: a tiny process that outlives the worker by a moment and takes its whole process tree along.

PDEATHSIG ends a shape process when its parent dies, but not what that process started (compilers, inductor's compile
workers). The guard holds the read end of a pipe whose write end only the worker has. When the worker dies, by SIGKILL
too, the pipe ends and the guard kills every process group it was told of. It needs only the standard library, starts
in some 20 ms and is idle until then.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import IO


class Guard:
    """The worker's end. Children must be leaders of process groups of their own."""

    def __init__(self) -> None:
        self._groups: set[int] = set()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the guard process; raises OSError when it can not be started."""
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            start_new_session=True,
            close_fds=True,
        )
        for group in self._groups:
            self._tell("+", group)

    def watch(self, group: int) -> None:
        """Kill this process group when the worker dies."""
        self._groups.add(group)
        self._tell("+", group)

    def forget(self, group: int) -> None:
        """The group's leader is reaped: its number may soon be somebody else's."""
        self._groups.discard(group)
        self._tell("-", group)

    def close(self) -> None:
        """End the guard. Groups still watched are killed."""
        if self._process is not None:
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait(5)
            self._process = None

    def _tell(self, sign: str, group: int) -> None:
        if self._process is None:
            return
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(f"{sign}{group}\n".encode())
            stdin.flush()
        except BrokenPipeError:
            # Somebody killed the guard: a new one learns all the groups, this change included.
            self._process.wait(5)
            self.start()


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
