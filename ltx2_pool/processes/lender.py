"""The weights process seen from the worker: start it when the first shape process needs it, and notice its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable

from ltx2_pool.processes.guard import Guard
from ltx2_pool.processes.process import ChildProcess, ProcessLost, Spawner, State, Timeouts
from ltx2_pool.words.protocol import Checked, Checksum, Lend, Lending
from ltx2_pool.words.recipe import Recipe

logger = logging.getLogger(__name__)


class WeightsProcess(ChildProcess):
    """Holds the model and lends it over `desk`, whose other end its borrowers inherit."""

    def __init__(self, spawner: Spawner, guard: Guard, timeouts: Timeouts) -> None:
        super().__init__("weights", spawner, guard, timeouts)
        self.desk, self._counter = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    async def start(self, recipe: Recipe) -> Lending:
        """Load the checkpoint. Raises ProcessLost; the process is then gone."""
        with self._counter:
            message = await self.begin(
                recipe.environment(), self._counter, Lend(recipe=recipe), self._timeouts.weights,
                "raise LTX2_POOL_WEIGHTS_TIMEOUT if the checkpoint only needs longer to load",
            )  # fmt: skip
        if not isinstance(message, Lending):
            raise await self._lost("spawn_parse_error", f"sent {message.type!r} before it lent anything")
        self.state = State.READY
        return message

    async def checksum(self) -> str:
        """A digest of every byte that is lent. Raises ProcessLost."""
        await self._send(Checksum())
        async with asyncio.timeout(self._timeouts.weights):
            message = await self._receive("gen_eof", "parse_error")
        if not isinstance(message, Checked):
            raise await self._lost("desync", f"sent {message.type!r} instead of a checksum")
        return message.digest


class Lender:
    """Keeps one weights process alive for as long as somebody borrows from it."""

    def __init__(self, recipe: Recipe, spawner: Spawner, guard: Guard, timeouts: Timeouts) -> None:
        self._recipe = recipe
        self._spawner = spawner
        self._guard = guard
        self._timeouts = timeouts
        self._starting = asyncio.Lock()
        self._process: WeightsProcess | None = None
        self._watch: asyncio.Task[None] | None = None
        self._closing = False
        self.lending: Lending | None = None
        """What the living weights process said when it was ready; None without one."""
        self.on_lost: Callable[[], None] = lambda: None
        """Called when the weights process ended by itself: its borrowers can not be trusted any more."""

    async def desk(self) -> socket.socket:
        """The socket that a borrower inherits; starts the weights process when there is none. Raises ProcessLost."""
        async with self._starting:
            if self.lending is None:
                process = WeightsProcess(self._spawner, self._guard, self._timeouts)
                self._process = process
                try:
                    self.lending = lending = await process.start(self._recipe)
                except BaseException:
                    process.desk.close()
                    process.kill()
                    raise
                logger.info(
                    "%s lends %.2f GB (import %.1f s, load %.1f s)",
                    process, lending.bytes / 1e9, lending.import_s, lending.load_s,
                )  # fmt: skip
                self._watch = asyncio.create_task(self._await_end(process))
            assert self._process is not None
            return self._process.desk

    @property
    def pid(self) -> int | None:
        """The weights process's pid, None without one."""
        return self._process.pid if self._process is not None and self.lending is not None else None

    async def checksum(self) -> str:
        """A digest of every byte that is lent now. Raises ProcessLost."""
        await self.desk()
        assert self._process is not None
        return await self._process.checksum()

    async def _await_end(self, process: WeightsProcess) -> None:
        status = await process.exited()
        self.lending = None
        process.desk.close()
        if not self._closing:
            tail = "\n".join(f"  | {line}" for line in process.tail)
            logger.error("%s ended with status %s: its borrowers are replaced. Its last output:\n%s",
                         process, status, tail)  # fmt: skip
            self.on_lost()

    async def close(self) -> None:
        """End the weights process. Its borrowers must have ended before."""
        self._closing = True
        if self._process is not None:
            self._process.kill()
            await self._process.exited()
        if self._watch is not None:
            with contextlib.suppress(ProcessLost):
                await self._watch
