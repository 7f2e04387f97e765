"""Extras: packages that serving does without. Who asks for one that is missing is told how to install it."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from urllib.parse import urlsplit

_STORES = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3")}
"""By scheme of a URL: the package that fsspec needs for it, and our extra that has it."""


class ExtraMissing(SystemExit):
    """A package is not installed. Left alone, it ends the program with its message and status 1."""


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports from other packages: turns a missing one into ExtraMissing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "ltx2_pool").partition(".")[0] == "ltx2_pool":
            raise
        raise ExtraMissing(f"{error.name} is not installed: {_install(name)}") from error


def missing_for(url: str) -> str:
    """What to install before videos can be written to a URL; empty when nothing is missing."""
    package, name = _STORES.get(urlsplit(url).scheme, ("", ""))
    if not package or importlib.util.find_spec(package) is not None:
        return ""
    return f"{url} needs {package}, which is not installed: {_install(name)}"


def _install(name: str) -> str:
    return f"pip install 'ltx2-pool[{name}]'"
