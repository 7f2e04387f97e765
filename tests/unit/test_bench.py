"""What the benchmarks make of their numbers: mixes, percentiles, verdicts and advice."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest
from rich.console import Console

from ltx2_pool.fleet.rivals import POLICIES
from ltx2_pool.serving.metrics import Metrics
from ltx2_pool.tools import stack
from ltx2_pool.tools.bench import advice, fleet, image, load, options
from ltx2_pool.tools.bench.results import Level, Record, Result
from ltx2_pool.words.menu import Menu

MENU = Menu.load(stack.TINY_MENU)
A, B, C = MENU.shapes


def test_a_mix_is_kept_in_every_block_and_repeats_with_its_seed():
    shares = load.weights(MENU, "zipf")
    one, other = load.sequence(shares, 11, 5), load.sequence(shares, 11, 5)
    first = list(itertools.islice(one, 22))
    assert first == list(itertools.islice(other, 22))
    assert Counter(first[:11]) == Counter(first[11:]) == {A: 6, B: 3, C: 2}
    assert first[:11] != first[11:]


def test_a_mix_from_a_file(tmp_path):
    file = tmp_path / "mix.yaml"
    file.write_text(f"{A.key}: 3\n{C.key}: 1\n")
    assert load.weights(MENU, str(file)) == {A: 3, C: 1}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("1x1@9f: 1", "1x1@9f is not on the menu, which has 64x64@9f"),
        ("64x64@9f: many", "the weight of 64x64@9f must be a number above 0, not 'many'"),
        ("64x64@9f: 0", "must be a number above 0"),
        ("", "lines of 'shape key: weight' are needed"),
        ("a: [", "while parsing"),
    ],
)
def test_a_wrong_mix_is_refused(tmp_path, text, problem):
    file = tmp_path / "mix.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=problem):
        load.weights(MENU, str(file))


def record(shape, seconds, *, state="hot", problem="", status=200):
    return Record("concurrency 1", 0, shape.key, state, 0.0, seconds, 0.5, status, 100, problem)


def test_a_summary_tells_hot_from_cold_and_counts_failures():
    records = [record(A, s) for s in (1, 2, 3)] + [record(A, 50, state="cold")]
    records += [record(B, 0.1, problem="no text", status=429)]
    found = load.summary(Result(Level(concurrency=1), 60.0, records))
    assert (found["requests"], found["videos"], found["videos_per_minute"]) == (5, 4, 4)
    assert found["shapes"][A.key]["hot"]["p50"] == 2
    assert found["shapes"][A.key]["cold"]["p50"] == 50
    assert found["shapes"][B.key]["failures"] == {"429": 1}
    assert found["shapes"][B.key]["hot"] == {"videos": 0}


def test_a_run_in_which_everything_failed_is_written_and_drawn(tmp_path):
    """Its pictures ended the program with a traceback: there is no logarithm of nothing."""
    failed = [record(A, 0.1, problem="Internal server error", status=500)]
    result = Result(Level(concurrency=1), 60.0, failed)
    for path in load.write([result], {}, MENU, tmp_path):
        assert path.stat().st_size > 0


def timings(shape, in_turn, shuffled, *, digests=("x", "x")):
    for order, seconds, digest in (("in turn", in_turn, digests[0]), ("shuffled", shuffled, digests[1])):
        for number, value in enumerate(seconds):
            yield image.Timing(order, shape.key, number, "", value, 9, f"{digest}{number}", "")


def test_an_image_is_judged_by_speed_in_any_order_and_by_its_bytes():
    found = [
        *timings(A, (20, 2, 2), (2, 2.2, 2)),
        *timings(B, (20, 2, 2), (9, 8, 9)),
        *timings(C, (20, 2, 2), (2, 2, 2), digests=("x", "y")),
    ]
    good, slow, other = image.judge(found, MENU, 1.5)
    assert (good.problems, good.cold_s, good.hot_s, good.ratio) == ((), 20, 2, 1)
    assert slow.problems == ("shuffled is 4.50 times as slow, over 1.5",)
    assert other.problems == ("other bytes the second time: prompt 0, 1, 2",)


def page(jobs):
    from prometheus_client import generate_latest

    metrics = Metrics([shape.key for shape in MENU.shapes])
    for shape, number in jobs.items():
        metrics.requests.labels(shape.key, "DONE").inc(number)
        metrics.phase.labels(shape.key, "denoise").observe(number * 2)
    for shape in MENU.shapes:
        metrics.memory.labels(shape.key, "resident").set(2**30)
        metrics.memory.labels(shape.key, "peak").set((5 if shape == C else 3) * 2**30)
    metrics.evictions.labels(A.key).inc(40)
    return generate_latest(metrics.registry).decode()


def test_the_menu_report_advises_by_share_and_memory():
    found = advice.report(page({A: 300, B: 2}))
    assert [(line.shape_key, line.jobs, line.advice.partition(":")[0]) for line in found.lines] == [
        (A.key, 300, "keep"),
        (B.key, 2, "leave out of LTX2_POOL_PREWARM"),
        (C.key, 0, "drop"),
    ]
    assert found.lines[0].gpu_s == 600
    assert any("2 shapes hold 2.0 GiB for 2 jobs" in note for note in found.notes)
    assert any(note.startswith(f"{C.key} sets the room") and "2.0 GiB less" in note for note in found.notes)
    assert any("40 evictions for 302 jobs" in note for note in found.notes)


def test_without_traffic_there_is_no_advice():
    assert {line.advice for line in advice.report(page({})).lines} == {"no traffic yet"}


@pytest.mark.parametrize("text", ["up 1\n", "<html>\n"])
def test_the_page_of_something_else_is_refused(text):
    with pytest.raises(advice.AdviceError):
        advice.report(text)


def test_a_simulated_fleet_is_shown_written_and_drawn(tmp_path, capsys):
    options_ = ["--workers", "2", "--keys", "4", "--places", "2", "--duration", "300", "--load", "0.3"]
    names = "load image compare spawn chaos fuzz kinds pictures polling fleet calibrate overhead soak menu-report"
    commands = dict.fromkeys(names.split(), lambda *_: 0)
    arguments = options.parser("benchmark.py", "", commands).parse_args(["fleet", *options_, "--out", str(tmp_path)])
    question = fleet.ask(arguments)
    outcomes = [fleet.answer(question, policy) for policy in POLICIES]
    assert len({outcome.asked for outcome in outcomes}) == 1
    fleet.show(outcomes, Console(width=150))
    assert "spawns per 1,000 videos" in capsys.readouterr().out
    report, picture = fleet.write(outcomes, question, tmp_path)
    assert json.loads(report.read_text())["policies"]["ours"]["asked"] == outcomes[0].asked > 0
    assert picture.stat().st_size > 10_000
    arguments.keys = 31
    with pytest.raises(ValueError, match="there are 1 to 30 to choose from, not 31"):
        fleet.ask(arguments)
