"""What the benchmarks make of a real fleet's logs and answers, and what the simulator says of the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from ltx2_pool.tools import stack
from ltx2_pool.tools.bench import calibration, overhead, realfleet
from ltx2_pool.tools.bench.client import Answer
from ltx2_pool.tools.bench.realfleet import Asked, Fleet, Log, Made, Real
from ltx2_pool.words.menu import Menu

MENU = Menu.load(stack.TINY_MENU)
A, B, _ = MENU.keys
FLEET = Fleet(Path("model"), stack.TINY_MENU, Path("cache"), workers=1, routers=1)
READY = "import 0.00, attach 0.01, trace 0.00, warm-up"
PARTS = "text=0.1 denoise={} decode=0.1 encode=0.15"
LOG = f"""\
2026-01-01 10:00:00,000 INFO ltx2_pool.serving.report: 64x64@9f (pid 7) is ready after 2.50 s ({READY} 2.00; 0.01 GB)
2026-01-01 10:00:01,000 INFO ltx2_pool.serving.pool: job a starts shape=64x64@9f pid=7 queue=0.250
2026-01-01 10:00:02,000 INFO h: job a done shape=64x64@9f seconds=1.000 bytes=9 queue=0.250 {PARTS.format(0.3)}
2026-01-01 10:00:03,000 INFO ltx2_pool.serving.pool: evicting 64x64@9f: for 96x64@17f
2026-01-01 10:00:03,125 INFO ltx2_pool.serving.pool: 64x64@9f (pid 7) ended with status 0
2026-01-01 10:00:04,000 INFO ltx2_pool.serving.report: 96x64@17f (pid 8) is ready after 0.75 s ({READY} 0.00; 0.01 GB)
2026-01-01 10:00:04,000 INFO ltx2_pool.serving.pool: job b starts shape=96x64@17f pid=8 queue=1.000
2026-01-01 10:00:07,000 INFO h: job b done shape=96x64@17f seconds=4.000 bytes=9 queue=1.000 {PARTS.format(2.6)}
"""


def test_a_workers_log_says_what_was_hot_and_what_everything_took():
    log = realfleet.read(LOG)
    assert log.ready == [0.75]  # the first process was started ahead, with a warm-up
    assert log.ends == [pytest.approx(0.125)]
    hot, cold = log.made
    assert (hot.key, hot.hot, hot.queue) == (str(A), True, 0.25)
    assert (hot.device, hot.encode) == (pytest.approx(0.5), pytest.approx(0.25))
    assert (cold.key, cold.hot, cold.device) == (str(B), False, pytest.approx(2.8))


def real(*, problem: str = "") -> Real:
    """One worker: A is hot; B, A and A come ten seconds apart, and each of the first two has to be started."""
    ready, end, trace, device, encode = 1.0, 0.5, 3.0, 2.0, 0.25
    made = [
        Made(str(key), key_hot, 0.0, device if key_hot else device + trace, encode)
        for key, key_hot in ((A, True), (B, False), (A, False), (A, True))
    ]
    hot = device + encode
    seconds = [hot, end + ready + trace + hot, end + ready + trace + hot, hot]
    asked = [
        Asked(10.0 * number, key, Answer(200, took, None, b"", problem))
        for number, (key, took) in enumerate(zip((A, B, A, A), seconds, strict=True))
    ]
    # A job that waits for its process is in the queue meanwhile.
    made[1:3] = [Made(one.key, one.hot, end + ready, one.device, one.encode) for one in made[1:3]]
    return Real("ours", FLEET, asked, [Log(made, [ready, ready], [end, end])], 30.0 + hot)


def test_the_simulator_gets_the_means_of_the_run_and_says_the_same():
    found = calibration.compare(real(), MENU)
    costs = found.costs
    assert (costs.ready, costs.trace, costs.end, costs.encode) == pytest.approx((1.0, 3.0, 0.5, 0.25))
    assert costs.videos[A] == costs.videos[B] == pytest.approx(2.0)  # of B, no hot one was seen: the mean of the others
    assert found.predicted == pytest.approx(found.measured, rel=0.01, abs=0.01)
    assert (found.measured["hot hits %"], found.measured["spawns"]) == (50, 2)


def test_what_is_shown_and_written(tmp_path, capsys):
    comparisons = [calibration.compare(real(), MENU), calibration.compare(real(problem="503 lost"), MENU)]
    calibration.show(comparisons, Console(width=200))
    said = capsys.readouterr().out
    assert "p99 s to the video" in said
    assert "4 x 503 lost" in said
    record = json.loads(calibration.write(comparisons[:1], 0.1, 0, tmp_path).read_text())
    ours = record["policies"]["ours"]
    assert ours["measured"]["spawns"] == ours["predicted"]["spawns"] == 2
    assert len(ours["seconds"]) == record["requests"] == 4


def test_requests_are_under_zipf_and_repeat_with_their_seed():
    asked = calibration.requests(MENU, 300, 2.0, 1)
    assert asked == calibration.requests(MENU, 300, 2.0, 1) != calibration.requests(MENU, 300, 2.0, 2)
    assert asked[-1][0] == pytest.approx(150, rel=0.25)
    first = [key for _, key in asked].count(A)
    assert first == pytest.approx(300 * 6 / 11, rel=0.2)


def test_the_overhead_is_the_difference_of_percentiles(tmp_path, capsys):
    found = overhead.Overhead(100, alone=[0.001, 0.002, 0.003], routed=[0.003, 0.004, 0.1], cpu=0.0015)
    assert found.added(50) == pytest.approx(0.002)
    overhead.show([found], Console(width=120))
    row = next(line for line in capsys.readouterr().out.splitlines() if "100 B" in line)
    assert row.replace("│", "").split()[2:] == ["2.00", "4.00", "2.00", "2.00", "78.00", "1.50"]
    overhead.write([found], tmp_path / "overhead.json")
    assert json.loads((tmp_path / "overhead.json").read_text())[0]["added"]["50"] == pytest.approx(0.002)
