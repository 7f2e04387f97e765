"""A worker whose lease lapsed is served from again, with the real frontend and file discovery."""

from __future__ import annotations

import os
import resource
import signal
import time

import psutil
import pytest

from ltx2_pool.serving.exits import LOST
from tests.serving.test_dynamo import make, wait

BACK = 15
"""Seconds after the end of the fault within which requests must be served again."""


@pytest.fixture
def stack(tmp_path):
    with make(tmp_path) as running:
        yield running


def fallen_out(stack) -> bool:
    return not any(path.is_file() for path in (stack.directory / "discovery").rglob("*generate*"))


def back_in_time(stack) -> None:
    began = time.monotonic()
    wait(lambda: stack.create("fine").status_code == 200, timeout=BACK)
    print(f"served again after {time.monotonic() - began:.1f} s")
    # And the lease is renewed again: a lapse takes 10 s.
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        assert stack.create("fine").status_code == 200
        assert not fallen_out(stack)
        time.sleep(0.5)


def test_a_worker_that_was_stopped_for_a_while_is_served_from_again(stack):
    assert stack.create("fine").status_code == 200
    os.kill(stack.worker.pid, signal.SIGSTOP)
    wait(lambda: fallen_out(stack))
    wait(lambda: stack.create("fine").status_code == 404)
    os.kill(stack.worker.pid, signal.SIGCONT)
    back_in_time(stack)
    assert "not in discovery" in stack.log("worker")
    assert stack.stop_worker() == 0


def test_a_worker_that_ran_out_of_descriptors_is_served_from_again(stack):
    assert stack.create("fine").status_code == 200
    worker = psutil.Process(stack.worker.pid)
    soft, hard = worker.rlimit(psutil.RLIMIT_NOFILE)
    worker.rlimit(psutil.RLIMIT_NOFILE, (3, hard))
    wait(lambda: fallen_out(stack))
    wait(lambda: "could not enter discovery now" in stack.log("worker"))
    worker.rlimit(psutil.RLIMIT_NOFILE, (soft, hard))
    back_in_time(stack)
    assert stack.stop_worker() == 0


def test_a_worker_that_cannot_get_back_ends_for_its_supervisor(stack):
    assert stack.create("fine").status_code == 200
    worker = psutil.Process(stack.worker.pid)
    worker.rlimit(psutil.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    assert stack.worker.wait(120) == LOST
    assert "ending with status 3: not in discovery" in stack.log("worker")
