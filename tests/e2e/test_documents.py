"""Every command of the documents that is not marked with what it needs is run here, as it stands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ltx2_pool.model import mp4
from ltx2_pool.programs import demo
from ltx2_pool.tools import stack
from ltx2_pool.tools.drawing import clips, recogniser
from tests.documents import Command, commands
from tests.paths import REPOSITORY

from .conftest import MENU, A

ELSEWHERE = {
    "make test": "this run",
    "make serve": "test_gateway.py: test_serve_stays_up_until_ctrl_c_and_leaves_nothing",
    "make demo": "test_documents.py: test_the_demo_shows_cold_and_hot_videos",
    "kill -TERM $WORKER_PID": "test_endpoint.py: test_sigterm_lets_the_running_job_finish",
}
"""Commands that another test runs."""


def bare(command: Command) -> str:
    return command.text.partition(" # ")[0].strip()


HERE = [command for command in commands() if not command.mark and bare(command) not in ELSEWHERE]


def test_what_is_run_elsewhere_is():
    assert set(ELSEWHERE) <= {bare(command) for command in commands()}
    for place in ELSEWHERE.values():
        file, _, name = place.partition(": ")
        assert not name or f"def {name}(" in Path(__file__).with_name(file).read_text()


@pytest.mark.parametrize("command", HERE, ids=str)
def test_a_command_works_as_it_stands(pool, model, baked, tmp_path, command):
    text = command.text
    for written, meant in {
        "localhost:8000": f"127.0.0.1:{pool.http_port}",
        "localhost:$DYN_SYSTEM_PORT": f"127.0.0.1:{pool.system_port}",
        "WORKER:9090": f"127.0.0.1:{pool.system_port}",
        "/cache": str(baked),
        # The tiny menu's first shape in the place of the real menu's, in two ways.
        '"size": "768x512", "seconds": 5': f'"size": "{A.size}"',
        '"model": "ltx2-distilled"': f'"model": "{pool.model_name}"',
    }.items():
        text = text.replace(written, meant)
    text = re.sub(r"(?<!\w)DIR\b", str(model), text)
    looks_at_worker = re.search(r"worker(\.py)? status", text) is not None
    port = pool.system_port if looks_at_worker else stack.free_port()
    (tmp_path / "shapes.yaml").symlink_to(REPOSITORY / "shapes.yaml")
    for program in ("worker.py", "warmup.py", "benchmark.py", "deploy"):
        (tmp_path / program).symlink_to(REPOSITORY / program)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=tmp_path,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DYN_SYSTEM_PORT": str(port),
            "DYN_DISCOVERY_BACKEND": "file",
            "LTX2_SHAPES": str(MENU),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if (tmp_path / "fox.mp4").exists():
        assert mp4.probe((tmp_path / "fox.mp4").read_bytes()).num_frames == A.num_frames


def test_the_demo_shows_cold_and_hot_videos(model, baked, tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    (work / model.name).symlink_to(model)
    shutil.copytree(baked, work / "cache")
    done = subprocess.run(
        [sys.executable, "-m", "ltx2_pool.programs.demo", "--work", str(work), "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("│") for line in done.stdout.splitlines() if ".mp4" in line]
    assert [row[2].strip() for row in rows] == ["cold", "cold", "hot", "picture"]
    assert len(list(out.glob("*.mp4"))) == 4
    assert (out / "contact-sheet.png").read_bytes().startswith(b"\x89PNG")
    known = {scene.caption(phrase): scene for scene in clips.scenes() for phrase in (0, 1)}
    asked = zip((row[1].strip() for row in rows), (*demo.PROMPTS, demo.PICTURED.caption()), strict=True)
    for (shape, prompt), state in zip(asked, ("cold", "cold", "hot", "picture"), strict=True):
        video = mp4.thumbnails((out / f"{shape.replace('@', '_')}-{state}.mp4").read_bytes(), 9)
        assert recogniser.recognise(np.stack(video)).agrees(known[prompt]), prompt
