"""Where tables and progress are printed: as wide as the terminal, and wide enough in a log."""

from __future__ import annotations

import os
import sys

from rich.console import Console

_LOG_WIDTH = 120
"""Columns where there is no terminal to ask; rich would take 80 and cut the figures off."""


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _LOG_WIDTH)
