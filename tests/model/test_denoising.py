"""What is the same in every step is made once, the video is the same, and the device is never without a step."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from ltx2_pool.model import engine, denoising  # isort: skip - the engine before FastVideo: it keeps its kernels out
from fastvideo.pipelines.basic.ltx2.stages import ltx2_denoising

from ltx2_pool.tools import stack
from tests.paths import REPOSITORY


def test_a_video_is_that_of_fastvideos_own_loop():
    command = [sys.executable, "-m", "tests.model.constants", str(stack.checkpoint(REPOSITORY / ".work"))]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[-3000:]
    assert all(float(apart) < 0.02 for apart in done.stdout.splitlines()[-1].split())  # other kernels, other sums


class Gpu:
    """Works on what was launched only while somebody waits for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launched = self.finished = 0
        gpu = self

        @dataclass
        class Event:
            after: int = 0

            def record(self) -> None:
                self.after = gpu.launched

            def synchronize(self) -> None:
                gpu.finished = max(gpu.finished, self.after)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: setattr(gpu, "finished", gpu.launched))
        monkeypatch.setattr(torch.cuda, "Event", Event)

    def stage(self, steps: int) -> None:
        """FastVideo's loop."""
        for _ in ltx2_denoising.tqdm(range(steps)):
            self.launched += 1


@pytest.mark.parametrize("stages", [[1], [2], [8], [8, 3], [1, 1]])
def test_a_step_is_told_when_it_is_done_and_the_next_one_runs(monkeypatch, stages):
    gpu, told = Gpu(monkeypatch), []

    def on_step(done: int, total: int) -> None:
        told.append((done, total))
        assert gpu.finished == done
        begun = done in (0, stages[0])  # a stage begins: there is nothing to run ahead of
        assert gpu.launched == done + (not begun)

    with denoising.steps_told(on_step, sum(stages)):
        for steps in stages:
            gpu.stage(steps)
    assert told == [(done, sum(stages)) for done in range(sum(stages))]


def test_a_job_is_stopped_with_one_step_more_at_most(monkeypatch):
    gpu = Gpu(monkeypatch)

    def on_step(done: int, _total: int) -> None:
        if done == 3:
            raise engine.Cancelled

    with pytest.raises(engine.Cancelled), denoising.steps_told(on_step, 8):
        gpu.stage(8)
    assert gpu.launched == 4


def test_without_a_gpu_nothing_runs_ahead():
    told: list[tuple[int, int]] = []
    with denoising.steps_told(lambda *step: told.append(step), 3):
        for index in ltx2_denoising.tqdm(range(3)):
            assert told[-1] == (index, 3)
    assert len(told) == 3
