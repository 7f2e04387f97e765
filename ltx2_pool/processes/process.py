"""One child process seen from the worker. Whoever notices or causes its end, it ends in one way: see `ChildProcess`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ltx2_pool.processes import endings
from ltx2_pool.processes.connection import Channel, open_channel
from ltx2_pool.processes.guard import Guard, kill_group
from ltx2_pool.processes.output import OutputTail
from ltx2_pool.processes.spawner import Launched, Spawner
from ltx2_pool.words.outcomes import ProcessLost, Reason
from ltx2_pool.words.protocol import Broken, FromChild, FromParent, Memory, Ping, ProtocolError

logger = logging.getLogger(__name__)

_LINGERING = 1.0
"""Seconds that a child may live after it closed its Connection, and its Connection after it died."""
_SILENT_TICKS = 4
"""A child is silent when none of so many ticks of the watchdog in a row saw a message. Ticks and not a difference of
clock times: a worker that was stopped for a while itself must not kill its children when it goes on."""


@dataclass(frozen=True)
class Timeouts:
    """Deadlines in seconds."""

    spawn: float = 180
    """For a shape process to be READY, its warm-up video included."""
    weights: float = 900
    """For loading the checkpoint once in the weights process."""
    generation: float = 1800
    cancel: float = 30
    """For a job to stop that was told to."""
    term: float = 30
    """For an idle process to end after SIGTERM."""
    send: float = 10
    """For a child to take a message."""
    silence: float = 20
    """Between two messages of a child, pings included. It counts from the first; until then `spawn` does."""


class Gone(Exception):
    """Nothing more will come from the process. Never leaves this package: ProcessLost says why."""


class ChildProcess:
    """A child, its Connection and its output. What the messages mean is the subclass's business.

    Three verbs end it: `stop` within a grace, `kill` now, and `exited` waits. `_doom` records the first cause and
    kills; `_bury` runs once for each launched process, and when it is done nothing of the process is left here.
    """

    def __init__(self, name: str, spawner: Spawner, guard: Guard, timeouts: Timeouts) -> None:
        self.name = name
        self.memory: Memory | None = None
        self._spawner = spawner
        self._guard = guard
        self._timeouts = timeouts
        self._begun = False
        self._launching: asyncio.Future[Launched] | None = None
        self._launched: Launched | None = None
        self._pidfd: int | None = None
        self._channel: Channel | None = None
        self._output: OutputTail | None = None
        self._listening: asyncio.Task[None] | None = None
        self._burial: asyncio.Task[None] | None = None
        self._answer: asyncio.Future[FromChild] | None = None
        """What the caller who talks to it now waits for."""
        self._job_began = False
        self._ready = False
        self._ending = False
        self._cause: tuple[Reason, str] | None = None
        """Why it was made to end; None while it was not, and when it ended by itself."""
        self._over = asyncio.Event()
        """Nothing more will be read from it."""
        self._gone = asyncio.Event()
        self._status: int | None = None
        self._watched = False
        self._heard = True
        self._quiet_ticks = 0
        self._timers: set[asyncio.TimerHandle] = set()
        self._oom_kills = 0

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})"

    @property
    def pid(self) -> int | None:
        """Its process id; None before it has one."""
        return None if self._launched is None else self._launched.pid

    @property
    def alive(self) -> bool:
        """False from the moment its end was noticed or caused; what it held may not be released yet."""
        return not self._ending

    @property
    def ended_because(self) -> Reason | None:
        """Why it was made to end; None while it was not, and when it ended by itself."""
        return None if self._cause is None else self._cause[0]

    @property
    def tail(self) -> Sequence[str]:
        """The last lines of its output."""
        return tuple(self._output.tail) if self._output is not None else ()

    async def begin(
        self,
        environment: Mapping[str, str],
        inherited: Sequence[int],
        first: FromParent,
        timeout: float,
        advice: str,
    ) -> FromChild:
        """Spawn the child, send it its first message, and return its answer.

        `inherited` are descriptors that it gets besides its Connection. Raises ProcessLost and nothing else; the child
        is then gone. Cancelling the task ends it.
        """
        if not self.alive:
            raise await self.loss()
        self._begun = True
        try:
            # Not within the timeout: what a spawner waits for is no fault of this process, and has deadlines itself.
            await self._launch(environment, inherited)
            async with asyncio.timeout(timeout):
                message = await self._ask(first)
        except Gone:
            raise await self.loss() from None
        except TimeoutError:
            self._doom("spawn_timeout", f"was not READY within {timeout:g} s; {advice}")
            raise await self.loss() from None
        except asyncio.CancelledError:
            self._doom("killed", "is not wanted any more")
            raise
        except Exception as error:
            self._doom("system", f"could not be started: {type(error).__name__}: {error}")
            raise await self.loss() from error
        if isinstance(message, Broken):
            self.memory = message.memory or self.memory
            reason, advice = self._why_broken(message)
            self._doom(reason, f"could not start: {message.error}{advice}")
            raise await self.loss()
        return message

    async def exited(self) -> int:
        """Wait for its end; when this returns, everything it held here and on its devices is released."""
        await self._gone.wait()
        return self._status or 0

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL after the grace. An idle child ends at once, a busy one after its job.

        Whatever a library has made of SIGTERM in it, a child that waits for work reads the end of that.
        """
        was_alive, self._ending = self.alive, True
        if self._launched is None:
            self.kill()
        elif was_alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._launched.pid, signal.SIGTERM)
            if self._channel is not None and self._waits_for_work:
                self._channel.finish()
        try:
            async with asyncio.timeout(self._timeouts.term):
                await self._gone.wait()
        except TimeoutError:
            logger.warning("%s did not end within %g s of SIGTERM: killing it", self, self._timeouts.term)
            self.kill()
        await self._gone.wait()

    @property
    def _waits_for_work(self) -> bool:
        """Whether nothing is lost when it ends now."""
        return False

    def kill(self, why: Reason | None = None) -> None:
        """SIGKILL it and everything it started. `why` is what a job in it is told. May be called again."""
        self._doom(why or "killed", "was killed" if why is None else f"was killed ({why.replace('_', ' ')})")

    async def ended(self) -> bool:
        """Wait for the end of a process that was killed. False when it does not come.

        Even SIGKILL can take long, while a driver is in the middle of something.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timeouts.term + 3 * _LINGERING):
                await self._gone.wait()
        return self._gone.is_set()

    async def noticed(self) -> None:
        """Wait until its end is noticed, which is before it is released."""
        await self._over.wait()

    async def loss(self) -> ProcessLost:
        """The error to raise once it has ended, or was made to: why, and its last words."""
        await self.ended()
        reason, what = self._cause or self._own_end()
        if self._status is not None and (self._cause is None or self._status >= 0):
            what += f" ({endings.describe(self._status)})"
        where = "the process" if self.pid is None else f"process {self.pid}"
        return ProcessLost(self.name, reason, f"{where} {what}", self.tail, began=self._job_began, memory=self.memory)

    async def _launch(self, environment: Mapping[str, str], inherited: Sequence[int]) -> None:
        try:
            self._channel, theirs = await open_channel()
            with theirs:
                read_end, write_end = os.pipe()
                try:
                    self._output = OutputTail(self.name, read_end)
                    self._oom_kills = endings.oom_kills()
                    self._launching = asyncio.ensure_future(
                        self._spawner.launch(
                            {**environment, "PYTHONUNBUFFERED": "1"}, [theirs.fileno(), *inherited], write_end
                        )
                    )
                    await self._launching
                finally:
                    os.close(write_end)
        except asyncio.CancelledError:
            this = asyncio.current_task()
            if self._cause is None or (this is not None and this.cancelling()):
                raise
            raise Gone from None  # killed while it was launched
        finally:
            # From here on to the burial nothing waits, so that nothing can be lost: a task may be cancelled, and its
            # process be there all the same.
            launching = self._launching
            if launching is not None and launching.done() and not launching.cancelled() and not launching.exception():
                self._launched = launching.result()
                self._burial = asyncio.create_task(self._bury(self._launched))
            else:
                self._burial = asyncio.create_task(self._release())
        if self._ending:
            raise Gone
        pid = self._launched.pid if self._launched is not None else 0
        if self._output is not None:
            self._output.name = f"{self.name} pid={pid}"
        self._listening = asyncio.create_task(self._listen(self._channel))
        self._guard.watch(pid)
        self._watch_exit(pid)

    def _watch_exit(self, pid: int) -> None:
        """Notice the end before everything of it is reaped, and also when somebody else holds its Connection open."""
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._ending = True
        else:
            asyncio.get_running_loop().add_reader(self._pidfd, self._on_exit)

    def _on_exit(self) -> None:
        self._ending = True
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    async def _ask(self, message: FromParent) -> FromChild:
        """Send a message and return the answer. Raises Gone."""
        if self._over.is_set() or self._channel is None:
            raise Gone
        answer: asyncio.Future[FromChild] = asyncio.get_running_loop().create_future()
        self._answer = answer
        try:
            try:
                async with asyncio.timeout(self._timeouts.send):
                    await self._channel.send(message)
            except TimeoutError:
                self._doom("send_failed", f"took no message within {self._timeouts.send:g} s")
            except OSError:
                pass  # it is gone: the Connection's end says so
            return await answer
        finally:
            if not answer.cancel() and not answer.cancelled():
                answer.exception()  # whoever asked may have been cancelled in this very moment
            self._answer = None

    async def _listen(self, channel: Channel) -> None:
        """Read what it sends, until it ends or is made to."""
        try:
            async for message in channel.messages():
                if self._cause is not None:
                    return
                self._heard = True
                if not self._watched:
                    self._watched = True
                    self._tick()
                if not isinstance(message, Ping):
                    self._take(message)
        except ProtocolError as error:
            self._doom("parse_error" if self._ready else "spawn_parse_error", f"broke the protocol: {error}")
        self._ending = True
        self._finish()
        if self._launched is not None and not self._launched.exited.done():
            self._later(_LINGERING, lambda: self._doom(*self._own_end()))

    def _take(self, message: FromChild) -> None:
        """Deal with one message, other than a ping: here, an answer."""
        if self._answer is None or self._answer.done():
            self._doom("desync" if self._ready else "spawn_parse_error", f"sent {message.type!r} unasked")
        else:
            self._answer.set_result(message)

    def _tick(self) -> None:
        self._quiet_ticks = 0 if self._heard else self._quiet_ticks + 1
        self._heard = False
        if self._quiet_ticks >= _SILENT_TICKS:
            self._doom("silent", f"sent nothing for {self._timeouts.silence:g} s: it is stopped, or stuck")
        elif not self._over.is_set():
            self._later(self._timeouts.silence / _SILENT_TICKS, self._tick)

    def _later(self, seconds: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        """A timer that does not outlive the process."""

        def ring() -> None:
            self._timers.discard(timer)
            call()

        timer = asyncio.get_running_loop().call_later(seconds, ring)
        self._timers.add(timer)
        return timer

    def _doom(self, reason: Reason, what: str) -> None:
        """Make it end now. The first cause is the one that is told."""
        self._ending = True
        if self._cause is None and not self._gone.is_set():
            self._cause = reason, what
        self._finish()
        if not self._begun:
            self._gone.set()
        elif self._launched is not None:
            if not self._launched.exited.done():
                kill_group(self._launched.pid)
        elif self._launching is not None:
            self._launching.cancel()

    def _finish(self) -> None:
        """Nothing more will be read: whoever waits for an answer is told."""
        self._over.set()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(Gone())

    async def _bury(self, launched: Launched) -> None:
        """The one end of a launched process: reaped, forgotten, and everything that it held here released."""
        if self._ending:
            kill_group(launched.pid)
        status = await launched.exited
        self._on_exit()
        try:
            if self._listening is not None:
                # What it sent before it died is still to be read; only a stray holder keeps its Connection open.
                await asyncio.wait([self._listening], timeout=_LINGERING)
                self._listening.cancel()
                await asyncio.wait([self._listening])
            self._guard.forget(launched.pid)
        finally:
            self._status = status
            self._finish()
            await self._release()

    async def _release(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        try:
            if self._channel is not None:
                self._channel.abort()
            if self._output is not None:
                await self._output.close()
        finally:
            self._gone.set()

    def _own_end(self) -> tuple[Reason, str]:
        """Why it ended when nothing here made it."""
        when = "" if self._ready else " before READY"
        if self._status is None:
            return "gen_eof" if self._ready else "spawn_eof", f"closed its Connection{when}"
        if self._status == -signal.SIGKILL and endings.oom_kills() > self._oom_kills:
            return "oom", f"was killed{when} by the kernel: the machine's or the container's main memory ran out"
        if endings.came_from_outside(self._status):
            return "killed", f"was ended{when} from outside"
        return "gen_eof" if self._ready else "spawn_eof", f"ended{when}"

    def _why_broken(self, message: Broken) -> tuple[Reason, str]:
        if message.kind == "oom":
            return "oom", "; it needs more memory than its device or this machine has free"
        if endings.is_machines_fault(message.error):
            return "system", "; free or allow what this machine refused"
        return ("compile" if message.kind == "compile" else "spawn_eof"), ""
