"""The weights process seen from outside: started when the first shape process needs it, and its end noticed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ltx2_pool.processes.guard import Guard
from ltx2_pool.processes.pause import HelpersPause
from ltx2_pool.processes.process import ChildProcess, Gone, Timeouts
from ltx2_pool.processes.spawner import Spawner
from ltx2_pool.words import lending
from ltx2_pool.words.device import CPU, shown
from ltx2_pool.words.outcomes import ProcessLost
from ltx2_pool.words.protocol import Checked, Checksum, Lend, Lending
from ltx2_pool.words.recipe import Recipe

logger = logging.getLogger(__name__)

SUCCESSORS = 2
"""Processes in a row that may fail to take over what was lent, before it is given up."""


class WeightsProcess(ChildProcess):
    """Holds the model and lends it over `desk`, whose other end its borrowers inherit."""

    def __init__(self, device: str, spawner: Spawner, guard: Guard, timeouts: Timeouts) -> None:
        super().__init__("weights" if device == CPU.id else f"weights of {device}", spawner, guard, timeouts)
        self._device = device
        self.desk: socket.socket | None = None
        self.lending: Lending | None = None
        """What it said when it was ready; None before, and once it is not alive."""
        self.kept = False
        """Whether what it lends is kept, so that its end is none of those who have attached it."""
        self._asking = asyncio.Lock()

    async def start(self, recipes: Sequence[Recipe], loan: Loan | None = None) -> Lending:
        """Load the checkpoint, or take over what a predecessor lent. Raises ProcessLost; the process is then gone."""
        try:
            self.desk, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            self._doom("system", f"could not be started: {error}")
            raise await self.loss() from error
        try:
            with theirs:
                handing = None if loan is None else asyncio.create_task(self._hand_over(loan))
                try:
                    message = await self.begin(
                        {**recipes[0].environment(), **shown([self._device])},
                        [theirs.fileno()],
                        Lend(recipes=tuple(recipes), kept=None if loan is None else loan.lending),
                        self._timeouts.weights,
                        "raise LTX2_POOL_WEIGHTS_TIMEOUT if the checkpoint only needs longer to load",
                    )
                finally:
                    if handing is not None:
                        theirs.close()  # nobody may take it any more: do not wait for that
                        await handing
            if not isinstance(message, Lending):
                self._doom("spawn_parse_error", f"sent {message.type!r} before it lent anything")
                raise await self.loss()
        except BaseException:
            self.desk.close()
            raise
        self._ready, self.lending = True, message
        return message

    async def _hand_over(self, loan: Loan) -> None:
        assert self.desk is not None
        given = self.desk, loan.blob, loan.descriptors, self._timeouts.weights
        try:
            await asyncio.to_thread(lending.hand_over, *given)
        except OSError as error:
            self._doom("system", f"could not be given what was lent before: {error}")

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


@dataclass(frozen=True)
class Loan:
    """What the weights process lends, kept here: the memory lives for as long as its descriptors are open somewhere."""

    lending: Lending
    blob: bytes
    descriptors: list[int]

    def close(self) -> None:
        """Let go of it."""
        for descriptor in self.descriptors:
            os.close(descriptor)


class Weights:
    """Keeps the weights process of one device alive for as long as somebody borrows from it.

    What it lends is kept, where that can be: then its end ends no borrower, and its successor loads nothing.
    """

    def __init__(
        self, recipes: Sequence[Recipe], device: str, spawner: Spawner, guard: Guard, timeouts: Timeouts
    ) -> None:
        """`recipes`: of all who may borrow."""
        self._recipes = recipes
        self._device = device
        self._spawner = spawner
        self._guard = guard
        self._timeouts = timeouts
        self.pause = HelpersPause()
        self._process: WeightsProcess | None = None
        self._starting: asyncio.Task[WeightsProcess] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._closing = False
        self._loan: Loan | None = None
        self._successors_failed = 0
        self.on_lost: Callable[[], None] = lambda: None
        """Called when the weights are gone: the process ended by itself, and what it lent could not be kept."""

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
        if self._loan is not None:
            return self._loan.lending
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
        turn = self.pause.turn
        try:
            if self._process is not None and not await self._process.ended():  # two models do not fit
                raise ProcessLost("weights", "helper", f"{self._process} does not end, although it was killed")
            if self._closing:
                raise ProcessLost("weights", "killed", "is not started any more: the worker is shutting down")
            process = self._process = WeightsProcess(self._device, self._spawner, self._guard, self._timeouts)
            lent = await process.start(self._recipes, self._loan)
        except ProcessLost as lost:
            if not self._closing:
                self.pause.failed(turn, str(lost))
                self._successor_failed()
            raise
        logger.info(
            "%s lends %.2f GB (import %.1f s, load %.1f s)",
            *(process, lent.bytes / 1e9, lent.import_s, lent.load_s),
        )
        self._successors_failed = 0
        if self._loan is None and lent.durable:
            self._loan = await self._keep(process, lent)
        process.kept = self._loan is not None
        self._watch = asyncio.create_task(self._await_end(process))
        return process

    async def _keep(self, process: WeightsProcess, lent: Lending) -> Loan | None:
        assert process.desk is not None
        try:
            blob, descriptors = await asyncio.to_thread(lending.ask, process.desk, lending.SEND_TIMEOUT)
        except (EOFError, OSError) as error:
            logger.warning("what %s lends could not be kept: %s. If it ends, its borrowers do.", process, error)
            return None
        return Loan(lent, blob, descriptors)

    def _successor_failed(self) -> None:
        """A loan that no process can take over is given up: the checkpoint is loaded again."""
        if self._loan is None:
            return
        self._successors_failed += 1
        if self._successors_failed >= SUCCESSORS:
            logger.error("no process can take over what was lent, %d times: everything is loaded again", SUCCESSORS)
            self._let_go()
            self.on_lost()

    def _let_go(self) -> None:
        if self._loan is not None:
            self._loan.close()
        self._loan, self._successors_failed = None, 0

    def _started(self, starting: asyncio.Task[WeightsProcess]) -> None:
        self._starting = None
        if not starting.cancelled() and (error := starting.exception()) is not None:
            logger.error("the weights process did not start: %s", error)

    async def _await_end(self, process: WeightsProcess) -> None:
        await process.noticed()
        process.lending = None
        try:
            if not self._closing:
                self.pause.failed(self.pause.turn, "the weights process ended")
                if self._loan is None:
                    self.on_lost()
        finally:
            lost = await process.loss()
            await process.exited()
            if process.desk is not None:
                process.desk.close()
            if not self._closing:
                what = "Its borrowers are replaced." if self._loan is None else "What it lent is kept; it is replaced."
                logger.error("%s %s", lost, what)
                if self._loan is not None:
                    with contextlib.suppress(ProcessLost):
                        await self.ready()

    def give_up(self) -> None:
        """End the weights process, and lend nothing more of it; the next start that needs it starts another."""
        self._let_go()
        if self._process is not None:
            self._process.kill()

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
        self._let_go()
