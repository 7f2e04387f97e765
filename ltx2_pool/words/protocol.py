"""The messages between the worker and its children, and their framing on the Connection.

The transport is a ``multiprocessing.Connection`` over an inherited socket pair. The child uses the Connection itself;
the parent reads the same frames from its event loop: a 4-byte big-endian signed length, then the payload (CPython
Lib/multiprocessing/connection.py: Connection._send_bytes). Payloads are JSON, never pickle, so that nothing a child
sends can run code in the parent. Videos do not travel here: a child writes a file and names it.
"""

from __future__ import annotations

import struct
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ltx2_pool.words.pictures import Size
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import Key

HEADER = struct.Struct("!i")
MAX_MESSAGE = 4 << 20
"""Bytes. Two prompts of the longest kind, all escaped, need a third of it; a longer message is no message."""
PING_INTERVAL = 1.0
"""Seconds between two pings of a child."""


class ProtocolError(Exception):
    """The peer sent something that is not one of the messages below."""


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Assign(_Message):
    """Parent to child, first and once: the key that the process is pinned to for life.

    Its second inherited descriptor is memory in which it finds the pixels of a job's pictures. One rank of a gang has
    memory in which the ranks find each other as its last.
    """

    type: Literal["assign"] = "assign"
    key: Key
    recipe: Recipe
    picture_sizes: tuple[Size, ...] = ()
    """At which a picture lies in that memory, one after the other; then the next picture."""
    warm_up: tuple[Job, ...] = ()
    """Videos to make and throw away before READY, so that the shape is hot then."""
    borrow: bool = False
    """Borrow the weights over the third inherited descriptor instead of loading the checkpoint."""
    rank: int = 0
    """Of this process in a gang of as many as the recipe has GPUs."""


class Lending(_Message):
    """Weights process to parent: the model is loaded and can be borrowed."""

    type: Literal["lending"] = "lending"
    import_s: float
    load_s: float
    bytes: int
    """Of all lent tensors."""
    overhead: int = 0
    """Bytes of device memory that the weights process takes beside the tensors; 0 on a CPU."""
    durable: bool = False
    """What is lent is there for as long as somebody has its descriptors, whatever becomes of the weights process."""


class Lend(_Message):
    """Parent to child, first and once: load the checkpoint and lend it over the second inherited descriptor."""

    type: Literal["lend"] = "lend"
    recipes: tuple[Recipe, ...]
    """Of all borrowers."""
    kept: Lending | None = None
    """Load nothing: go on lending what a process before lent. It comes over the second inherited descriptor first."""


class Checksum(_Message):
    """Parent to the weights process: answer with Checked."""

    type: Literal["checksum"] = "checksum"


class Generate(_Message):
    """Parent to child: make this video and write it to the file that the parent has made for this attempt.

    All ranks of a gang are told, and answer; rank 0 alone has a video, and writes it.
    """

    type: Literal["generate"] = "generate"
    job: Job
    output: str
    """Path of an empty file, to be opened without following links."""
    # The pixels of its pictures are in the memory that the process has from its start.


class Cancel(_Message):
    """Parent to child: stop that job before its next denoise step. Answered by Failed(kind="cancelled") or Done."""

    type: Literal["cancel"] = "cancel"
    job_id: str


class Compiled(_Message):
    """Look-ups in the compile caches (torch._dynamo.utils.counters). A hot shape makes none, a baked one no misses."""

    graph_hits: int = 0
    """Inductor FX-graph cache."""
    graph_misses: int = 0
    autograd_hits: int = 0
    """AOT-autograd cache."""
    autograd_misses: int = 0
    bypasses: int = 0
    """Graphs that a cache declined to handle, so that they are compiled every time."""

    def since(self, earlier: Compiled) -> Compiled:
        """The look-ups made after `earlier`."""
        return Compiled(**{name: getattr(self, name) - getattr(earlier, name) for name in type(self).model_fields})

    @property
    def misses(self) -> int:
        return self.graph_misses + self.autograd_misses + self.bypasses


class Memory(_Message):
    """Bytes that a process needs for itself, whatever it borrows: device memory, on a CPU main memory.

    Whatever other processes do: on a GPU what its allocator holds and its context (NVML, where it tells), on a CPU the
    proportional set size (Linux Documentation/filesystems/proc.rst: smaps_rollup).
    """

    resident: int = Field(ge=0)
    """Between two jobs."""
    peak: int = Field(ge=0)
    """At most, in its last job or warm-up."""
    encoding: int | None = None
    """While it encodes; None: as much as the peak."""
    weights: int = 0
    """Of the model, when the process loaded its own; not counted above."""
    generated: bool = True
    """False when it has made no video yet: the peak is then that of its start."""


class Ready(_Message):
    """Child to parent: jobs are welcome. Seconds that each phase of its start took."""

    type: Literal["ready"] = "ready"
    import_s: float
    """Imports; none in a fork of the zygote."""
    load_s: float
    """Loading the checkpoint, or attaching the lent weights, and building the pipeline."""
    trace_s: float = 0
    """Of the warm-up video: torch.compile, from tracing to loading or compiling kernels."""
    warm_s: float = 0
    """The rest of the warm-up video."""
    memory: Memory


class Checked(_Message):
    """Weights process to parent: a digest of every byte that it lends."""

    type: Literal["checked"] = "checked"
    digest: str


class Phase(_Message):
    """Child to parent: the job entered a phase (text, denoise, decode, encode)."""

    type: Literal["phase"] = "phase"
    job_id: str
    phase: str


class Step(_Message):
    """Child to parent: `done` of `total` denoise steps are behind the job."""

    type: Literal["step"] = "step"
    job_id: str
    done: int
    total: int


class Done(_Message):
    """Child to parent: the video is in the file."""

    type: Literal["done"] = "done"
    job_id: str
    sample_rate: int
    """Hz of the audio track, 0 without one."""
    phases: dict[str, float]
    """Seconds spent in each phase."""
    compiled: Compiled
    """What torch.compile had to do for this video."""
    memory: Memory


class Failed(_Message):
    """Child to parent: no video. The child serves on after ``refused``, ``soft`` and ``cancelled``, else it ends."""

    type: Literal["failed"] = "failed"
    job_id: str
    kind: Literal["refused", "soft", "cancelled", "fatal", "oom", "compile", "barred"]
    """``refused`` is soft too: the pipeline did not accept the parameters, so the client can correct them.

    ``barred``: this process may not write the file, as one that is confined to a directory that has since been made
    again; a process that starts now may.
    """
    error: str
    """``ExceptionClass: message``."""
    memory: Memory | None = None
    """What it holds after it has given back what it could; None when it could not tell."""


class Ping(_Message):
    """Child to parent, every `PING_INTERVAL` from its first moment to its last: it is not stopped and not stuck."""

    type: Literal["ping"] = "ping"


class Broken(_Message):
    """Child to parent: the process could not start, and why. Its last message."""

    type: Literal["broken"] = "broken"
    error: str
    kind: Literal["failed", "oom", "compile"] = "failed"
    """``compile``: torch.compile failed in the warm-up video, as it does on damaged cache files."""
    memory: Memory | None = None


FromParent = Assign | Lend | Generate | Cancel | Checksum
FromChild = Ping | Ready | Lending | Checked | Phase | Step | Done | Failed | Broken

_M = TypeVar("_M")

_from_parent: TypeAdapter[FromParent] = TypeAdapter(Annotated[FromParent, Field(discriminator="type")])
_from_child: TypeAdapter[FromChild] = TypeAdapter(Annotated[FromChild, Field(discriminator="type")])


def encode(message: FromParent | FromChild) -> bytes:
    """The payload of a frame."""
    return message.model_dump_json().encode()


def frame(payload: bytes) -> bytes:
    """A payload as ``Connection.recv_bytes`` expects it."""
    return HEADER.pack(len(payload)) + payload


def payload_length(header: bytes) -> int:
    """The length that a frame's header announces. Raises ProtocolError when no message can be that long."""
    (length,) = HEADER.unpack(header)
    if not 0 < length <= MAX_MESSAGE:
        raise ProtocolError(f"a frame of {length} bytes was announced (at most {MAX_MESSAGE} are allowed)")
    return int(length)


def decode_from_child(payload: bytes) -> FromChild:
    """Raises ProtocolError."""
    return _decode(_from_child, payload)


def decode_from_parent(payload: bytes) -> FromParent:
    """Raises ProtocolError."""
    return _decode(_from_parent, payload)


def _decode(adapter: TypeAdapter[_M], payload: bytes) -> _M:
    try:
        return adapter.validate_json(payload)
    except ValidationError as error:
        raise ProtocolError(f"not a message: {payload[:80]!r}: {error.errors()[0]['msg']}") from error
