"""What a soak calls flat, and its report."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from rich.console import Console

from ltx2_pool.tools.bench import soak
from ltx2_pool.tools.bench.soak import Record, Sample

FLAT = [Sample(float(n), n, "worker", 100_000_000, 50, 11, 0, 2) for n in range(100)]


def record(samples=FLAT, ended=100) -> Record:
    return Record(100, Counter({"its video": ended}), Counter({"a helper is killed": 3}), samples=list(samples))


def test_what_is_flat_is_good():
    good = record()
    good.check()
    assert good.problems == []


@pytest.mark.parametrize(
    ("kind", "step", "after"),
    [("bytes", 100_000, "109,450,000"), ("descriptors", 0.2, "68"), ("processes", 0.2, "30"), ("files", 0.5, "49")],
)
def test_what_grows_is_told(kind, step, after):
    grown = record(replace(sample, **{kind: getattr(sample, kind) + int(step * sample.jobs)}) for sample in FLAT)
    grown.check()
    (said,) = grown.problems
    assert said.startswith(f"the worker's {kind} grew from ")
    assert said.endswith(f" to {after}")


def test_a_zombie_that_stays_and_a_job_that_does_not_end_are_told():
    bad = record((replace(sample, zombies=1) for sample in FLAT), ended=98)
    bad.check()
    assert bad.problems == ["2 of 100 jobs did not end", "the worker has zombies at the end"]


def test_the_report_is_shown_written_and_drawn(tmp_path, capsys):
    soak.show(record(), Console())
    assert "a helper is killed" in capsys.readouterr().out
    report, picture = soak.write(record(FLAT[:50]), {"seed": 1}, tmp_path / "out")
    held = json.loads(report.read_text())["held"]["worker"]
    assert held["descriptors"] == [50] * 5 + [None] * 5
    assert picture.read_bytes().startswith(b"\x89PNG")
