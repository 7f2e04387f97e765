"""Progress is seen in a log too."""

from __future__ import annotations

import io

from rich.console import Console

from ltx2_pool.tools import terminal


def test_a_log_has_a_line_after_each_tenth() -> None:
    log = io.StringIO()
    with terminal.progress(Console(file=log, width=120)) as progress:
        jobs, done = progress.add_task("jobs", total=2000), progress.add_task("none", total=0)
        for _ in range(2000):
            progress.advance(jobs)
        progress.advance(done)
    lines = [line for line in log.getvalue().splitlines() if " after " in line]
    assert [line.rsplit(" after ", 1)[0] for line in lines] == [f"jobs: {n:,} of 2,000" for n in range(200, 2001, 200)]


def test_progress_that_is_told_in_other_ways_is_seen_too() -> None:
    log = io.StringIO()
    with terminal.progress(Console(file=log, width=120)) as progress:
        steps = progress.add_task("training", total=20)
        for loss in range(20):
            progress.update(steps, advance=1, description=f"training, loss {loss}")
        for _ in progress.track(range(20), description="clips"):
            pass
    lines = log.getvalue().splitlines()
    assert "training, loss 19: 20 of 20 after 0 s" in lines
    assert any(line.startswith("clips: 20 of 20 after ") for line in lines)


def test_a_terminal_has_a_bar_and_no_lines() -> None:
    screen = io.StringIO()
    with terminal.progress(Console(file=screen, width=120, force_terminal=True)) as progress:
        jobs = progress.add_task("jobs", total=10)
        for _ in range(10):
            progress.advance(jobs)
    assert "10/10" in screen.getvalue()
    assert " after " not in screen.getvalue()
