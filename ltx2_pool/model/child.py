"""What runs in a shape process: take jobs from the Connection, one at a time, until told to stop.

Started as ``python -m ltx2_pool.model.child FD [FD]``, or forked from the zygote, with the environment of
:meth:`ltx2_pool.words.recipe.Recipe.environment` already set. The first message on the Connection, the first descriptor, says
whether this becomes a shape process or the weights process; the second descriptor leads from one to the other. stdout
and stderr are diagnostics: nothing that a library prints can touch the protocol.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal, NoReturn

from ltx2_pool.words import protocol
from ltx2_pool.words.protocol import Assign, Broken, Cancel, Done, Failed, Generate, Lend, Phase, Ready, Shutdown, Step

if TYPE_CHECKING:
    from ltx2_pool.model.engine import Generator

_PR_SET_PDEATHSIG = 1


def main() -> NoReturn:
    """A fresh interpreter: the worker is the parent."""
    _die_with_parent()
    serve(*map(int, sys.argv[1:]))
    _exit(0)


def serve(connection_fd: int, desk_fd: int | None = None) -> None:
    """Serve over those descriptors until told to stop; also what a fork of the zygote runs."""
    started = time.monotonic()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(connection_fd)
    desk = None if desk_fd is None else socket.socket(fileno=desk_fd)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        first = protocol.decode_from_parent(connection.recv_bytes(protocol.MAX_MESSAGE))
        if isinstance(first, Assign):
            _set_title(f"ltx2 {first.shape.key}")
            ShapeServer(connection, started).run(first, desk)
        elif isinstance(first, Lend) and desk is not None:
            _set_title("ltx2-weights")
            from ltx2_pool.model.weights import WeightsServer

            WeightsServer(connection, desk, started).run(first)
        else:
            raise protocol.ProtocolError(f"expected an Assign or a Lend first, got {first.type}")


class ShapeServer:
    """Serves one shape over one Connection, in the main thread and without any other."""

    def __init__(self, connection: Connection, started: float) -> None:
        self._connection = connection
        self._started = started
        self._busy = False
        self._stopping = False

    def run(self, assign: Assign, desk: socket.socket | None) -> None:
        """Returns when told to shut down or after a fatal error. Raises EOFError when the parent is gone."""
        signal.signal(signal.SIGTERM, self._on_sigterm)
        try:
            generator, ready = self._start(assign, desk)
        except Exception as error:
            traceback.print_exc()
            self._send(Broken(error=f"{type(error).__name__}: {error}"[:2000], compile=_is_compile_failure(error)))
            return
        self._send(ready)
        while not self._stopping:
            message = self._receive()
            if isinstance(message, Shutdown):
                return
            if isinstance(message, Generate) and not self._serve(generator, message, Path(assign.output_dir)):
                return

    def _start(self, assign: Assign, desk: socket.socket | None) -> tuple[Generator, Ready]:
        from ltx2_pool.model import engine

        imported = time.monotonic()
        modules = None
        if assign.borrow:
            from ltx2_pool.model.weights import borrow

            if desk is None:
                raise protocol.ProtocolError("told to borrow the weights, but without a socket to their process")
            modules = borrow(desk)
        generator = engine.build_generator(assign.recipe, modules)
        loaded = time.monotonic()
        if assign.warm_up is not None:
            generator.generate(assign.warm_up)
        warm = time.monotonic()
        trace_s = engine.seconds_compiling()
        engine.trim_memory()
        return generator, Ready(
            pid=os.getpid(),
            import_s=imported - self._started,
            load_s=loaded - imported,
            trace_s=trace_s,
            warm_s=warm - loaded - trace_s,
            memory=engine.memory(generator.weights_bytes),
        )

    def _serve(self, generator: Generator, message: Generate, output_dir: Path) -> bool:
        """Answer one job. False when this process must not serve another."""
        from ltx2_pool.model import engine, mp4

        job = message.job
        phases: list[tuple[str, float]] = []

        def on_phase(phase: str) -> None:
            phases.append((phase, time.monotonic()))
            self._send(Phase(job_id=job.id, phase=phase))

        def on_step(done: int, total: int) -> None:
            if self._cancelled(job.id):
                raise engine.Cancelled
            self._send(Step(job_id=job.id, done=done, total=total))

        path = output_dir / f"{job.id}.mp4"
        before = engine.compiled_so_far()
        self._busy = True
        try:
            clip = generator.generate(job, on_phase, on_step)
            on_phase("encode")
            engine.trim_memory()  # the GPU is another job's now
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600))
            mp4.encode(clip, path, job.comment)
            size = path.stat().st_size
        except engine.Cancelled:
            self._send(Failed(job_id=job.id, kind="cancelled", error="cancelled"))
            return True
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except Exception as error:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            traceback.print_exc()
            kind: Literal["fatal", "compile", "refused", "soft"] = (
                "fatal" if engine.is_fatal(error)
                else "compile" if engine.is_compile_failure(error)
                else "refused" if engine.is_refusal(error)
                else "soft"
            )  # fmt: skip
            self._send(Failed(job_id=job.id, kind=kind, error=f"{type(error).__name__}: {error}"[:2000]))
            return kind in ("refused", "soft")
        finally:
            self._busy = False
        ends = [begin for _, begin in phases[1:]] + [time.monotonic()]
        self._send(
            Done(
                job_id=job.id,
                size=size,
                sample_rate=clip.sample_rate,
                phases={name: end - begin for (name, begin), end in zip(phases, ends, strict=True)},
                compiled=engine.compiled_so_far().since(before),
                memory=engine.memory(generator.weights_bytes),
            )
        )
        return True

    def _cancelled(self, job_id: str) -> bool:
        while self._connection.poll(0):
            message = self._receive()
            if isinstance(message, Cancel) and message.job_id == job_id:
                return True
            if isinstance(message, Shutdown):
                self._stopping = True
        return False

    def _receive(self) -> protocol.FromParent:
        return protocol.decode_from_parent(self._connection.recv_bytes(protocol.MAX_MESSAGE))

    def _send(self, message: protocol.FromChild) -> None:
        self._connection.send_bytes(protocol.encode(message))

    def _on_sigterm(self, _number: int, _frame: FrameType | None) -> None:
        """Idle: exit now. Generating: finish the job first; the parent's SIGKILL bounds that."""
        self._stopping = True
        if not self._busy:
            _exit(0)


def _is_compile_failure(error: Exception) -> bool:
    engine = sys.modules.get("ltx2_pool.model.engine")
    return engine is not None and bool(engine.is_compile_failure(error))


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
