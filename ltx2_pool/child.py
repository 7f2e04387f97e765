"""What runs in a shape process: take jobs from the Connection, one at a time, until told to stop.

Started as ``python -m ltx2_pool.child FD``, with the environment of :meth:`ltx2_pool.recipe.Recipe.environment`
already set. stdout and stderr are diagnostics: nothing that a library prints can touch the protocol.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from ltx2_pool import protocol
from ltx2_pool.protocol import Assign, Broken, Cancel, Done, Failed, Generate, Phase, Ready, Shutdown, Step

if TYPE_CHECKING:
    from ltx2_pool.engine import Generator

_PR_SET_PDEATHSIG = 1


def main() -> NoReturn:
    started = time.monotonic()
    _set_up_process()
    connection = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        ShapeServer(connection, started).run()
    _exit(0)


class ShapeServer:
    """Serves one shape over one Connection, in the main thread and without any other."""

    def __init__(self, connection: Connection, started: float) -> None:
        self._connection = connection
        self._started = started
        self._busy = False
        self._stopping = False

    def run(self) -> None:
        """Returns when told to shut down or after a fatal error. Raises EOFError when the parent is gone."""
        assign = self._receive()
        if not isinstance(assign, Assign):
            raise protocol.ProtocolError(f"expected an Assign first, got {assign.type}")
        _set_title(f"ltx2-pool: {assign.shape.key}")
        signal.signal(signal.SIGTERM, self._on_sigterm)
        try:
            from ltx2_pool import engine

            imported = time.monotonic()
            generator = engine.build_generator(assign.recipe)
        except Exception as error:
            traceback.print_exc()
            self._send(Broken(error=f"{type(error).__name__}: {error}"))
            return
        self._send(Ready(pid=os.getpid(), import_s=imported - self._started, load_s=time.monotonic() - imported))
        while not self._stopping:
            message = self._receive()
            if isinstance(message, Shutdown):
                return
            if isinstance(message, Generate) and not self._serve(generator, message, Path(assign.output_dir)):
                return

    def _serve(self, generator: Generator, message: Generate, output_dir: Path) -> bool:
        """Answer one job. False when this process must not serve another."""
        from ltx2_pool import engine, mp4

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
            fatal = engine.is_fatal(error)
            kind = "fatal" if fatal else "refused" if engine.is_refusal(error) else "soft"
            self._send(Failed(job_id=job.id, kind=kind, error=f"{type(error).__name__}: {error}"[:2000]))
            return not fatal
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


def _set_up_process() -> None:
    # SIGKILL when the parent dies. The guard does the same for what this process starts.
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        _exit(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
