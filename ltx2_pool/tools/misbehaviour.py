"""How an imaginary child misbehaves: what a prompt and ``LTX2_IMAGINARY`` can ask for."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ltx2_pool.words import protocol
from ltx2_pool.words.protocol import Checked, Compiled, Done, Memory
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
deaf when idle           make the video, and ignore SIGTERM from then on
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
rank N: X | Y            X in that rank of a gang, Y in the others
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


@dataclass
class Child:
    """What is known of this process."""

    connection_fd: int = -1
    shape: str = ""
    rank: int = 0
    """In its gang."""
    seen: list[str] = field(default_factory=list)
    """Digests of the pixels of the job's pictures."""
    memory: Memory = field(default_factory=lambda: Memory(resident=1 << 30, peak=2 << 30))
    """What it says that it holds."""


child = Child()


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


def start(who: str, *, warm_up: bool = False) -> None:
    """What the start of a shape's process, or of the weights process, was told to do, and when."""
    behaviours = dict(item.split("=", 1) for item in os.environ.get("LTX2_IMAGINARY", "").split(",") if item)
    behaviour = behaviours.get(f"{who} on {os.environ.get('LTX2_DEVICES')}", behaviours.get(who, ""))
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


def before(prompt: str) -> None:
    """What a prompt does before the first phase."""
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


def in_phase(prompt: str, phase: str) -> None:
    """What a prompt does as soon as a phase was announced."""
    if prompt == f"die in {phase}":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif prompt == f"kill in {phase}":
        os.kill(os.getpid(), signal.SIGKILL)


def denoise(prompt: str, steps: int, on_step: Callable[[int, int], None]) -> None:
    """The steps of a video, and what a prompt does instead or after the first."""
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
    on_step(0, steps)
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


def of_rank(prompt: str) -> str:
    """What a prompt asks of this rank."""
    if not prompt.startswith("rank "):
        return prompt
    whose, _, what = prompt.removeprefix("rank ").partition(": ")
    one, _, others = what.partition(" | ")
    return one if int(whose) == child.rank else others


def once(prompt: str) -> str:
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
    resident, peak = map(int, numbers.split())
    child.memory = Memory(resident=resident, peak=peak)


def _wait_at(fifo: str) -> None:
    with Path(fifo).open("rb") as gate:
        gate.read()


def _done(job_id: str) -> Done:
    return Done(job_id=job_id, sample_rate=0, phases={}, compiled=Compiled(), memory=child.memory)


def _raw(data: bytes) -> None:
    os.write(child.connection_fd, data)


def encode(job: Job, path: Path) -> None:
    """Write the video, or what a prompt wants in its place: the file says who made it."""
    prompt = job.prompt
    in_phase(prompt, "encode")
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
        path.write_bytes(" ".join([job.shape.key, "by", str(os.getpid()), *child.seen]).encode())
    if prompt == "deaf when idle":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if prompt in ("die when idle", "stop when idle"):
        number = signal.SIGSEGV if prompt == "die when idle" else signal.SIGSTOP
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), number))
        signal.setitimer(signal.ITIMER_REAL, 0.2)
