"""The weights process seen from outside: started when the first shape process needs it, and its end noticed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable

from ltx2_pool.processes.guard import Guard
from ltx2_pool.processes.pause import HelpersPause
from ltx2_pool.processes.process import ChildProcess, Gone, Timeouts
from ltx2_pool.processes.spawner import Spawner
from ltx2_pool.words.outcomes import ProcessLost
from ltx2_pool.words.protocol import Checked, Checksum, Lend, Lending
from ltx2_pool.words.recipe import Recipe

logger = logging.getLogger(__name__)


class WeightsProcess(ChildProcess):
    """Holds the model and lends it over `desk`, whose other end its borrowers inherit."""

    def __init__(self, spawner: Spawner, guard: Guard, timeouts: Timeouts) -> None:
        super().__init__("weights", spawner, guard, timeouts)
        self.desk: socket.socket | None = None
        self.lending: Lending | None = None
        """What it said when it was ready; None before, and once it is not alive."""
        self._asking = asyncio.Lock()

    async def start(self, recipe: Recipe) -> Lending:
        """Load the checkpoint. Raises ProcessLost; the process is then gone."""
        try:
            self.desk, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            self._doom("system", f"could not be started: {error}")
            raise await self.loss() from error
        try:
            with theirs:
                message = await self.begin(
                    recipe.environment(),
                    theirs,
                    Lend(recipe=recipe),
                    self._timeouts.weights,
                    "raise LTX2_POOL_WEIGHTS_TIMEOUT if the checkpoint only needs longer to load",
                )
            if not isinstance(message, Lending):
                self._doom("spawn_parse_error", f"sent {message.type!r} before it lent anything")
                raise await self.loss()
        except BaseException:
            self.desk.close()
            raise
        self._ready, self.lending = True, message
        return message

    async def checksum(self) -> str:
        """A digest of every byte that is lent. Raises ProcessLost."""
        try:
            async with self._asking, asyncio.timeout(self._timeouts.weights):
                message = await self._ask(Checksum())
        except Gone:
            raise await self.loss() from None
        except TimeoutError:
            self._doom("gen_timeout", f"took over {self._timeouts.weights:g} s for a checksum")
            raise await self.loss() from None
        if not isinstance(message, Checked):
            self._doom("desync", f"sent {message.type!r} instead of a checksum")
            raise await self.loss()
        return message.digest

    async def noticed(self) -> None:
        """Wait until its end is noticed, which is before it is released."""
        await self._over.wait()


class Weights:
    """Keeps one weights process alive for as long as somebody borrows from it."""

    def __init__(self, recipe: Recipe, spawner: Spawner, guard: Guard, timeouts: Timeouts, pause: HelpersPause) -> None:
        self._recipe = recipe
        self._spawner = spawner
        self._guard = guard
        self._timeouts = timeouts
        self._pause = pause
        self._process: WeightsProcess | None = None
        self._starting: asyncio.Task[WeightsProcess] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._closing = False
        self.on_lost: Callable[[], None] = lambda: None
        """Called when the weights process ended by itself: its borrowers cannot be trusted any more."""

    async def ready(self) -> WeightsProcess:
        """The process to borrow from; one start for all who wait for it. Raises ProcessLost.

        Whoever gives up waiting leaves the start to the others, and to whoever comes next.
        """
        if self._process is not None and self._process.alive and self._process.lending is not None:
            return self._process
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
            self._starting.add_done_callback(self._started)
        return await asyncio.shield(self._starting)

    @property
    def lending(self) -> Lending | None:
        """What is lent now; None while nothing is."""
        process = self._process
        return process.lending if process is not None and process.alive else None

    @property
    def pid(self) -> int | None:
        """The weights process's pid; None without one."""
        return self._process.pid if self._process is not None and self._process.alive else None

    async def checksum(self) -> str:
        """A digest of every byte that is lent now. Raises ProcessLost."""
        return await (await self.ready()).checksum()

    async def _start(self) -> WeightsProcess:
        turn = self._pause.turn
        try:
            if self._process is not None and not await self._process.ended():  # two models do not fit
                raise ProcessLost("weights", "helper", f"{self._process} does not end, although it was killed")
            if self._closing:
                raise ProcessLost("weights", "killed", "is not started any more: the worker is shutting down")
            process = self._process = WeightsProcess(self._spawner, self._guard, self._timeouts)
            lending = await process.start(self._recipe)
        except ProcessLost as lost:
            if not self._closing:
                self._pause.failed(turn, str(lost))
            raise
        logger.info(
            "%s lends %.2f GB (import %.1f s, load %.1f s)",
            *(process, lending.bytes / 1e9, lending.import_s, lending.load_s),
        )
        self._watch = asyncio.create_task(self._await_end(process))
        return process

    def _started(self, starting: asyncio.Task[WeightsProcess]) -> None:
        self._starting = None
        if not starting.cancelled() and (error := starting.exception()) is not None:
            logger.error("the weights process did not start: %s", error)

    async def _await_end(self, process: WeightsProcess) -> None:
        await process.noticed()
        process.lending = None
        try:
            if not self._closing:
                self._pause.failed(self._pause.turn, "the weights process ended")
                self.on_lost()
        finally:
            lost = await process.loss()
            await process.exited()
            if process.desk is not None:
                process.desk.close()
            if not self._closing:
                logger.error("%s Its borrowers are replaced.", lost)

    async def close(self) -> None:
        """End the weights process. Its borrowers must have ended before."""
        self._closing = True
        if self._process is not None:
            self._process.kill()
            if not await self._process.ended():
                logger.error("%s does not end, although it was killed: it is left behind", self._process)
                if self._watch is not None:
                    self._watch.cancel()
        for task in (self._starting, self._watch):
            if task is not None:
                with contextlib.suppress(ProcessLost, asyncio.CancelledError):
                    await task
