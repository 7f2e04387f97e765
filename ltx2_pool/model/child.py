"""What runs in a shape process: take jobs from the Connection, one at a time, until told to stop.

Started as ``python -m ltx2_pool.model.child FD [FD...]``, or forked from the zygote, with the environment of
:meth:`ltx2_pool.words.recipe.Recipe.environment` already set. The first message on the Connection, the first
descriptor, says whether this becomes a shape process or the weights process. A shape process has the memory for its
jobs' pictures as well; the last descriptor leads from one to the other. stdout and stderr are diagnostics: nothing that
a library prints can touch the protocol.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from ltx2_pool.model.confine import confine_to_cache as confine_to_cache
from ltx2_pool.words import protocol
from ltx2_pool.words.pictures import pixel_bytes
from ltx2_pool.words.protocol import (
    PING_INTERVAL,
    Assign,
    Broken,
    Cancel,
    Done,
    Failed,
    Generate,
    Lend,
    Memory,
    Phase,
    Ping,
    Ready,
    Step,
)
from ltx2_pool.words.recipe import VideoSettings

if TYPE_CHECKING:
    from ltx2_pool.model.engine import Generator

_PR_SET_PDEATHSIG = 1
_MAX_ERROR = 2000
"""Characters of an error that are sent; the whole of it is printed."""

Kind = Literal["refused", "soft", "cancelled", "fatal", "oom", "compile", "barred"]
"""As :class:`ltx2_pool.words.protocol.Failed` has it."""


def main() -> NoReturn:
    """A fresh interpreter: the worker is the parent."""
    _die_with_parent()
    serve(*map(int, sys.argv[1:]))
    _exit(0)


def serve(connection_fd: int, *others: int) -> None:
    """Serve over those descriptors until told to stop; also what a fork of the zygote runs."""
    started = time.monotonic()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    confine_to_cache(os.environ)  # before there is a thread, which would stay as it is
    connection = LockedConnection(connection_fd)
    threading.Thread(target=_ping, args=[connection], name="ping", daemon=True).start()
    with contextlib.suppress(ParentGone, EOFError, BrokenPipeError, ConnectionResetError):
        first = protocol.decode_from_parent(connection.recv_bytes(protocol.MAX_MESSAGE))
        where = f" on {os.environ['LTX2_DEVICES']}" if "LTX2_DEVICES" in os.environ else ""
        if isinstance(first, Assign) and others:
            _set_title(f"ltx2 {first.key}{where}")
            ShapeServer(connection, started, others).run(first)
        elif isinstance(first, Lend) and others:
            _set_title(f"ltx2-weights{where}")
            from ltx2_pool.model.weights import WeightsServer

            WeightsServer(connection, socket.socket(fileno=others[-1]), started).run(first)
        else:
            raise protocol.ProtocolError(f"expected an Assign or a Lend first, got {first.type}")


class ParentGone(BaseException):
    """The worker's end of the Connection is closed. No error of a job: nothing on the way may take it for one."""


class LockedConnection(Connection):
    """A Connection on which several threads may send."""

    def __init__(self, handle: int) -> None:
        super().__init__(handle)
        self._sending = threading.Lock()

    def send_bytes(self, buf: Any, offset: int = 0, size: int | None = None) -> None:
        """As the base class's, one message at a time."""
        with self._sending:
            super().send_bytes(buf, offset, size)


def _ping(connection: Connection) -> None:
    """Tell the worker that this process is neither stopped nor stuck, for as long as it is neither."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are for the main thread
    ping = protocol.encode(Ping())
    with contextlib.suppress(OSError):  # the worker is gone, which the main thread finds out as well
        while True:
            connection.send_bytes(ping)
            time.sleep(PING_INTERVAL)


class ShapeServer:
    """Serves one shape over one Connection, in the main thread."""

    def __init__(self, connection: Connection, started: float, inherited: Sequence[int]) -> None:
        """`inherited`: descriptors of the memory where the pixels of a job's pictures are, and of what Assign says."""
        self._connection = connection
        self._started = started
        self._slate, *self._others = inherited
        self._pixels: list[memoryview] = []
        self._busy = False
        self._stopping = False
        self._rank = 0
        self._video = VideoSettings()

    def run(self, assign: Assign) -> None:
        """Returns after SIGTERM or a fatal error. Raises ParentGone."""
        signal.signal(signal.SIGTERM, self._on_sigterm)
        try:
            generator, ready = self._start(assign)
        except Exception as error:
            traceback.print_exc()
            kind = _kind(error)
            broken = Broken(
                kind=kind if kind in ("oom", "compile") else "failed",
                error=_text(error),
                memory=_memory_after_failure(error, 0) if kind == "oom" else None,
            )
            self._send(broken)
            return
        self._send(ready)
        while not self._stopping:
            message = self._receive()
            if isinstance(message, Generate) and not self._serve(generator, message):
                return

    def _start(self, assign: Assign) -> tuple[Generator, Ready]:
        from ltx2_pool.model import engine

        imported = time.monotonic()
        self._video, self._rank = assign.recipe.video, assign.rank
        if len(self._others) != assign.borrow + (assign.recipe.gpus > 1):
            raise protocol.ProtocolError(f"{len(self._others)} descriptors are not what the start message says")
        modules = None
        if assign.borrow:
            from ltx2_pool.model.weights import borrow

            modules = borrow(socket.socket(fileno=self._others.pop(0)))
        rank = engine.Rank(assign.rank, assign.recipe.gpus, *self._others)
        generator = engine.build_generator(assign.recipe, modules, rank)
        loaded = time.monotonic()
        if assign.picture_sizes:
            slate = mmap.mmap(self._slate, 0, prot=mmap.PROT_READ)
            each = pixel_bytes(assign.picture_sizes)
            self._pixels = [memoryview(slate)[begin : begin + each] for begin in range(0, len(slate), each)]
        for job in assign.warm_up:
            generator.generate(job, pixels=self._pixels)
        warm = time.monotonic()
        trace_s = engine.seconds_compiling()
        engine.trim_memory()
        memory = engine.memory(generator.weights_bytes)
        return generator, Ready(
            import_s=imported - self._started,
            load_s=loaded - imported,
            trace_s=trace_s,
            warm_s=max(0.0, warm - loaded - trace_s),
            memory=memory.model_copy(update={"generated": bool(assign.warm_up)}),
        )

    def _serve(self, generator: Generator, message: Generate) -> bool:
        """Answer one job. False when this process must not serve another."""
        self._busy = True
        try:
            answer = self._answer(generator, message)
            self._send(answer)
        finally:
            self._busy = False
        return isinstance(answer, Done) or answer.kind in ("refused", "soft", "cancelled")

    def _answer(self, generator: Generator, message: Generate) -> Done | Failed:
        """Make the video. Whatever the outcome, the memory that it took is given back before it is told."""
        from ltx2_pool.model import engine, mp4

        job = message.job
        phases: list[tuple[str, float]] = []

        def on_phase(phase: str) -> None:
            phases.append((phase, time.monotonic()))
            self._send(Phase(job_id=job.id, phase=phase))

        def on_step(done: int, total: int) -> None:
            if generator.agreed(self._cancelled(job.id)):
                raise engine.Cancelled
            self._send(Step(job_id=job.id, done=done, total=total))

        before = engine.compiled_so_far()
        output: int | None = None
        sample_rate = 0
        try:
            # First, because a directory that is gone or full must not cost the device a video.
            output = self._open(generator, message.output)
            if output is None:
                generator.generate(job, None, on_phase, on_step, self._pixels)
            else:
                # FFmpeg opens it again by its descriptor (it moves the index to the front in the end), so that nobody
                # can put another file in its place meanwhile.
                with mp4.Encoder(Path(f"/proc/self/fd/{output}"), job, self._video) as encoder:
                    generator.generate(job, encoder, on_phase, on_step, self._pixels)
                    engine.trim_memory()  # before "encode" is said: the device is another job's then
                    on_phase("encode")
                    encoder.finish()
                sample_rate = encoder.sample_rate
        except engine.Cancelled as error:
            kind: Kind = "cancelled"
            text = "cancelled"
            memory = _memory_after_failure(error, generator.weights_bytes)
        except Exception as error:
            traceback.print_exc()
            # Where the worker has just made the file. A new process is confined to the directories of now.
            barred = output is None and isinstance(error, PermissionError)
            kind, text = "barred" if barred else _kind(error), _text(error)
            memory = _memory_after_failure(error, generator.weights_bytes)
        else:
            ends = [begin for _, begin in phases[1:]] + [time.monotonic()]
            engine.trim_memory()
            return Done(
                job_id=job.id,
                sample_rate=sample_rate,
                phases={name: end - begin for (name, begin), end in zip(phases, ends, strict=True)},
                compiled=engine.compiled_so_far().since(before),
                memory=engine.memory(generator.weights_bytes),
            )
        finally:
            if output is not None:
                os.close(output)
        return Failed(job_id=job.id, kind=kind, error=text, memory=memory)

    def _open(self, generator: Generator, path: str) -> int | None:
        """The job's file, in rank 0; the other ranks have none. All wait here until it is open.

        The worker has made it, and removes it; another one, or a link in its place, is not written to. Raises OSError;
        in the other ranks Cancelled.
        """
        from ltx2_pool.model import engine

        output: int | None = None
        failed: OSError | None = None
        if self._rank == 0:
            try:
                output = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError as error:
                failed = error
        if generator.agreed(failed is not None):
            raise failed or engine.Cancelled
        return output

    def _cancelled(self, job_id: str) -> bool:
        while self._connection.poll(0):
            message = self._receive()
            if isinstance(message, Cancel) and message.job_id == job_id:
                return True
        return False

    def _receive(self) -> protocol.FromParent:
        try:
            payload = self._connection.recv_bytes(protocol.MAX_MESSAGE)
        except (EOFError, OSError) as error:
            raise ParentGone from error
        return protocol.decode_from_parent(payload)

    def _send(self, message: protocol.FromChild) -> None:
        try:
            self._connection.send_bytes(protocol.encode(message))
        except OSError as error:
            raise ParentGone from error

    def _on_sigterm(self, _number: int, _frame: FrameType | None) -> None:
        """Idle: exit now. Generating: finish the job first; the parent's SIGKILL bounds that."""
        self._stopping = True
        if not self._busy:
            _exit(0)


def _kind(error: Exception) -> Kind:
    """What an error means for this process, as far as the engine could be loaded."""
    if isinstance(error, MemoryError):
        return "oom"
    engine = sys.modules.get("ltx2_pool.model.engine")
    if engine is None:
        return "soft"
    for kind, applies in (
        ("oom", engine.is_out_of_memory),
        ("fatal", engine.is_fatal),
        ("compile", engine.is_compile_failure),
        ("refused", engine.is_refusal),
    ):
        if applies(error):
            return kind  # type: ignore[return-value]  # the literals above
    return "soft"


def _text(error: Exception) -> str:
    """``ExceptionClass: message``, with the root of it where the message hides it."""
    text = f"{type(error).__name__}: {error}"[:_MAX_ERROR]
    root: BaseException = error
    while (deeper := root.__cause__ or root.__context__) is not None:
        root = deeper
    if isinstance(root, OSError) and str(root) not in text:
        text += f" (because of {type(root).__name__}: {root})"[:_MAX_ERROR]
    return text


def _memory_after_failure(error: Exception, weights_bytes: int) -> Memory | None:
    """Give back what a failed job took, and say what is left; None when a broken device does not tell."""
    from ltx2_pool.model import engine

    seen: set[int] = set()
    chained: BaseException | None = error
    while chained is not None and id(chained) not in seen:
        seen.add(id(chained))
        traceback.clear_frames(chained.__traceback__)  # their locals are the tensors
        chained = chained.__cause__ or chained.__context__
    gc.collect()
    try:
        engine.trim_memory()
        return engine.memory(weights_bytes)
    except Exception:
        traceback.print_exc()
        return None


def _die_with_parent() -> None:
    # SIGKILL when the parent dies. The guard does the same for what this process starts.
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        _exit(1)


def _set_title(title: str) -> None:
    import setproctitle

    setproctitle.setproctitle(title)


def _exit(status: int) -> NoReturn:
    """Leave without the interpreter's teardown, which takes seconds with torch loaded."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
