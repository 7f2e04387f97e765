"""Which shapes are asked for: decaying counts that survive restarts, for ``LTX2_POOL_PREWARM=top:N``."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from ltx2_pool.words.settings import SettingsError
from ltx2_pool.words.shapes import Menu, Shape

logger = logging.getLogger(__name__)

HALF_LIFE = 24 * 3600.0
"""Seconds after which a request counts half."""
_SAVE_INTERVAL = 10.0
"""Seconds between two writes at least: losing these counts does no harm."""


class Traffic:
    """Counts requests by shape key. Without a file, or with one that can not be written, it counts in memory."""

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._scores: dict[str, float] = {}
        self._at = clock()
        self._saved_at = 0.0
        if path is not None:
            self._load(path)

    def count(self, shape: Shape) -> None:
        """One request for this shape was admitted."""
        self._decay()
        self._scores[shape.key] = self._scores.get(shape.key, 0.0) + 1.0
        if self._path is not None and abs(self._clock() - self._saved_at) >= _SAVE_INTERVAL:
            self.save()

    def top(self, shapes: Iterable[Shape], number: int) -> list[Shape]:
        """The most asked for shapes first, the others in the given order after them; at most `number`."""
        return sorted(shapes, key=lambda shape: -self._scores.get(shape.key, 0.0))[:number]

    def scores(self) -> dict[str, float]:
        """Requests by shape key, each counting the less the older it is."""
        self._decay()
        return dict(self._scores)

    def save(self) -> None:
        """Write the file; whoever reads it sees the old content or the new one. Never raises: it is only a hint."""
        if self._path is None:
            return
        self._saved_at = self._clock()
        partial = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            with partial.open("w", encoding="utf-8") as file:
                json.dump({"at": self._at, "scores": self._scores}, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._path)
        except OSError as error:
            logger.warning("traffic is not remembered across restarts: %s", error)
            self._path = None

    def _load(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            self._scores = {str(key): float(score) for key, score in content["scores"].items()}
            self._at = float(content["at"])
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.warning("%s is not used, the traffic is counted anew: %s", path, error)
            self._scores = {}
        self._decay()

    def _decay(self) -> None:
        now = self._clock()
        # A clock that was set back must not make old requests count more.
        factor = 0.5 ** (max(0.0, now - self._at) / HALF_LIFE)
        self._at = now
        self._scores = {key: score * factor for key, score in self._scores.items() if score * factor > 1e-3}


def to_prewarm(wanted: str, menu: Menu, traffic: Traffic) -> list[Shape]:
    """The shapes that ``--prewarm`` names, in the order to start them. Raises SettingsError for one not on the menu."""
    if wanted == "none":
        return []
    if wanted == "all":
        return traffic.top(menu.shapes, len(menu.shapes))
    if wanted.startswith("top:"):
        return traffic.top(menu.shapes, int(wanted.removeprefix("top:")))
    try:
        return [menu.get(key.strip()) for key in wanted.split(",")]
    except KeyError as error:
        raise SettingsError(f"--prewarm (LTX2_POOL_PREWARM): {error.args[0]}") from error
