"""The real child program over an engine that is made up: a pool can be driven, and broken, without a model.

Run ``python -m ltx2_pool.tools.imaginary FD [FD]`` in place of ``ltx2_pool.model.child``, or have a zygote fork `serve`.
The prompt of a job says how it misbehaves (`PROMPTS`), ``LTX2_IMAGINARY`` how a start does (`STARTS`).

``LTX2_IMAGINARY`` is a list such as ``64x64@9f=eof,weights=hang``; ``BEHAVIOUR:once:FILE`` misbehaves only while the
file is absent, and makes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socket
from typing import Any, NoReturn

import ltx2_pool.model
from ltx2_pool.model import child
from ltx2_pool.words import protocol
from ltx2_pool.words.protocol import Broken, Checked, Checksum, Compiled, Done, Lend, Lending, Memory
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job

PROMPTS = """
crash                    print a last word, then SIGSEGV, before the first phase
exit N                   exit with that status, before the first phase
kill                     SIGKILL, before the first phase
X once FILE              X only while FILE is absent, which it makes; SIGKILL is the X of ``crash``
die in PHASE             SIGSEGV in text, denoise, decode or encode
kill in PHASE            SIGKILL there
die when idle            make the video; SIGSEGV once it is delivered
stop                     SIGSTOP before the first phase
stop when idle           make the video; SIGSTOP once it is delivered
hang                     ignore SIGTERM and sleep
long [N]                 N (500) steps of 10 ms, which can be cancelled
until cancelled          steps without end
deaf to cancel           one step, then sleep
garbage, truncated, oversized, wrong id, desync      break the protocol
soft, refused, fatal, oom, compile                   raise such an error in denoise
compile no space         raise the error of a compiler without room on the disk
die and say TEXT         print TEXT, then exit with status 1 in denoise
chatter N                print N times 1000 characters
flood                    print 1 GB
gate FIFO, encode gate FIFO    wait until somebody has opened and closed it, in denoise or encode
no space                 ENOSPC in encode, with half a file written
huge                     a sparse file of 8 GiB
empty                    write nothing
link PATH                put a symbolic link to PATH in the video's place
no file                  remove the file
directory                put a directory in the video's place
fifo                     put a FIFO in the video's place
memory RESIDENT PEAK     report so many bytes
""".strip()

STARTS = """
eof                      print a last word, then exit with status 7
kill                     SIGKILL
broken                   no checkpoint
oom                      memory runs out
compile                  the compile cache is damaged
compile unless empty     so, if there is a file in the compile cache
no space                 no room to compile
hang                     never READY
deaf                     the same, without a ping
stop                     SIGSTOP
garbage                  break the protocol
desync                   Done instead of READY
gate/FIFO                wait until somebody has opened and closed it
memory RESIDENT PEAK     report so many bytes
""".strip()


class Cancelled(Exception):
    """As the engine's."""


class OutOfMemory(Exception):
    """Stands for torch.OutOfMemoryError."""


class DeviceFault(Exception):
    """Stands for torch.AcceleratorError."""


class CompileFailure(Exception):
    """Stands for torch's BackendCompilerFailed."""


class Refusal(Exception):
    """Stands for FastVideo's StageVerificationError."""


class LoadError(Exception):
    """As the engine's."""


_connection_fd = -1
_memory = Memory(resident=1 << 30, peak=2 << 30)
_wanted: tuple[int, int] | None = None
_shape = ""


@dataclass(frozen=True)
class Clip:
    """What a generation returns: who made it, and of what."""

    job: Job
    sample_rate: int = 24000


class Generator:
    """Makes videos as their prompts say."""

    weights_bytes = 0

    def generate(
        self,
        job: Job,
        on_phase: Callable[[str], None] = lambda _phase: None,
        on_step: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> Clip:
        """As the engine's."""
        if job.id == "warm-up":
            _start_behaviour(_shape, warm_up=True)
        prompt = _once(job.prompt)
        if prompt != job.prompt:
            job = Job(**{**vars(job), "prompt": prompt})
        _before(prompt, job)
        for phase in ("text", "denoise", "decode"):
            on_phase(phase)
            _in_phase(prompt, phase)
            if phase == "denoise":
                _denoise(prompt, job, on_step)
        return Clip(job)


def encode(clip: Clip, path: Path, comment: str = "") -> None:
    """As mp4's: the file says who made it."""
    prompt = clip.job.prompt
    _in_phase(prompt, "encode")
    place = Path(os.readlink(path)) if path.is_symlink() else path  # noqa: PTH115 - the name, as it is
    word, _, rest = prompt.partition(" ")
    if prompt.startswith("encode gate "):
        _wait_at(prompt.removeprefix("encode gate "))
    if prompt == "no space":
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if prompt == "huge":
        with path.open("wb") as file:
            file.truncate(8 << 30)
    elif prompt == "empty":
        pass
    elif prompt in ("no file", "directory", "fifo") or word == "link":
        place.unlink()
        if prompt == "directory":
            place.mkdir()
        elif prompt == "fifo":
            os.mkfifo(place)
        elif word == "link":
            place.symlink_to(rest)
    else:
        path.write_bytes(f"{clip.job.shape.key} by {os.getpid()}".encode())
    if prompt in ("die when idle", "stop when idle"):
        number = signal.SIGSEGV if prompt == "die when idle" else signal.SIGSTOP
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), number))
        signal.setitimer(signal.ITIMER_REAL, 0.2)


def build_generator(recipe: Recipe, modules: object = None) -> Generator:
    """As the engine's."""
    if recipe.model_path == "none there":
        raise LoadError("none there is not a checkpoint")
    return Generator()


def preload() -> None:
    """Nothing to preload."""


def seconds_compiling() -> float:
    """Nothing is compiled."""
    return 0.0


def trim_memory() -> None:
    """Says so, for tests to see."""
    print("trimmed", flush=True)


def memory(weights_bytes: int) -> Memory:
    """Made up, or as a prompt or a start said."""
    if _wanted is None:
        return _memory
    return Memory(resident=_wanted[0], peak=_wanted[1])


def device_total() -> int:
    """No device."""
    return 0


def compiled_so_far() -> Compiled:
    """Nothing is compiled."""
    return Compiled()


def is_out_of_memory(error: BaseException) -> bool:
    """As the engine's."""
    return isinstance(error, MemoryError | OutOfMemory)


def is_fatal(error: BaseException) -> bool:
    """As the engine's."""
    return isinstance(error, MemoryError | OutOfMemory | DeviceFault)


def is_compile_failure(error: BaseException) -> bool:
    """As the engine's."""
    return isinstance(error, CompileFailure)


def is_refusal(error: BaseException) -> bool:
    """As the engine's."""
    return isinstance(error, Refusal)


def borrow(desk: socket) -> dict[str, Any]:
    """As the weights module's: nothing is attached, but the weights process must be there."""
    import select

    if select.select([desk], [], [], 0)[0]:
        raise EOFError("the weights process is gone")
    return {}


class WeightsServer:
    """As the weights module's, with nothing to lend."""

    def __init__(self, connection: Connection, desk: socket, started: float) -> None:
        self._connection = connection
        self._desk = desk

    def run(self, lend: Lend) -> None:
        """As the weights module's."""
        try:
            _start_behaviour("weights")
        except Exception as error:
            self._send(Broken(error=f"{type(error).__name__}: {error}", kind="oom" if is_fatal(error) else "failed"))
            return
        self._send(Lending(import_s=0, load_s=0, bytes=1 << 30))
        while isinstance(protocol.decode_from_parent(self._connection.recv_bytes()), Checksum):
            self._send(Checked(digest="imaginary"))

    def _send(self, message: protocol.FromChild) -> None:
        self._connection.send_bytes(protocol.encode(message))


def serve(connection_fd: int, desk_fd: int | None = None) -> None:
    """As the child's."""
    global _connection_fd
    _connection_fd = connection_fd
    this = sys.modules[__name__]
    for name in ("engine", "mp4", "weights"):
        sys.modules[f"ltx2_pool.model.{name}"] = this
        setattr(ltx2_pool.model, name, this)
    if "=deaf" in os.environ.get("LTX2_IMAGINARY", ""):
        child._ping = lambda connection: None
    start = child.ShapeServer._start

    def misbehaving(server: child.ShapeServer, assign: protocol.Assign, desk: socket | None) -> Any:
        global _shape
        _shape = assign.shape.key
        print(f"an imaginary child of {_shape} starts", flush=True)
        _start_behaviour(_shape)
        return start(server, assign, desk)

    child.ShapeServer._start = misbehaving  # type: ignore[method-assign, assignment]
    child.serve(connection_fd, desk_fd)


def _start_behaviour(who: str, *, warm_up: bool = False) -> None:
    behaviours = dict(item.split("=", 1) for item in os.environ.get("LTX2_IMAGINARY", "").split(",") if item)
    behaviour = behaviours.get(who, "")
    if warm_up != (behaviour.partition(":")[0] in ("oom", "compile", "compile unless empty", "no space")):
        return
    behaviour, once, marker = behaviour.partition(":once:")
    if once and not _is_first(marker):
        return
    word, _, rest = behaviour.partition(" ")
    if behaviour == "eof":
        print("about to give up", file=sys.stderr, flush=True)
        os._exit(7)
    elif behaviour == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif behaviour == "broken":
        raise LoadError("no checkpoint")
    elif behaviour == "oom":
        raise OutOfMemory("CUDA out of memory on purpose")
    elif behaviour == "compile" or (behaviour == "compile unless empty" and _cached()):
        raise CompileFailure("backend='inductor' raised: a cache file is damaged on purpose")
    elif behaviour == "no space":
        raise CompileFailure("backend='inductor' raised: OSError: [Errno 28] No space left on device")
    elif behaviour in ("hang", "deaf"):
        time.sleep(600)
    elif behaviour == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif behaviour == "garbage":
        _raw(protocol.frame(b"\x80\x04not json"))
        time.sleep(600)
    elif behaviour == "desync":
        _raw(protocol.frame(protocol.encode(_done("none"))))
        time.sleep(600)
    elif behaviour.startswith("gate/"):
        _wait_at(behaviour.removeprefix("gate"))
    elif word == "memory":
        _report(rest)


def _cached() -> bool:
    root = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    return root.is_dir() and any(root.iterdir())


def _before(prompt: str, job: Job) -> None:
    """What happens before the first phase."""
    word, _, rest = prompt.partition(" ")
    if prompt == "crash":
        print("a last word before the crash", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    elif prompt == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif prompt == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif prompt == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("ignores SIGTERM", flush=True)
        time.sleep(600)
    elif prompt == "garbage":
        _raw(protocol.frame(b"{}"))
        time.sleep(600)
    elif prompt == "truncated":
        _raw(struct.pack("!i", 100) + b"only a part")
        os._exit(0)
    elif prompt == "oversized":
        _raw(struct.pack("!i", 1 << 30))
        time.sleep(600)
    elif prompt == "wrong id":
        _raw(protocol.frame(protocol.encode(_done("another"))))
        time.sleep(600)
    elif prompt == "desync":
        _raw(protocol.frame(protocol.encode(Checked(digest="unasked"))))
        time.sleep(600)
    elif word == "exit":
        os._exit(int(rest))
    elif word == "memory":
        _report(rest)


def _in_phase(prompt: str, phase: str) -> None:
    if prompt == f"die in {phase}":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif prompt == f"kill in {phase}":
        os.kill(os.getpid(), signal.SIGKILL)


def _denoise(prompt: str, job: Job, on_step: Callable[[int, int], None]) -> None:
    word, _, rest = prompt.partition(" ")
    raised: dict[str, Exception] = {
        "soft": RuntimeError("soft on purpose"),
        "refused": Refusal("refused on purpose"),
        "fatal": DeviceFault("CUDA error: fatal on purpose"),
        "oom": OutOfMemory("CUDA out of memory on purpose"),
        "compile": CompileFailure("backend='inductor' raised: a cache file is damaged on purpose"),
        "compile no space": CompileFailure("backend='inductor' raised: OSError: [Errno 28] No space left on device"),
    }
    if prompt in raised:
        raise raised[prompt]
    if prompt.startswith("die and say "):
        print(prompt.removeprefix("die and say "), flush=True)
        os._exit(1)
    if prompt == "until cancelled" or word == "long":
        total = int(rest) if word == "long" and rest else 500
        step = 0
        while prompt == "until cancelled" or step < total:
            on_step(min(step, total), total)
            time.sleep(0.01)
            step += 1
        return
    on_step(0, job.steps)
    if prompt == "deaf to cancel":
        time.sleep(600)
    elif prompt.startswith("gate /"):
        _wait_at(prompt.removeprefix("gate "))
    elif word == "chatter":
        for _ in range(int(rest) * 10):
            sys.stdout.write("x" * 99 + "\n")
        sys.stdout.flush()
    elif prompt == "flood":
        chunk = b"y" * (1 << 16) + b"\n"
        for _ in range((1 << 30) // len(chunk)):
            os.write(1, chunk)


def _once(prompt: str) -> str:
    """The prompt, or a harmless one the second time."""
    behaviour, once, marker = prompt.partition(" once ")
    if not once:
        return prompt
    if not _is_first(marker):
        return "fine"
    return "kill" if behaviour == "crash" else behaviour


def _is_first(marker: str) -> bool:
    with contextlib.suppress(FileExistsError):
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        return True
    return False


def _report(numbers: str) -> None:
    global _wanted
    resident, peak = map(int, numbers.split())
    _wanted = resident, peak


def _wait_at(fifo: str) -> None:
    with Path(fifo).open("rb") as gate:
        gate.read()


def _done(job_id: str) -> Done:
    return Done(job_id=job_id, sample_rate=0, phases={}, compiled=Compiled(), memory=_memory)


def _raw(data: bytes) -> None:
    os.write(_connection_fd, data)


def main() -> NoReturn:
    """As the child's."""
    child._die_with_parent()
    serve(*map(int, sys.argv[1:]))
    child._exit(0)


if __name__ == "__main__":
    # Under its real name, so that the child and the zygote find the same module.
    from ltx2_pool.tools import imaginary

    imaginary.main()
