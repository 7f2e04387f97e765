"""The tiny checkpoint draws what the prompt says, by FastVideo's own loop at the menu's steps."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from ltx2_pool.tools import stack
from tests.paths import REPOSITORY

PROMPTS = 40


def drawn(quantization: str = "") -> dict[str, Any]:
    model = str(stack.checkpoint(REPOSITORY / ".work"))
    command = [sys.executable, "-m", "tests.model.drawing", model, str(PROMPTS), quantization]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(found)
    return found


@pytest.mark.parametrize("quantization", ["", "FP8"])
def test_clips_show_what_prompts_say_that_were_not_trained_on(quantization):
    found = drawn(quantization)
    assert found["all"] >= 0.95
    assert found["mixed_up"] < 0.2  # the same clips, each looked at for another one's prompt
    assert all(nearness > 30 for nearness, _ in found["from_pictures"])
    assert sum(right for _, right in found["from_pictures"]) >= 7
    if not quantization:
        assert found["apart"] < 0.1, "the training no longer computes what the engine does"
