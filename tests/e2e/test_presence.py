"""A worker whose lease lapsed is served from again, with the real frontend and file discovery."""

from __future__ import annotations

import os
import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import psutil

from ltx2_pool.serving.exits import LOST
from tests.fleet.conftest import MadeUpFleet
from tests.serving.test_dynamo import make, wait

BACK = 15
"""Seconds after the end of the fault within which requests must be served again."""


def fallen_out(stack) -> bool:
    return not any(path.is_file() for path in (stack.directory / "discovery").rglob("*generate*"))


def renewed(stack) -> list[int]:
    """When the lease was: with the file backend a renewal touches the instance's file."""
    instances = (stack.directory / "discovery").rglob("instances/*generate*")
    return [path.stat().st_mtime_ns for path in instances if path.is_file()]


def back_in_time(stack) -> None:
    began = time.monotonic()
    wait(lambda: stack.create("fine").status_code == 200, timeout=BACK)
    print(f"served again after {time.monotonic() - began:.1f} s")
    for _ in range(2):  # and the lease is renewed again
        last = renewed(stack)
        wait(lambda last=last: renewed(stack) != last, timeout=10)
    assert stack.create("fine").status_code == 200


def stopped_for_a_while(stack):
    assert stack.create("fine").status_code == 200
    os.kill(stack.worker.pid, signal.SIGSTOP)
    wait(lambda: fallen_out(stack))
    wait(lambda: stack.create("fine").status_code == 404)
    os.kill(stack.worker.pid, signal.SIGCONT)
    back_in_time(stack)
    assert "not in discovery" in stack.log("worker")
    assert stack.stop_worker() == 0


def ran_out_of_descriptors(stack):
    assert stack.create("fine").status_code == 200
    worker = psutil.Process(stack.worker.pid)
    soft, hard = worker.rlimit(psutil.RLIMIT_NOFILE)
    worker.rlimit(psutil.RLIMIT_NOFILE, (3, hard))
    wait(lambda: fallen_out(stack))
    wait(lambda: "descriptors are short" in stack.log("worker"))
    worker.rlimit(psutil.RLIMIT_NOFILE, (soft, hard))
    back_in_time(stack)
    assert stack.stop_worker() == 0


def cannot_get_back(stack):
    assert stack.create("fine").status_code == 200
    worker = psutil.Process(stack.worker.pid)
    worker.rlimit(psutil.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    assert stack.worker.wait(120) == LOST
    assert "ending with status 3: fewer than" in stack.log("worker")


def stopped_behind_a_router(fleet):
    def heard() -> float:
        return fleet.metric("ltx2_router_workers{", state="heard")

    assert heard() == 1
    os.kill(fleet.workers[0].pid, signal.SIGSTOP)
    wait(lambda: not any(path.is_file() for path in (fleet.directory / "discovery").rglob("*video*generate*")))
    os.kill(fleet.workers[0].pid, signal.SIGCONT)
    wait(lambda: heard() == 1 and fleet.create("fine").status_code == 200, timeout=BACK)


def test_workers_that_discovery_has_lost_are_served_from_again_or_end_for_their_supervisor(tmp_path):
    """Side by side, because they mostly wait: two were stopped, one of them behind a router, one has no descriptors for
    a while, one for ever."""

    def one(scenario) -> None:
        directory = tmp_path / scenario.__name__
        directory.mkdir()
        behind = scenario is stopped_behind_a_router
        with MadeUpFleet(directory / "stack", 1) if behind else make(directory) as running:
            scenario(running)

    with ThreadPoolExecutor() as side_by_side:
        list(
            side_by_side.map(
                one, (stopped_for_a_while, ran_out_of_descriptors, cannot_get_back, stopped_behind_a_router)
            )
        )
