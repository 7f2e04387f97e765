"""Ways to start the child program. The other one, forks of a zygote, is :mod:`ltx2_pool.processes.zygote`."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ltx2_pool.processes.environment import inherited as inherited_environment
from ltx2_pool.processes.guard import kill_group
from ltx2_pool.processes.reaping import exit_of


@dataclass(frozen=True)
class Launched:
    """A started process: its pid, and a future for its exit status (negative: killed by that signal).

    When the future is done, the child is reaped and nothing of its process group is left.
    """

    pid: int
    exited: asyncio.Future[int]


class Spawner(Protocol):
    """A way to start the child program (:mod:`ltx2_pool.model.child`)."""

    async def launch(self, environment: Mapping[str, str], inherited: Sequence[int], output: int) -> Launched:
        """Start a child as leader of its own process group, with `output` as its stdout and stderr.

        `inherited` are the descriptors it gets: its Connection, and its socket to or from the weights process if it
        has one. Raises OSError when the system refuses; nothing is then left of the child.
        """
        ...

    async def close(self) -> None:
        """Release what the spawner itself holds. Its children must have ended before."""
        ...


class ExecSpawner:
    """Starts a fresh interpreter for each child."""

    def __init__(self, program: Sequence[str] = (sys.executable, "-m", "ltx2_pool.model.child")) -> None:
        self._program = list(program)

    async def launch(self, environment: Mapping[str, str], inherited: Sequence[int], output: int) -> Launched:
        """As :meth:`Spawner.launch`."""
        child = subprocess.Popen(  # noqa: ASYNC220 - returns when the program is loaded, which takes a millisecond
            [*self._program, *map(str, inherited)],
            env={**inherited_environment(os.environ), **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=inherited,
            start_new_session=True,
        )
        try:
            exited = exit_of(child.pid)
        except OSError:
            kill_group(child.pid)
            child.wait()
            raise

        def remember(ended: asyncio.Future[int]) -> None:
            # A Popen that is dropped without a status is reaped behind our back by the next one (subprocess._cleanup).
            child.returncode = ended.result()

        exited.add_done_callback(remember)
        return Launched(child.pid, exited)

    async def close(self) -> None:
        """Nothing is held."""
