"""Where tables and progress are printed: as wide as the terminal, and wide enough in a log."""

from __future__ import annotations

import os
import sys
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskID

_LOG_WIDTH = 120
"""Columns where there is no terminal to ask; rich would take 80 and cut the figures off."""


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _LOG_WIDTH)


def progress(console: Console) -> Progress:
    """A bar for each task; in a log, where rich would say nothing until the end, a line after each tenth of one."""
    return _Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console)


class _Progress(Progress):
    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Also in a log."""
        self.update(task_id, advance=advance)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Also in a log."""
        task = self._tasks[task_id]
        before = task.completed
        super().update(task_id, **changes)
        if self.console.is_terminal or not task.total:
            return
        if int(10 * before / task.total) < int(10 * task.completed / task.total):
            where = f"{task.description}: " if task.description else ""
            self.console.print(f"{where}{task.completed:,.0f} of {task.total:,.0f} after {task.elapsed or 0:.0f} s")
