"""How a job, and how a process, can end. Every outcome has one place: here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ltx2_pool.words.protocol import Memory, Phase, Step
from ltx2_pool.words.shapes import Key

OnEvent = Callable[[Phase | Step], None]
"""Told what a job is doing while it runs."""

Reason = Literal[
    "spawn_timeout",
    "spawn_eof",
    "spawn_parse_error",
    "gen_timeout",
    "gen_eof",
    "cuda_fault",
    "parse_error",
    "desync",
    "compile",
    "oom",
    "killed",
    "silent",
    "send_failed",
    "cancel_timeout",
    "weights_lost",
    "device_lost",
    "helper",
    "system",
]
"""Why a process was lost.

The first three are failed starts. ``oom`` is memory, of the device or of the host, that ran out; ``killed`` is a signal
from outside; ``silent`` sent nothing for too long; ``device_lost`` ran on a device that was taken out of service;
``helper`` means that the zygote, the weights process or the guard
could not be started, ``system`` that this machine refused a descriptor, a process, memory, room on a disk or a file.
"""

REASONS: tuple[Reason, ...] = get_args(Reason)

JOBS_OWN_FAULT: frozenset[Reason] = frozenset(("gen_eof", "gen_timeout", "cuda_fault", "parse_error", "desync"))
"""Losses that the job in work may have caused, if its first phase had begun."""

FROM_OUTSIDE: frozenset[Reason] = frozenset(
    ("killed", "oom", "silent", "send_failed", "cancel_timeout", "weights_lost", "device_lost", "helper")
)
"""Losses that something outside the process and its job explains."""

SHAPES_OWN_FAULT: frozenset[Reason] = frozenset(("spawn_timeout", "spawn_eof", "spawn_parse_error", "compile", "oom"))
"""Failed starts that say something about the shape; the others say something about the machine, now."""


class ProcessLost(Exception):
    """A child process is gone, or was made to go. The message ends with the last lines of its output.

    `began` says whether a job's first phase had begun in it, `memory` what it held when it last said so, `devices` on
    which of its devices that was; empty: on all, for all that is known.
    """

    def __init__(
        self,
        name: str,
        reason: Reason,
        what: str,
        tail: Sequence[str] = (),
        *,
        began: bool = False,
        memory: Memory | None = None,
        devices: tuple[str, ...] = (),
    ) -> None:
        self.name, self.reason, self.what, self.tail = name, reason, what, tuple(tail)
        self.began, self.memory, self.devices = began, memory, devices
        output = "\n".join(f"  | {line}" for line in tail) or "  | (it printed nothing)"
        super().__init__(f"{name}: {what}. Its last output:\n{output}")

    @classmethod
    def unforeseen(cls, name: str, error: Exception) -> ProcessLost:
        """An error that nobody foresaw, as the loss that it is made into."""
        return cls(name, "system", f"{type(error).__name__}: {error}")

    @property
    def jobs_fault(self) -> bool:
        """Whether the job that met the loss may have caused it."""
        return self.began and self.reason in JOBS_OWN_FAULT


class JobFailed(Exception):
    """The process answered that it could not make this video, and serves on."""

    def __init__(
        self, key: Key, kind: Literal["refused", "soft", "cancelled"], error: str, memory: Memory | None = None
    ) -> None:
        self.key, self.kind, self.error, self.memory = key, kind, error, memory
        super().__init__(f"{key}: {error}")


class Rejected(Exception):
    """The job is not made, and no process was at fault. `reason` is the label of the rejection metric.

    `retry_after` is in how many seconds a client may ask again, where that is known.
    """

    reason = "closed"
    retry_after: float | None = None


class PoolClosed(Rejected):
    """The worker is shutting down and takes no more jobs."""


class QueueFull(Rejected):
    """Too many jobs wait already: in all (queue_full), for this shape (shape_queue_full), of this user
    (user_queue_full), or with pictures to decode (picture_queue_full)."""

    def __init__(self, reason: str, waiting: int, wait: float) -> None:
        self.reason = reason
        self.retry_after = wait
        super().__init__(f"{waiting} jobs wait already, for some {wait:.0f} s")


class Unavailable(Rejected):
    """The shape's processes do not start at the moment."""

    reason = "unavailable"

    def __init__(self, what: str, retry_after: float | None = None) -> None:
        self.retry_after = retry_after
        super().__init__(what)


class NoRoom(Rejected):
    """The file for the video could not be made, or a picture not be decoded: a directory is gone, full or read-only,
    or memory or descriptors ran out."""

    reason = "no_room"


class Poisonous(Rejected):
    """These parameters ended two processes a short while ago."""

    reason = "poisonous"


class JobTimeout(Rejected, TimeoutError):
    """The job was not done by its deadline."""

    reason = "timeout"


REJECTIONS = (
    "invalid",
    "queue_full",
    "shape_queue_full",
    "user_queue_full",
    "picture_queue_full",
    "unavailable",
    "no_room",
    "poisonous",
    "closed",
    "timeout",
    "delivery",
)
"""The labels of the rejection metric. ``delivery`` is a video that was made and could not be handed over."""


@dataclass(frozen=True)
class Video:
    """A finished video in a file that the receiver deletes, having opened it as what a child may have put there."""

    path: Path
    sample_rate: int
    """Hz of the audio track, 0 without one."""
    phases: dict[str, float]
    """Seconds in each phase, ``queue`` included."""
