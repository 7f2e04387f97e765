"""``compare --stock``: its options, its table, and its picture, also when a way is missing."""

from __future__ import annotations

import collections
import contextlib
import csv
import json
import re
import sys

import pytest
from rich.console import Console

from ltx2_pool.programs import benchmark
from ltx2_pool.tools.bench import compare, options, plots, rivals, stock
from ltx2_pool.words.device import CPU, Device
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.shapes import Shape

A, B = Shape(768, 512, 121), Shape(1920, 1088, 121)
KILLED = "pool ended with status -9:\nTraceback:\n  a line\nOutOfMemoryError: no room for [2.00 GiB]\n"


def of(seconds, parts, **more):
    return {"first_s": 1234.5, "steady_s": [seconds * 1.2, seconds, seconds * 0.9], "parts": parts, **more}


def result(shapes=(A, B), ways=rivals.WAYS, failed=()):
    """What a run found; those that failed had loaded, and made one video."""
    found = {}
    for number, way in enumerate(ways, 1):
        found[way] = {"load": {"s": 12.0}}
        for shape in shapes:
            s = 24 / number
            parts = {"text": 0.1 * s, "denoise": 0.5 * s, "decode": 0.25 * s}
            if way != "stock":
                parts["encode"] = 0.1 * s
            found[way][shape.key] = of(s, parts, **({"first_hot_s": 2 * s} if "pool" in way else {}))
        if way in failed:
            found[way] = {"load": {"s": 12.0}, shapes[0].key: {"first_s": 60.0}}
    return {
        "shapes": [shape.key for shape in shapes],
        "asked": list(ways),
        "steps": 5,
        "repeat": 3,
        "seed": 7,
        "ways": found,
        "problems": {way: KILLED.replace("pool", way) for way in failed},
        "caches_kept_from_before": ["pool"],
        "left_out": {},
        "device": "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition MIG 1g.24gb",
    }


def test_rows_go_by_shape_and_then_by_way_with_ratios_to_stock():
    rows = stock.rows(result())
    assert [(row.shape, row.way) for row in rows] == [(shape.key, way) for shape in (A, B) for way in rivals.WAYS]
    assert [row.ratio_to_stock for row in rows[:4]] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert [row.first_hot_to_steady for row in rows[:4]] == [None, None, 2, 2]
    first, second = rows[:2]
    assert (first.load_s, first.first_s, first.steady_s, first.fastest_s) == (12, 1234.5, 24, pytest.approx(21.6))
    assert (first.encode_s, first.other_s, second.other_s) == (None, pytest.approx(3.6), pytest.approx(0.6))
    assert sum(first.parts.values()) == pytest.approx(24)


def test_what_has_no_phases_is_one_part():
    found = result()
    found["ways"]["stock"][A.key] = of(24, {"generation": 23.0})
    row = stock.rows(found)[0]
    assert (row.text_s, row.other_s, row.parts) == (None, None, {"all phases": 24})


def test_a_way_that_failed_has_a_reason_and_the_others_their_figures():
    rows = {row.way: row for row in stock.rows(result((A,), failed=["pool"]))}
    pool = rows.pop("pool")
    assert (pool.load_s, pool.first_s, pool.steady_s, pool.ratio_to_stock, pool.parts) == (12, 60, None, None, {})
    assert pool.problem == "pool ended with status -9: OutOfMemoryError: no room for [2.00 GiB]"
    assert {row.problem for row in rows.values()} == {""}
    assert rows["in-process"].ratio_to_stock == 0.5
    without = stock.rows(result((A,), failed=["stock"]))
    assert {row.ratio_to_stock for row in without} == {None}


def shown(found, width, on_gpu=True):
    console = Console(width=width)
    with console.capture() as capture:
        stock.show(found, on_gpu, console)
    return capture.get()


@pytest.mark.parametrize("width", [80, 120])
def test_no_figure_is_cut_off(width):
    text = shown(result(failed=["pool"]), width)
    assert "…" not in text
    assert text.count("failed") == 2
    assert text.count(f" {A.key} ") == text.count(f" {B.key} ") == 2
    for figure in ("1234.5", "24.0", "0.50", "2.00"):
        assert f" {figure} " in text


def test_what_the_numbers_are_worth_stands_below_them():
    found = result((A,), failed=["pool"]) | {"left_out": {"pool, quantized": "no FP8"}}
    found["ways"]["in-process"][A.key]["steady_s"] = [1.0, 2.0, 3.0]
    text = " ".join(shown(found, 120, on_gpu=False).split())
    for sentence in (
        "pool ended with status -9: OutOfMemoryError: no room for [2.00 GiB]",
        "pool, quantized is left out: no FP8.",
        f"Not steady, is the device shared? in-process, {A.key}: the median is 2.000 s, the fastest 1.000 s.",
        "checkpoint, prompt, seed 7, 5 steps of one pass through the transformer each",
        "stock ends with the frames made and writes no file; the others end with the MP4 in a file.",
        "Stock runs in this project's executor",
        "Compile caches from earlier runs, of these shapes or others: pool.",
    ):
        assert sentence in text
    assert "this project's executor" not in shown(result(), 120)
    assert "Not steady" not in shown(result(), 120)


def test_the_files_say_the_same(tmp_path):
    found = result(failed=["pool"])
    written = stock.write(found, tmp_path)
    assert [path.name for path in written] == ["compare-stock.json", "compare-stock.csv", "compare-stock.png"]
    of_json = json.loads(written[0].read_text())
    assert of_json["problems"] == {"pool": KILLED}
    with written[1].open(newline="") as file:
        of_csv = list(csv.DictReader(file))
    assert [(row["shape"], row["way"]) for row in of_csv] == [(row["shape"], row["way"]) for row in of_json["rows"]]
    assert [row["ratio_to_stock"] for row in of_csv[:4]] == ["1.0", "0.5", "", "0.25"]
    assert written[2].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("failed", [(), ("pool",), ("stock",), rivals.WAYS], ids=lambda failed: "+".join(failed))
@pytest.mark.parametrize("shapes", [(A,), (A, B, Shape(64, 64, 9), Shape(64, 96, 9))], ids=len)
def test_the_picture_cuts_nothing_off_and_writes_nothing_over(tmp_path, monkeypatch, shapes, failed):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, _path: figures.append(figure))
    found = result(shapes, failed=failed)
    if "stock" not in failed:
        found["ways"]["stock"][A.key] = of(24, {})  # so that the legend has everything
    stock.write(found, tmp_path)
    (figure,) = figures
    figure.canvas.draw()
    texts = [figure._suptitle, *figure.legends]
    for axes in figure.axes:
        if axes.get_visible():
            texts += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
            low, high = axes.get_ylim()
            drawn = [tick.label1 for tick in axes.yaxis.get_major_ticks() if low <= tick.get_loc() <= high]
            texts += [*axes.get_xticklabels(), *drawn]
            written = [text.get_text() for text in axes.texts]
            assert [text == "failed" for text in written] == [way in failed for way in rivals.WAYS]
            assert any("× stock" in text for text in written) == ("stock" not in failed)
    boxes = [text.get_window_extent() for text in texts]
    boxes = [box for box in boxes if box.width and box.height]
    whole = figure.bbox
    assert [b for b in boxes if b.x0 < 0 or b.y0 < 0 or b.x1 > whole.x1 or b.y1 > whole.y1] == []
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number])
    plots.pyplot.close(figure)


H100 = Device("GPU-1", "NVIDIA H100", "9.0", 80 * 2**30)
A100 = Device("GPU-2", "NVIDIA A100", "8.0", 80 * 2**30)


@pytest.mark.parametrize(
    ("here", "asked", "ways", "why"),
    [
        (H100, None, list(rivals.WAYS), None),
        (A100, None, ["stock", "in-process", "pool"], "a GPU of compute capability 8.0 has no FP8"),
        (CPU, None, ["stock", "in-process", "pool"], "a CPU computes FP8 by way of bfloat16"),
        (CPU, ["pool"], ["stock", "pool"], None),
        (H100, ["pool, quantized", "stock"], ["stock", "pool, quantized"], None),
    ],
)
def test_the_ways_are_those_that_the_device_can_do(here, asked, ways, why):
    chosen, left_out = stock.choose(asked, here)
    assert chosen == ways
    assert list(left_out) == ([] if why is None else ["pool, quantized"])
    assert why is None or left_out["pool, quantized"].startswith(why)


def test_a_way_that_was_asked_for_and_cannot_be_had_is_refused():
    with pytest.raises(compare.CompareError, match=r"--ways 'pool, quantized': a GPU of compute capability 8\.0"):
        stock.choose(["pool, quantized"], A100)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--shape", "768x500@121"], "height 500 is not a multiple of 32 (nearest: 480 or 512)"),
        (["--shape", "large"], "'large' is not a shape: write WIDTHxHEIGHT@FRAMES"),
        (["--steps", "0"], "argument --steps: must be from 1 to 50, not 0"),
        (["--steps", "51"], "argument --steps: must be from 1 to 50, not 51"),
        (["--repeat", "0"], "argument --repeat: must be 1 or more, not 0"),
        (["--ways", "pool", "fastest"], "argument --ways: invalid choice: 'fastest' (choose from"),
        (["--ways"], "argument --ways: expected at least one argument"),
        (["--model", "nowhere"], "nowhere is not a checkpoint: it has no model_index.json"),
        (["--shapes", "nowhere.yaml"], "nowhere.yaml: cannot read the menu"),
        (["--out", "a-file"], "File exists: 'a-file'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(monkeypatch, tmp_path, capsys, arguments, problem):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").touch()
    if "--shapes" not in arguments:
        arguments = [*arguments, "--shapes", str(benchmark.stack.TINY_MENU)]
    monkeypatch.setattr(sys, "argv", ["ltx2-benchmark", "compare", "--stock", *arguments])
    monkeypatch.setattr(rivals, "run", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(benchmark.stack, "checkpoint", lambda _work: pytest.fail("wrote a checkpoint"))
    try:
        status = benchmark.main()
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--shape", A.key), ("--steps", "2"), ("--ways", "pool")], ids=lambda o: o[0])
def test_what_goes_with_stock_is_refused_without(monkeypatch, capsys, option):
    menu = str(benchmark.stack.TINY_MENU)
    monkeypatch.setattr(sys, "argv", ["ltx2-benchmark", "compare", "--shapes", menu, *option])
    assert benchmark.main() == 2
    assert capsys.readouterr().err.endswith(f": {option[0]} goes with --stock\n")


def test_a_shape_may_be_given_again(monkeypatch):
    every = collections.defaultdict(lambda: lambda *_: 0)  # whatever commands there are
    parser = options.parser("p", "", every)
    parsed = parser.parse_args(["compare", "--stock", "--shape", "768x512@121", "--shape", B.key])
    assert (parsed.shape, parsed.steps, parsed.repeat, parsed.out) == ([A, B], None, None, None)


def test_when_one_way_fails_the_others_are_measured_and_the_status_says_so(monkeypatch, tmp_path, capsys):
    class Rival(contextlib.nullcontext):
        def __init__(self, way, videos, _tell):
            super().__init__(self)
            self.way = way
            self.found = {} if way == "in-process" else result(tuple(videos.shapes))["ways"][way]

        def read(self, _until):
            if self.way == "in-process":
                raise rivals.RivalError(self.way, "ended with status 1:\nMemoryError")

        def measure(self):
            pass

    monkeypatch.setattr(rivals, "_Rival", Rival)
    monkeypatch.setattr(benchmark.device, "visible", lambda: (CPU,))
    (tmp_path / "model_index.json").touch()
    arguments = ["--model", str(tmp_path), "--shapes", str(benchmark.stack.TINY_MENU), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["ltx2-benchmark", "--work", str(tmp_path), "compare", "--stock", *arguments])
    assert benchmark.main() == 1
    printed = capsys.readouterr().out
    assert "in-process ended with status 1: MemoryError" in printed
    assert "pool, quantized is left out" in printed
    found = json.loads((tmp_path / "out" / "compare-stock.json").read_text())
    assert [(row["way"], row["ratio_to_stock"]) for row in found["rows"]] == [
        ("stock", 1),
        ("in-process", None),
        ("pool", pytest.approx(1 / 3)),
    ]
    assert (found["shapes"], found["steps"], found["repeat"]) == (["64x64@9f"], 2, 5)


def test_caches_are_kept_by_way_and_a_second_run_says_so(monkeypatch, tmp_path):
    def run(videos, groups, _tell):
        for (way,) in groups:
            rivals.cache(videos.cache_root, way).mkdir(parents=True, exist_ok=True)
            (rivals.cache(videos.cache_root, way) / "triton").touch()
        return {**videos.figures(), "ways": {}, "problems": {}}

    monkeypatch.setattr(rivals, "run", run)
    videos = rivals.Videos(Recipe(model_path="m"), [A], 2, 1, tmp_path)
    assert stock.run(videos, ["pool, quantized"], print)["caches_kept_from_before"] == []
    assert stock.run(videos, ["stock", "pool, quantized"], print)["caches_kept_from_before"] == ["pool, quantized"]


def test_a_ways_process_that_ends_too_early_or_too_late_says_so(monkeypatch, tmp_path):
    videos = rivals.Videos(Recipe(model_path="none"), [Shape(1, 1, 1)], 1, 1, tmp_path)
    found = rivals.run(videos, [["pool"]], print)
    assert found["ways"] == {"pool": {}}
    assert re.match(r"(?s)pool ended with status 1:.*ValueError: 1x1@1f: width", found["problems"]["pool"])
    monkeypatch.setattr(rivals, "TIMEOUT", 0.0)
    found = rivals.run(videos, [["stock"], ["in-process"]], print)
    assert {way: why.strip() for way, why in found["problems"].items()} == {
        "stock": "stock took longer than 0 s:",
        "in-process": "in-process took longer than 0 s:",
    }
