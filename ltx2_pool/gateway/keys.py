"""API keys: a file of names and hashes, and what each may have under way.

A line is ``NAME sha256:HEX``, then perhaps ``max_active=N``. The keys themselves are nowhere: `ltx2-gateway key NAME`
prints one, and the line for the file. Two keys of one name see the same jobs, so that a key can be replaced.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from ltx2_pool.words.settings import SettingsError

logger = logging.getLogger(__name__)

LOOK_EVERY = 1.0
"""Seconds between two looks whether the file has changed."""
_NAME = r"[\w.@-]{1,64}"
_LINE = re.compile(rf"({_NAME})\s+sha256:([0-9a-f]{{64}})(?:\s+max_active=([1-9]\d{{0,5}}))?\s*")


@dataclass(frozen=True)
class Owner:
    """Whose jobs a request is about."""

    name: str
    max_active: int


def make(name: str) -> tuple[str, str]:
    """A new key, and the file's line for it. Raises ValueError."""
    if not re.fullmatch(_NAME, name):
        raise ValueError("a key needs a name of 1 to 64 letters, digits and . _ @ -")
    key = f"ltx2-{secrets.token_urlsafe(32)}"
    return key, f"{name} sha256:{_hash(key)}"


class Keys:
    """The keys of a file, which may change while the gateway runs. Without a file, everybody is one owner."""

    def __init__(self, path: Path | None, max_active: int) -> None:
        """Raises SettingsError with file and line."""
        self._path, self._max_active = path, max_active
        self._everybody = Owner("", max_active)
        self._owners: dict[str, Owner] = {}
        self._stamp: tuple[int, int] | None = None
        self._looked = 0.0
        if path is not None:
            self._owners = self._read(path)

    @property
    def are_open(self) -> bool:
        return self._path is None

    def owner(self, authorization: str | None) -> Owner | None:
        """Whose key an Authorization header has; None for nobody's."""
        if self._path is None:
            return self._everybody
        self._look(self._path)
        scheme, _, key = (authorization or "").partition(" ")
        return self._owners.get(_hash(key.strip())) if scheme.lower() == "bearer" else None

    def _look(self, path: Path) -> None:
        if time.monotonic() < self._looked + LOOK_EVERY:
            return
        self._looked = time.monotonic()
        try:
            if self._stamped(path) != self._stamp:
                self._owners = self._read(path)
                logger.info("%s has %d keys now", path, len(self._owners))
        except (OSError, SettingsError) as error:
            logger.error("the keys stay as they were: %s", error)

    def _read(self, path: Path) -> dict[str, Owner]:
        owners: dict[str, Owner] = {}
        try:
            stamp, lines = self._stamped(path), path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"--api-keys (LTX2_API_KEYS_FILE) {path}: {error}") from error
        for number, line in enumerate(lines, 1):
            if not line.partition("#")[0].strip():
                continue
            match = _LINE.fullmatch(line.partition("#")[0])
            if match is None:
                raise SettingsError(
                    f"{path}:{number}: a line is NAME sha256:HEX, perhaps with max_active=N: run ltx2-gateway key NAME"
                )
            owners[match[2]] = Owner(match[1], int(match[3]) if match[3] else self._max_active)
        self._stamp = stamp
        return owners

    @staticmethod
    def _stamped(path: Path) -> tuple[int, int]:
        stat = path.stat()
        return stat.st_mtime_ns, stat.st_size


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
