"""One child process seen from the worker: spawn, send, await, cancel, stop, kill, and its last output lines."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ltx2_pool.processes.guard import Guard, kill_group
from ltx2_pool.words import protocol
from ltx2_pool.words.protocol import (
    Assign,
    Broken,
    Cancel,
    Done,
    Failed,
    FromChild,
    FromParent,
    Generate,
    Memory,
    Phase,
    Ready,
    Step,
)
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import CacheDirs, Shape

logger = logging.getLogger(__name__)
output_logger = logging.getLogger("ltx2_pool.model.child")

TAIL_LINES = 50
_MAX_LINE = 2000
"""Characters of one line of output that are kept."""
_CHUNK = 1 << 16

Reason = Literal[
    "cuda_fault",
    "spawn_timeout",
    "spawn_eof",
    "spawn_parse_error",
    "gen_timeout",
    "gen_eof",
    "desync",
    "parse_error",
    "send_failed",
    "cancel_timeout",
    "weights_lost",
    "compile",
]
"""Why a process was lost."""

OnEvent = Callable[[Phase | Step], None]


class ProcessLost(Exception):
    """A child process is gone, or was made to go. The message ends with the last lines of its output."""

    def __init__(self, name: str, reason: Reason, what: str, tail: Sequence[str] = ()) -> None:
        self.name, self.reason, self.what, self.tail = name, reason, what, tuple(tail)
        output = "\n".join(f"  | {line}" for line in tail) or "  | (it printed nothing)"
        super().__init__(f"{name}: {what}. Its last output:\n{output}")


class JobFailed(Exception):
    """The process answered that it could not make this video, and serves on."""

    def __init__(self, shape: Shape, kind: Literal["refused", "soft", "cancelled"], error: str) -> None:
        self.shape, self.kind, self.error = shape, kind, error
        super().__init__(f"{shape.key}: {error}")


class State(enum.Enum):
    """The life of a shape process."""

    SPAWNING = "spawning"
    READY = "ready"
    BUSY = "busy"
    DRAINING = "draining"
    DEAD = "dead"


@dataclass(frozen=True)
class Timeouts:
    """Deadlines in seconds."""

    spawn: float = 180
    weights: float = 900
    """For loading the checkpoint once in the weights process."""
    generation: float = 1800
    cancel: float = 30
    term: float = 30
    send: float = 10


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
        has one. Raises OSError when the system refuses.
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
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=inherited,
            start_new_session=True,
        )
        exited = exit_of(child.pid)

        def remember(ended: asyncio.Future[int]) -> None:
            # A Popen that is dropped without a status is reaped behind our back by the next one (subprocess._cleanup).
            child.returncode = ended.result()

        exited.add_done_callback(remember)
        return Launched(child.pid, exited)

    async def close(self) -> None:
        """Nothing is held."""


def exit_of(pid: int) -> asyncio.Future[int]:
    """The exit status of a child of this process, told by the kernel through a pidfd: no polling, no SIGCHLD handler.

    When the future is done, the child is reaped and its process group is gone.
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


async def _reap_group(group: int) -> None:
    """Reap what a dead child had started: to a subreaper, as the zygote makes this process, orphans are its own."""
    for _ in range(200):
        try:
            while os.waitpid(-group, os.WNOHANG)[0]:  # noqa: ASYNC222 - returns at once
                pass
        except ChildProcessError:
            return
        await asyncio.sleep(0.005)  # killed, but not dead yet


class ChildProcess:
    """A child, its Connection and its output. What the messages mean is the subclass's business."""

    def __init__(self, name: str, spawner: Spawner, guard: Guard, timeouts: Timeouts) -> None:
        self.name = name
        self.state = State.SPAWNING
        self.pid: int | None = None
        self._spawner = spawner
        self._guard = guard
        self._timeouts = timeouts
        self._exited: asyncio.Future[int] | None = None
        self._end: asyncio.Task[int] | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._output: OutputTail | None = None

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})"

    @property
    def tail(self) -> Sequence[str]:
        """The last lines of its output."""
        return tuple(self._output.tail) if self._output is not None else ()

    async def begin(
        self,
        environment: Mapping[str, str],
        other: socket.socket | None,
        first: FromParent,
        timeout: float,
        advice: str,
    ) -> FromChild:
        """Spawn the child, send it its first message, and return its answer.

        `other` is a socket that it inherits besides its Connection. Raises ProcessLost; the child is then gone.
        """
        try:
            async with asyncio.timeout(timeout):
                if self.state is State.SPAWNING:
                    await self._launch(environment, [] if other is None else [other.fileno()])
                if self.state is not State.SPAWNING:
                    raise await self._lost("spawn_eof", "was told to stop while it started")
                await self._send(first)
                message = await self._receive("spawn_eof", "spawn_parse_error")
        except TimeoutError:
            raise await self._lost("spawn_timeout", f"not READY within {timeout:g} s; {advice}") from None
        if isinstance(message, Broken):
            raise await self._lost("compile" if message.compile else "spawn_eof", f"could not start: {message.error}")
        return message

    async def exited(self) -> int:
        """Wait for the end of the process; everything it held in this one is released when this returns."""
        return 0 if self._end is None else await asyncio.shield(self._end)

    async def stop(self) -> int:
        """SIGTERM, and SIGKILL after the grace. An idle child ends at once, a busy one after its job."""
        self.state = State.DRAINING
        if self._exited is not None and not self._exited.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid or 0, signal.SIGTERM)
            done, _ = await asyncio.wait([self._exited], timeout=self._timeouts.term)
            if not done:
                logger.warning("%s ignored SIGTERM for %g s: killing it", self, self._timeouts.term)
                self.kill()
        return await self.exited()

    def kill(self) -> None:
        """SIGKILL the child and everything it started."""
        if self.state is not State.DEAD:
            self.state = State.DRAINING
        if self.pid is not None and self._exited is not None and not self._exited.done():
            kill_group(self.pid)

    async def _launch(self, environment: Mapping[str, str], inherited: Sequence[int]) -> None:
        parent, child = socket.socketpair()
        read_end, write_end = os.pipe()
        try:
            with child:
                launched = await self._spawner.launch(
                    {**environment, "PYTHONUNBUFFERED": "1"}, [child.fileno(), *inherited], write_end
                )
        except BaseException as error:
            parent.close()
            os.close(read_end)
            if isinstance(error, OSError):
                raise ProcessLost(self.name, "spawn_eof", f"could not be started: {error}") from error
            raise
        finally:
            os.close(write_end)
        self.pid, self._exited = launched.pid, launched.exited
        self._end = asyncio.create_task(self._release(launched))
        self._guard.watch(launched.pid)
        self._output = OutputTail(f"{self.name} pid={self.pid}", read_end)
        parent.setblocking(False)
        self._reader, self._writer = await asyncio.open_unix_connection(sock=parent, limit=protocol.MAX_MESSAGE)

    async def _release(self, launched: Launched) -> int:
        status = await launched.exited
        self.state = State.DEAD
        self._guard.forget(launched.pid)
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()
        if self._output is not None:
            await self._output.close()
        return status

    async def _send(self, message: FromParent) -> None:
        assert self._writer is not None
        self._writer.write(protocol.frame(protocol.encode(message)))
        try:
            async with asyncio.timeout(self._timeouts.send):
                await self._writer.drain()
        except (OSError, TimeoutError) as error:
            raise await self._lost("send_failed", f"does not take messages ({type(error).__name__})") from error

    async def _receive(self, on_eof: Reason, on_garbage: Reason) -> FromChild:
        assert self._reader is not None
        try:
            header = await self._reader.readexactly(protocol.HEADER.size)
            payload = await self._reader.readexactly(protocol.payload_length(header))
            return protocol.decode_from_child(payload)
        except (asyncio.IncompleteReadError, OSError) as error:
            what = "ended before READY" if self.state is State.SPAWNING else "ended"
            raise await self._lost(on_eof, what) from error
        except protocol.ProtocolError as error:
            raise await self._lost(on_garbage, f"broke the protocol: {error}") from error

    async def _lost(self, reason: Reason, what: str) -> ProcessLost:
        """Make sure that the process is gone, and say why with its last words."""
        if self._exited is not None and not self._exited.done() and reason.endswith("eof"):
            # The Connection closes a moment before the process ends: wait for the status it ends with.
            await asyncio.wait([self._exited], timeout=1)
        was_killed = self._exited is not None and not self._exited.done()
        self.kill()
        status = await self.exited()
        if not was_killed and self.pid is not None:
            what += f" ({_describe(status)})"
        return ProcessLost(self.name, reason, f"process {self.pid} {what}", self.tail)


class ShapeProcess(ChildProcess):
    """A child pinned to one shape. Its owner calls `start` once, then `reserve` and `generate` for each job."""

    def __init__(self, shape: Shape, spawner: Spawner, guard: Guard, timeouts: Timeouts) -> None:
        super().__init__(shape.key, spawner, guard, timeouts)
        self.shape = shape
        self.ready: Ready | None = None
        self.memory: Memory | None = None
        """What it held when it last said so."""
        self.jobs_done = 0
        self.started_at = time.monotonic()
        self._doomed: asyncio.TimerHandle | None = None
        self._why_killed: Reason | None = None

    async def start(
        self, recipe: Recipe, cache: CacheDirs, output_dir: str, warm_up: Job | None = None,
        desk: socket.socket | None = None,
    ) -> Ready:  # fmt: skip
        """Spawn the child and wait until it is READY: with a hot shape when `warm_up` is given.

        `desk` is where it borrows the weights; without one it loads the checkpoint. Raises ProcessLost; the child is
        then gone.
        """
        self.started_at = time.monotonic()
        assign = Assign(
            shape=self.shape, recipe=recipe, output_dir=output_dir, warm_up=warm_up, borrow=desk is not None
        )
        message = await self.begin(
            recipe.environment(cache), desk, assign, self._timeouts.spawn,
            "raise LTX2_POOL_SPAWN_TIMEOUT if it only needs longer",
        )  # fmt: skip
        if not isinstance(message, Ready):
            raise await self._lost("spawn_parse_error", f"sent {message.type!r} before READY")
        self.ready, self.memory = message, message.memory
        self.state = State.READY
        return message

    def reserve(self) -> None:
        """Take the idle process for one `generate`."""
        assert self.state is State.READY, f"{self} is {self.state}"
        self.state = State.BUSY

    async def generate(self, job: Job, on_event: OnEvent) -> Done:
        """Have the reserved child make one video. Raises JobFailed (it serves on) or ProcessLost (it does not)."""
        assert self.state is State.BUSY, f"{self} is {self.state}: reserve it first"
        try:
            async with asyncio.timeout(self._timeouts.generation):
                await self._send(Generate(job=job))
                done = await self._answer(job, on_event)
        except TimeoutError:
            raise await self._lost("gen_timeout", f"a generation took over {self._timeouts.generation:g} s") from None
        finally:
            if self._doomed is not None:
                self._doomed.cancel()
                self._doomed = None
            if self.state is State.BUSY:
                self.state = State.READY
        self.jobs_done += 1
        self.memory = done.memory
        return done

    async def _answer(self, job: Job, on_event: OnEvent) -> Done:
        while True:
            message = await self._receive("gen_eof", "parse_error")
            if not isinstance(message, Phase | Step | Done | Failed):
                raise await self._lost("desync", f"sent {message.type!r} in the middle of a job")
            if message.job_id != job.id:
                raise await self._lost("desync", f"answered job {message.job_id!r} while {job.id!r} was asked")
            if isinstance(message, Done):
                return message
            if isinstance(message, Failed):
                if message.kind == "compile":
                    raise await self._lost("compile", f"could not compile: {message.error}")
                if message.kind == "fatal":
                    raise await self._lost("cuda_fault", f"a fatal error ended it: {message.error}")
                raise JobFailed(self.shape, message.kind, message.error)
            on_event(message)

    def cancel(self, job: Job) -> None:
        """Ask the child to stop a job between two steps; kill it when it has not within the cancel grace."""
        if self.state is not State.BUSY or self._doomed is not None:
            return
        assert self._writer is not None
        self._writer.write(protocol.frame(protocol.encode(Cancel(job_id=job.id))))

        def doom() -> None:
            logger.warning("%s did not stop job %s within %g s: killing it", self, job.id, self._timeouts.cancel)
            self.kill("cancel_timeout")

        self._doomed = asyncio.get_running_loop().call_later(self._timeouts.cancel, doom)

    def kill(self, why: Reason | None = None) -> None:
        """SIGKILL the child and everything it started; `why` is the reason that its job is told."""
        self._why_killed = self._why_killed or why
        super().kill()

    async def _lost(self, reason: Reason, what: str) -> ProcessLost:
        if self._why_killed is not None and reason.endswith("eof"):
            reason = self._why_killed
        return await super()._lost(reason, what)


class OutputTail:
    """Drains a pipe that holds a process's stdout and stderr: keeps the last lines and logs them all.

    Nothing in them is ever interpreted.
    """

    def __init__(self, name: str, fd: int) -> None:
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._name = name
        self._task = asyncio.create_task(self._drain(fd))

    async def close(self) -> None:
        """Take in what is left in the pipe of a process that has ended, and release it."""
        # Only a grandchild in a group of its own could still hold it open.
        await asyncio.wait([self._task], timeout=1)
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _drain(self, fd: int) -> None:
        reader = asyncio.StreamReader(limit=_CHUNK)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", buffering=0)
        )
        rest = b""
        try:
            while chunk := await reader.read(_CHUNK):
                *lines, rest = (rest + chunk).replace(b"\r", b"\n").split(b"\n")
                rest = rest[-_CHUNK:]
                for line in lines:
                    self._keep(line)
            self._keep(rest)
        finally:
            transport.close()

    def _keep(self, raw: bytes) -> None:
        line = raw[:_MAX_LINE].decode(errors="replace").rstrip()
        if line:
            self.tail.append(line)
            output_logger.info("[%s] %s", self._name, line)


def _describe(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
