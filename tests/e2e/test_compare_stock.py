"""``compare --stock`` for real: FastVideo's own generator, in-process and a pool make the same tiny video."""

from __future__ import annotations

import json
import shutil
import subprocess

from ltx2_pool.words.shapes import CacheDirs, Key

from .conftest import BENCHMARK, MENU, WORK, A, merge


def test_stock_in_process_and_pool_are_measured_on_one_checkpoint(model, baked, tmp_path):
    caches = WORK / "compare" / "compare-stock"  # kept for the next run: nobody else compiles as stock does
    merge(baked, caches / "in-process", A)
    shutil.copytree(CacheDirs.of(baked, Key(A)).root, CacheDirs.of(caches / "pool", Key(A)).root, dirs_exist_ok=True)
    where = ("--model", str(model), "--shapes", str(MENU), "--cache-root", str(caches.parent), "--out", str(tmp_path))
    what = ("--shape", A.key, "--steps", "1", "--repeat", "2")
    done = subprocess.run(
        [*BENCHMARK, "compare", "--stock", *where, *what], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pool, quantized is left out: a CPU computes FP8 by way of bfloat16" in done.stdout
    assert "Stock runs in this project's executor" in done.stdout
    found = json.loads((tmp_path / "compare-stock.json").read_text())
    assert (found["shapes"], found["steps"], found["repeat"], found["problems"]) == ([A.key], 1, 2, {})
    rows = {row["way"]: row for row in found["rows"]}
    assert list(rows) == ["stock", "in-process", "pool"]
    for way, row in rows.items():
        assert row["first_s"] >= row["steady_s"] > 0
        assert row["ratio_to_stock"] == row["steady_s"] / rows["stock"]["steady_s"]
        assert all(row[f"{part}_s"] > 0 for part in ("text", "denoise", "decode"))
        assert (row["encode_s"] is None) == (way == "stock")
        assert len(found["ways"][way][A.key]["steady_s"]) == 2
    assert rows["pool"]["first_hot_to_steady"] > 0
    assert len((tmp_path / "compare-stock.csv").read_text().splitlines()) == 4
    assert (tmp_path / "compare-stock.png").read_bytes().startswith(b"\x89PNG")
