"""A video job as its clients see it: OpenAI's `video` object, and the ways in which one ends."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["queued", "in_progress", "completed", "failed"]
ENDED: frozenset[str] = frozenset(("completed", "failed"))


def new_id() -> str:
    """An id that nobody guesses, and that sorts by its time in microseconds: a place in a list, whatever is deleted."""
    return f"video_{time.time_ns() // 1000:013x}{secrets.randbits(76):019x}"


@dataclass(frozen=True)
class Job:
    """One row of the store, without the request's body."""

    id: str
    owner: str
    status: Status
    progress: int
    """Percent."""
    model: str
    prompt: str
    size: str
    seconds: str
    created: float
    """Unix time, as are all others."""
    started: float | None = None
    ended: float | None = None
    expires: float | None = None
    remixed_from: str | None = None
    error_code: str | None = None
    error: str | None = None
    content: str | None = None
    """Where its video is, in the content store."""
    bytes: int = 0
    etag: str = ""

    @property
    def view(self) -> dict[str, Any]:
        """OpenAI's `video` object."""
        error = None if self.error_code is None else {"code": self.error_code, "message": self.error}
        return {
            "id": self.id,
            "object": "video",
            "model": self.model,
            "status": self.status,
            "progress": self.progress,
            "prompt": self.prompt,
            "size": self.size,
            "seconds": self.seconds,
            "created_at": int(self.created),
            "completed_at": _whole(self.ended) if self.status == "completed" else None,
            "expires_at": _whole(self.expires),
            "remixed_from_video_id": self.remixed_from,
            "error": error,
        }


@dataclass(frozen=True)
class Claimed:
    """A job that this dispatcher, and no other, works on while it renews the claim."""

    id: str
    owner: str
    body: dict[str, Any]
    """Dynamo's request."""
    created: float
    attempts: int
    """How often it was handed out and not answered, this time included."""
    taken_over: bool
    """Whether another dispatcher had it, and fell silent."""
    left: float
    """Seconds until its deadline."""


def _whole(moment: float | None) -> int | None:
    return None if moment is None else int(moment)


def storable(text: str, limit: int) -> str:
    """A text as every database takes it: without NUL and halves of surrogate pairs, and not longer than the limit."""
    return text[:limit].replace("\0", "?").encode("utf-8", "replace").decode()
