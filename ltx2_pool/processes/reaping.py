"""How a child's end reaches this process: by pidfd, then its whole process group is killed and reaped."""

from __future__ import annotations

import asyncio
import os

from ltx2_pool.processes.guard import kill_group

__all__ = ["exit_of", "kill_group", "settle_exit"]

_GROUP_ROUNDS = 200
_GROUP_INTERVAL = 0.005


def exit_of(pid: int) -> asyncio.Future[int]:
    """The exit status of a child of this process, told by the kernel through a pidfd: no polling, no SIGCHLD handler.

    When the future is done, the child is reaped and its process group is gone. Raises OSError when no pidfd is to be
    had; the child is then as it was.
    """
    loop = asyncio.get_running_loop()
    exited: asyncio.Future[int] = loop.create_future()
    pidfd = os.pidfd_open(pid)

    def on_exit() -> None:
        loop.remove_reader(pidfd)
        os.close(pidfd)
        kill_group(pid)  # what it left behind; not yet reaped, so the number is still the group's
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        settle_exit(exited, pid, status)

    loop.add_reader(pidfd, on_exit)
    return exited


def settle_exit(exited: asyncio.Future[int], pid: int, status: int) -> None:
    """Set the exit status of a reaped and killed process once the rest of its group is reaped as well."""
    reaping = asyncio.ensure_future(_reap_group(pid))
    _reaping.add(reaping)

    def settle(_: object) -> None:
        _reaping.discard(reaping)
        if not exited.done():
            exited.set_result(status)

    reaping.add_done_callback(settle)


_reaping: set[asyncio.Future[None]] = set()
"""The loop itself holds tasks weakly."""


async def _reap_group(group: int) -> None:
    """Reap what a dead child had started: to a subreaper, as the zygote makes this process, orphans are its own."""
    for _ in range(_GROUP_ROUNDS):
        try:
            while os.waitpid(-group, os.WNOHANG)[0]:  # noqa: ASYNC222 - returns at once
                pass
        except ChildProcessError:
            return
        await asyncio.sleep(_GROUP_INTERVAL)  # killed, but not dead yet
