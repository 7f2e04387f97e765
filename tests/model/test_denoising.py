"""What is the same in every step is made once, and the video is the same."""

from __future__ import annotations

import subprocess
import sys

from ltx2_pool.tools import stack
from tests.paths import REPOSITORY


def test_a_video_is_that_of_fastvideos_own_loop():
    command = [sys.executable, "-m", "tests.model.constants", str(stack.checkpoint(REPOSITORY / ".work"))]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[-3000:]
    assert all(float(apart) < 0.02 for apart in done.stdout.splitlines()[-1].split())  # other kernels, other sums
