"""What things took lately, by key: videos, and what a start adds to the first one. Pure."""

from __future__ import annotations

from ltx2_pool.words.shapes import Key


class Durations:
    """Each is the mean of the last one and of the mean before: what happened ten videos ago hardly counts."""

    def __init__(self) -> None:
        self.videos: dict[Key, float] = {}
        """Seconds of a video in a process that has made one before; until there is one, of the first."""
        self._ready: dict[Key, float] = {}
        """From the start of a process to READY."""
        self._first: dict[Key, float] = {}
        """What its first video took longer than those after it."""

    def ready(self, key: Key, seconds: float) -> None:
        """A process took so long to become READY."""
        self._ready[key] = seconds

    def made(self, key: Key, seconds: float, *, first: bool) -> None:
        """A video took so long; `first`: it is that of a process that had not made any."""
        usual = self.videos.get(key)
        if usual is None:
            self.videos[key] = seconds
        elif first:
            more = max(0.0, seconds - usual)
            self._first[key] = (self._first.get(key, more) + more) / 2
        else:
            self.videos[key] = (usual + seconds) / 2

    def spawn(self, key: Key) -> float:
        """What a video takes longer when a process has to be started for it; what is not known of the key is the mean
        of the others, and 0 when nothing is known."""
        return sum(known.get(key, _mean(known)) for known in (self._ready, self._first))

    @property
    def usual_spawn(self) -> float | None:
        """The same of any key; None until both parts of one are known."""
        return _mean(self._ready) + _mean(self._first) if self._ready and self._first else None


def _mean(known: dict[Key, float]) -> float:
    return sum(known.values()) / len(known) if known else 0.0
