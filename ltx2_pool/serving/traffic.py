"""Which shapes are asked for: decaying counts that survive restarts, for ``LTX2_POOL_PREWARM=top:N``."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ltx2_pool.serving.threads import Lane
from ltx2_pool.words.menu import Menu
from ltx2_pool.words.settings import SettingsError
from ltx2_pool.words.shapes import Key

logger = logging.getLogger(__name__)

HALF_LIFE = 24 * 3600.0
"""Seconds after which a request counts half."""
SAVE_INTERVAL = 10.0
"""Seconds between two writes at least: losing these counts does no harm."""
_LOCK_WAIT = 1.0
"""Seconds that a save waits for another worker's save, which takes milliseconds."""


class Traffic:
    """Counts jobs by shape key. Without a file, or with one that cannot be written, it counts in memory.

    Workers that share a cache root share the file: each adds what it has counted since its last save to what the file
    says, and goes on from the sum. :meth:`count` never touches the file; :meth:`keep` does, in a thread.
    """

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()  # of the scores; a save runs in a thread
        self._saving = threading.Lock()
        self._scores: dict[str, float] = {}
        self._unsaved: dict[str, float] = {}
        self._at = clock()
        self._warned = False
        if path is not None:
            self._scores = self._read(path)

    def count(self, asked: Key) -> None:
        """One job for this key was admitted."""
        with self._lock:
            self._decay()
            for scores in (self._scores, self._unsaved):
                scores[str(asked)] = scores.get(str(asked), 0.0) + 1.0

    def top(self, keys: Iterable[Key], number: int) -> list[Key]:
        """The most asked for shapes first, the others in the given order after them; at most `number`."""
        scores = self.scores()
        return sorted(keys, key=lambda key: -scores.get(str(key), 0.0))[:number]

    def scores(self) -> dict[str, float]:
        """Jobs by shape key, each counting the less the older it is."""
        with self._lock:
            self._decay()
            return dict(self._scores)

    async def keep(self, interval: float = SAVE_INTERVAL) -> None:
        """Save what is new, for as long as this runs. A disk that hangs costs a thread, and the counts."""
        lane = Lane("save-traffic", 1)
        while True:
            await asyncio.sleep(interval)
            if self._unsaved:
                with contextlib.suppress(OSError):  # no thread now: in a while
                    await lane.run(self.save)

    def save(self) -> None:
        """Add what is new to the file; whoever reads it sees the old content or the new one.

        Blocks; for any thread. Never raises: it is only a hint.
        """
        if self._path is None or not self._unsaved:
            return
        with self._saving:
            try:
                with _locked(self._path):
                    self._merge(self._path)
                self._warned = False
            except OSError as error:
                if not self._warned:
                    logger.warning("traffic is not remembered across restarts: %s", error)
                self._warned = True

    def _merge(self, path: Path) -> None:
        saved = self._read(path)
        with self._lock:
            self._decay()
            new, at = dict(self._unsaved), self._at
        scores = {key: saved.get(key, 0.0) + new.get(key, 0.0) for key in saved.keys() | new.keys()}
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with partial.open("w", encoding="utf-8") as file:
                json.dump({"at": at, "scores": scores}, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        with self._lock:
            self._decay()
            # What was counted while the file was written stays unsaved.
            self._unsaved = {key: n for key, score in self._unsaved.items() if (n := score - new.get(key, 0.0)) > 0.5}
            self._scores = {
                key: scores.get(key, 0.0) + self._unsaved.get(key, 0.0) for key in scores.keys() | self._unsaved.keys()
            }

    def _read(self, path: Path) -> dict[str, float]:
        """The scores in the file, as of now; none when it cannot be read."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            scores = {str(key): float(score) for key, score in content["scores"].items()}
            return _faded(scores, self._clock() - float(content["at"]))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.warning("%s is not used, the traffic is counted from zero: %s", path, error)
            return {}

    def _decay(self) -> None:
        now = self._clock()
        # A clock that was set back must not make old requests count more.
        self._scores = _faded(self._scores, now - self._at)
        self._unsaved = _faded(self._unsaved, now - self._at)
        self._at = now


def _faded(scores: dict[str, float], age: float) -> dict[str, float]:
    factor = 0.5 ** (max(0.0, age) / HALF_LIFE)
    return {key: score * factor for key, score in scores.items() if score * factor > 1e-3}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Take the file's lock, which all workers on this cache root share. Raises OSError."""
    lock = path.with_name(f".{path.name}.lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        deadline = time.monotonic() + _LOCK_WAIT
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def to_prewarm(wanted: str, menu: Menu, traffic: Traffic) -> list[Key]:
    """The keys that ``--prewarm`` names, in the order to start them. Raises SettingsError for one not on the menu."""
    if wanted == "none":
        return []
    if wanted == "all":
        return traffic.top(menu.keys, len(menu.keys))
    if wanted.startswith("top:"):
        return traffic.top(menu.keys, int(wanted.removeprefix("top:")))
    try:
        return [menu.get(key.strip()) for key in wanted.split(",")]
    except KeyError as error:
        raise SettingsError(f"--prewarm (LTX2_POOL_PREWARM): {error.args[0]}") from error
