"""What clients ask of a model, by the commands of the README: pictures, two stages, every kind of checkpoint."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from ltx2_pool.tools import stack

from .conftest import BENCHMARK, WARMUP, WORK

MENU = """
model: ltx2-tiny
steps: 2
shapes:
  - {shape: 128x64@9, refine: {steps: 2}}
variants:
  ltx2-tiny-fast: {optimize: true, image: false, refine: false, shapes: [64x64@9]}
"""


@pytest.mark.timeout(420)
def test_a_checkpoint_makes_what_is_asked_of_it(tmp_path: Path) -> None:
    """Both kinds and both versions, in two of the four checkpoints: each is a worker to start."""
    command = [*BENCHMARK, "--work", str(WORK), "kinds", "--only", "2.0-distilled", "2.3-base", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = json.loads((tmp_path / "kinds.json").read_text())
    assert {o["checkpoint"] for o in outcomes} == {"LTX-2.0, distilled", "LTX-2.3, base"}
    of_pictures = [o for o in outcomes if o["psnr"] is not None]
    assert len(of_pictures) == 7
    assert all(o["psnr"] >= o["psnr_other"] + 8 for o in of_pictures)
    assert (tmp_path / "kinds.png").stat().st_size > 100_000


@pytest.mark.timeout(300)
def test_a_bake_proves_both_stages_pictures_and_every_variant(tmp_path: Path) -> None:
    menu, root, report = tmp_path / "menu.yaml", tmp_path / "cache", tmp_path / "report.json"
    menu.write_text(MENU)
    where = ["--model", str(stack.checkpoint(WORK)), "--shapes", str(menu), "--cache-root", str(root)]
    for options in ([], ["--verify", "--report", str(report)]):
        done = subprocess.run([*WARMUP, *where, *options], capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
    two_stages, fast = json.loads(report.read_text())["shapes"]
    assert (two_stages["shape"], fast["shape"]) == ("128x64@9f", "64x64@9f+ltx2-tiny-fast")
    # Of text and of a picture, at half the size and at all of it.
    assert (two_stages["compiled"]["graph_hits"], two_stages["compiled"]["graph_misses"]) == (4, 0)
    assert two_stages["picture_video_sha256"] not in ("", two_stages["video_sha256"])
    assert fast["picture_video_sha256"] == ""
    assert sorted(path.name for path in (root / "per-shape").iterdir()) == ["128x64@9f", "64x64@9f+ltx2-tiny-fast"]
    assert all(s["same_video"] and not s["new_files"] for s in (two_stages, fast))


@pytest.mark.timeout(240)
def test_hostile_pictures_are_refused_with_a_reason_and_cost_nothing(baked: Path, model: Path, tmp_path: Path) -> None:
    where = ["--model", str(model), "--shapes", str(stack.TINY_MENU), "--cache-root", str(baked)]
    command = [*BENCHMARK, "pictures", *where, "--count", "300", "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=220)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["inputs"], result["unexpected"]) == (300, [])
    assert len(result["refused"]) > 10
    assert result["accepted"] < 100
