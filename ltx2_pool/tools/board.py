"""What a warm-up shows while it works: a live table on a terminal, plain lines in a log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

from rich.live import Live
from rich.table import Table

from ltx2_pool.caches.bake import Report
from ltx2_pool.tools import terminal
from ltx2_pool.words.shapes import Key


class Board:
    """The states of the shapes, and what was measured."""

    def __init__(self, keys: Sequence[Key], verb: str) -> None:
        self._console = terminal.console()
        self._verb = verb
        self._states = {str(key): "waiting" for key in keys}
        self._since = {str(key): time.monotonic() for key in keys}
        self._reports: dict[str, Report] = {}
        self._live: Live | None = None

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        if self._console.is_terminal:
            with Live(get_renderable=self._table, console=self._console, refresh_per_second=4) as self._live:
                yield
        else:
            yield
            self._console.print(self._table())

    def state(self, key: Key, state: str) -> None:
        self._states[str(key)] = state
        self._since[str(key)] = time.monotonic()
        if self._live is None:
            print(f"{time.strftime('%H:%M:%S')} {key}: {state}", flush=True)

    def finished(self, key: Key, report: Report) -> None:
        self._reports[str(key)] = report
        self.state(key, "good" if report.ok else f"{self._verb} failed")
        for problem in report.problems:
            print(f"{time.strftime('%H:%M:%S')} {key}: {problem}", flush=True)

    def _table(self) -> Table:
        first = "baked first s" if self._verb == "verify" else "cold s"
        table = Table("shape", "state", "ready s", first, "hot s", "misses", "files", "MB", "same video")
        for key, state in self._states.items():
            report = self._reports.get(key)
            if report is None:
                waiting = "" if state in ("waiting", "not tried") or "skipped" in state else self._elapsed(key)
                table.add_row(key, state + waiting)
                continue
            misses = sum(count for name, count in report.compiled.items() if not name.endswith("hits"))
            same = {None: "", True: "yes", False: "NO"}[report.same_video]
            table.add_row(
                key,
                f"[{'green' if report.ok else 'red'}]{state}[/]",
                f"{report.ready_s:.1f}",
                f"{report.first_s:.2f}",
                f"{report.hot_s:.2f}",
                str(misses),
                str(report.files),
                f"{report.bytes / 1e6:.1f}",
                same,
            )
        return table

    def _elapsed(self, key: str) -> str:
        return f" ({time.monotonic() - self._since[key]:.0f} s)"
