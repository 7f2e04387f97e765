"""The real child program over an engine that is made up: a pool can be driven, and broken, without a model.

Run ``python -m ltx2_pool.tools.imaginary [--confined] FD [FD]`` in place of ``ltx2_pool.model.child``, or have a zygote
fork `serve` or `serve_confined`. The prompt of a job says how it misbehaves, ``LTX2_IMAGINARY`` how a start does: both
are listed in :mod:`ltx2_pool.tools.misbehaviour`. Confined, it is kept out of the other caches as a real child is, and
can make no file directly in a directory on the way to them, whatever those lists say.

``LTX2_IMAGINARY`` is a list such as ``64x64@9f=eof,weights=hang``; ``BEHAVIOUR:once:FILE`` misbehaves only while the
file is absent, and makes it. ``weights on cpu:1=hang`` is meant for one device, and wins.
"""

from __future__ import annotations

import hashlib
import os
import select
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socket
from typing import Any, NoReturn

import ltx2_pool.model
from ltx2_pool.model import child
from ltx2_pool.tools import misbehaviour
from ltx2_pool.tools.misbehaviour import CompileFailure, DeviceFault, LoadError, OutOfMemory, Refusal
from ltx2_pool.words import protocol
from ltx2_pool.words.protocol import Broken, Checked, Checksum, Compiled, Lend, Lending, Memory
from ltx2_pool.words.recipe import Recipe, VideoSettings
from ltx2_pool.words.requests import Job


class Cancelled(Exception):
    """As the engine's."""


class Encoder:
    """As mp4's: writes what the prompt says."""

    sample_rate = 24000

    def __init__(self, path: Path, job: Job, settings: VideoSettings) -> None:
        self._path = path
        self._job = job

    def finish(self) -> None:
        """As mp4's."""
        misbehaviour.encode(self._job, self._path)

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass


class Generator:
    """Makes videos as their prompts say."""

    weights_bytes = 0

    def agreed(self, stop: bool) -> bool:
        """As the engine's; but each rank knows itself only."""
        return stop

    def generate(
        self,
        job: Job,
        sink: Encoder | None = None,
        on_phase: Callable[[str], None] = lambda _phase: None,
        on_step: Callable[[int, int], None] = lambda _done, _total: None,
        pixels: Sequence[memoryview] = (),
    ) -> None:
        """As the engine's."""
        misbehaviour.child.seen = [
            hashlib.sha256(given).hexdigest() for _, given in zip(job.pictures, pixels, strict=False)
        ]
        if job.id == "warm-up":
            misbehaviour.start(misbehaviour.child.shape, warm_up=True)
        prompt = misbehaviour.once(misbehaviour.of_rank(job.prompt))
        if prompt != job.prompt:
            job = Job(**{**vars(job), "prompt": prompt})
        misbehaviour.before(prompt)
        for phase in ("text", "denoise", "decode"):
            on_phase(phase)
            misbehaviour.in_phase(prompt, phase)
            if phase == "denoise":
                misbehaviour.denoise(prompt, job.steps, on_step)
        if sink is not None:
            sink._job = job


@dataclass(frozen=True)
class Rank:
    """As the engine's."""

    number: int = 0
    size: int = 1
    rendezvous: int | None = None


def build_generator(recipe: Recipe, modules: object = None, rank: Rank | None = None) -> Generator:
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
    return misbehaviour.child.memory


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
            misbehaviour.start("weights")
        except Exception as error:
            self._send(Broken(error=f"{type(error).__name__}: {error}", kind="oom" if is_fatal(error) else "failed"))
            return
        self._send(Lending(import_s=0, load_s=0, bytes=1 << 30))
        while isinstance(protocol.decode_from_parent(self._connection.recv_bytes()), Checksum):
            self._send(Checked(digest="imaginary"))

    def _send(self, message: protocol.FromChild) -> None:
        self._connection.send_bytes(protocol.encode(message))


def serve(connection_fd: int, *others: int, confined: bool = False) -> None:
    """As the child's, which is always confined."""
    misbehaviour.child.connection_fd = connection_fd
    this = sys.modules[__name__]
    for name in ("engine", "mp4", "weights"):
        sys.modules[f"ltx2_pool.model.{name}"] = this
        setattr(ltx2_pool.model, name, this)
    if "=deaf" in os.environ.get("LTX2_IMAGINARY", ""):
        child._ping = lambda connection: None
    if not confined:  # markers and videos are beside the caches of a test
        child.confine_to_cache = lambda environ: False
    start = child.ShapeServer._start

    def misbehaving(server: child.ShapeServer, assign: protocol.Assign) -> Any:
        shape = misbehaviour.child.shape = str(assign.key)
        misbehaviour.child.rank = assign.rank
        print(f"an imaginary child of {shape} starts", flush=True)
        misbehaviour.start(shape)
        return start(server, assign)

    child.ShapeServer._start = misbehaving  # type: ignore[method-assign, assignment]
    child.serve(connection_fd, *others)


def serve_confined(connection_fd: int, *others: int) -> None:
    """As the child's; for a zygote that forks it."""
    serve(connection_fd, *others, confined=True)


def main() -> NoReturn:
    """As the child's."""
    child._die_with_parent()
    arguments = sys.argv[1:]
    confined = arguments[0] == "--confined"
    serve(*map(int, arguments[confined:]), confined=confined)
    child._exit(0)


if __name__ == "__main__":
    # Under its real name, so that the child and the zygote find the same module.
    from ltx2_pool.tools import imaginary

    imaginary.main()
