"""ltx2-warmup on the tiny menu: bake, prove, resume, and everything that goes wrong on the way."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ltx2_pool.caches import bake
from ltx2_pool.processes.environment import inherited
from ltx2_pool.tools.stack import WORKER
from ltx2_pool.words.protocol import Compiled

from .conftest import MENU, WARMUP, A, B, C, ask, merge

PROBE = Path(__file__).with_name("order_probe.py")
# File permissions bind root as well without these two capabilities: the image runs as nobody special.
UNPRIVILEGED = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []


def warmup(model: Path, cache_root: Path, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
    command = [*UNPRIVILEGED, *WARMUP, *where(model, cache_root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, **options)


def where(model: Path, cache_root: Path) -> list[str]:
    return ["--shapes", str(MENU), "--model", str(model), "--cache-root", str(cache_root)]


def test_baked_shapes_are_skipped(model, baked):
    again = warmup(model, baked)
    assert again.returncode == 0, again.stdout + again.stderr
    for shape in (A, B, C):
        assert f" {shape.key}: baked already, skipped\n" in again.stdout


def test_verify_finds_no_miss_no_new_file_and_the_same_video(model, baked, tmp_path):
    report = tmp_path / "report.json"
    done = warmup(model, baked, "--verify", "--jobs", "2", "--report", str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    shapes = json.loads(report.read_text())["shapes"]
    assert {s["shape"] for s in shapes} == {A.key, B.key, C.key}
    for shape in shapes:
        assert shape["problems"] == shape["new_files"] == []
        assert shape["same_video"] is True
        graphs = 2 if shape["shape"] == A.key else 1  # of the others, none starts from a picture
        assert shape["compiled"] == Compiled(graph_hits=graphs, autograd_hits=graphs).model_dump()


@pytest.fixture
def damaged(baked, tmp_path) -> Path:
    """A copy of one baked shape, to damage."""
    shutil.copytree(baked / "per-shape" / A.key, tmp_path / "per-shape" / A.key)
    return tmp_path


@pytest.mark.parametrize("damage", ["tampered", "missing", "recipe"])
def test_verify_fails_loudly_on_a_damaged_cache(model, damaged, damage):
    arguments = ["--verify", "--only", A.key]
    kernel = next((damaged / "per-shape" / A.key).rglob("*.so"))
    if damage == "tampered":
        kernel.write_bytes(b"\0" + kernel.read_bytes()[1:])
        words = f"{kernel.name}: baked sha256"
    elif damage == "missing":
        kernel.unlink()
        words = f"{kernel.name}: baked"
    else:
        arguments.append("--no-compile")
        words = "compile: baked True, found False"
    done = warmup(model, damaged, *arguments)
    assert done.returncode == 1
    assert words in done.stdout
    assert "0 of 1 shapes are good" in done.stdout


def test_verify_fails_when_the_cache_lacks_an_entry_that_the_manifest_does_not_know(model, damaged):
    """The manifest agrees with the files, and still the fresh process has to compile."""
    root = damaged / "per-shape" / A.key
    shutil.rmtree(root / "torchinductor" / "aotautograd")
    document = json.loads((root / "manifest.json").read_text())
    document["files"] = {name: file for name, file in document["files"].items() if "/aotautograd/" not in name}
    (root / "manifest.json").write_text(json.dumps(document))
    done = warmup(model, damaged, "--verify", "--only", A.key)
    assert done.returncode == 1
    assert "2 autograd misses in the compile cache" in done.stdout  # of text, and of a picture


def test_strict_policy_refuses_a_cache_baked_otherwise_and_says_how_to_fix_it(model, damaged):
    settings = {
        "LTX2_MODEL": str(model),
        "LTX2_SHAPES": str(MENU),
        "LTX2_CACHE_ROOT": str(damaged),
        "LTX2_POOL_MODE": "1",
        "LTX2_CACHE_POLICY": "strict",
        "LTX2_ATTENTION_BACKEND": "FLASH_ATTN",
    }
    done = subprocess.run(WORKER, env={**os.environ, **settings}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"{A.key}: attention_backend: baked TORCH_SDPA, found FLASH_ATTN" in done.stderr
    assert f"ltx2-warmup --only {B.key} --force" in done.stderr


def test_a_baked_worker_serves_strictly_and_compiles_nothing(model, baked, make_stack):
    before = set((baked / "per-shape").rglob("*"))
    stack = make_stack(cache_root=baked, LTX2_POOL_MODE="1", LTX2_CACHE_POLICY="strict")
    ask(stack, A)
    assert "3 of 3 shapes are baked" in stack.log("worker")
    assert set((baked / "per-shape").rglob("*")) == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_bake_leaves_nothing_that_looks_finished(model, tmp_path, number):
    process = subprocess.Popen(
        [*WARMUP, *where(model, tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    while "starting" not in (line := process.stdout.readline()):
        assert line
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert list((tmp_path / "per-shape").glob("[!.]*")) == []
    leftovers = list((tmp_path / "per-shape").glob(".*"))
    assert bool(leftovers) is (number == signal.SIGKILL)
    with bake.lock(tmp_path):  # free again
        pass


def test_a_full_disk_fails_the_shape_and_leaves_nothing(model, tmp_path):
    """No file may grow over 64 KiB: the compiler's output does not fit."""

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    done = warmup(model, tmp_path, "--only", A.key, preexec_fn=small_files)
    assert done.returncode == 1, done.stdout
    assert "bake failed" in done.stdout
    assert list((tmp_path / "per-shape").iterdir()) == []


def test_the_order_of_shapes_does_not_change_the_keys(model, baked, tmp_path):
    """A then B, and B then A, in one process look up the very keys that A and B were baked with in processes alone."""

    # With what a worker's environment may have and its children must not: CI is part of torch's keys
    # (torch/_functorch/config.py: error_on_custom_op_aliasing).
    environment = inherited({**os.environ, "CI": "true"})

    def probe(root: str, *keys: str) -> subprocess.Popen[str]:
        merge(baked, tmp_path / root, A, B)
        command = [sys.executable, str(PROBE), str(model), str(tmp_path / root), *keys]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    for process in (probe("ab", A.key, B.key), probe("ba", B.key, A.key)):
        output, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors
        found = json.loads(output.splitlines()[-1])
        # The third key is of the videos of A that start from a picture.
        assert found == {"graph_keys": 3, "autograd_keys": 3, "hits": 4, "misses": 0}, errors


def test_the_plan_says_what_would_be_started(model, baked):
    settings = {"LTX2_POOL_MODE": "1", "LTX2_POOL_PREWARM": f"{B.key},{A.key}", "COLUMNS": "140"}
    plan = subprocess.run(
        [*WORKER, "--plan", *where(model, baked)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert plan.returncode == 0, plan.stderr
    rows = {row[1]: row for row in (line.split("│") for line in plan.stdout.splitlines() if line.startswith("│"))}
    rows = {key.strip(): [cell.strip() for cell in row] for key, row in rows.items()}
    assert [rows[shape.key][-2] for shape in (A, B, C)] == ["2.", "1.", "on request"]
    assert {row[2] for row in rows.values()} == {"baked"}
    assert "zygote, weights shared" in plan.stdout
    assert "; 2 of 3 shapes" in " ".join(plan.stdout.split())


def test_help_and_mistakes(model, tmp_path):
    assert "--verify" in warmup(model, tmp_path, "--help").stdout
    wrong = warmup(model, tmp_path, "--only", "1x1@1f")
    assert wrong.returncode == 2
    assert "1x1@1f is not on the menu: 64x64@9f" in wrong.stderr
