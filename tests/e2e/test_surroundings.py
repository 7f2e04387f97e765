"""The real worker behind the real frontend while its surroundings fail: what everybody who asks is told, and after."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, as_completed
from pathlib import Path

import httpx
import psutil
import pytest

from ltx2_pool.tools.stack import Stack
from ltx2_pool.words.requests import MAX_SEED
from ltx2_pool.words.shapes import Shape

from .conftest import A, B, C, alive, ask, check, family, in_background, merge, pids, stacks, video, wait
from .test_metrics import scrape, value

BACK = 20
"""Seconds after the end of a fault within which requests must be served again."""
ANSWERED = 30
"""Seconds after the end of a fault within which everybody who asked during it must have an answer."""


@pytest.fixture(scope="module")
def own_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that a test may move."""
    return shutil.copytree(model, tmp_path_factory.mktemp("own") / "model")


@pytest.fixture(scope="module")
def stack(own_model: Path, baked: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with stacks(own_model, baked, tmp_path_factory) as make:
        yield make(LTX2_POOL_MODE="1", LTX2_RUN_DIR=str(tmp_path_factory.mktemp("run")))


def run_dir(stack: Stack) -> Path:
    (found,) = Path(stack._environment["LTX2_RUN_DIR"]).glob("worker-*")
    return found


def nothing_left(stack: Stack) -> bool:
    return not list(run_dir(stack).rglob("*.mp4"))


def request(stack: Stack, shape: Shape, **nvext: object) -> httpx.Response:
    return stack.create(size=shape.size, nvext={"num_frames": shape.num_frames, **nvext})


def served(stack: Stack, shape: Shape, timeout: float = BACK) -> None:
    wait(lambda: request(stack, shape).status_code == 200, timeout)


def fallen_out(stack: Stack) -> bool:
    """Whether the worker is out of discovery, by what the file backend keeps."""
    return not any(path.is_file() for path in (stack.directory / "discovery").rglob("*generate*"))


def models(stack: Stack) -> list[str]:
    return [model["id"] for model in stack.client.get("/v1/models").json().get("data", [])]


def health(stack: Stack) -> int:
    return httpx.get(f"http://127.0.0.1:{stack.system_port}/health", timeout=10).status_code


@contextlib.contextmanager
def few_descriptors(stack: Stack, spare: int) -> Iterator[None]:
    """The worker can open that many more, and then gets EMFILE."""
    worker = psutil.Process(stack.worker.pid)
    taken = {int(name) for name in os.listdir(f"/proc/{worker.pid}/fd")}  # noqa: PTH208
    free = (number for number in range(2**16) if number not in taken)
    limit = [next(free) for _ in range(spare + 1)][-1]
    soft, hard = worker.rlimit(psutil.RLIMIT_NOFILE)
    worker.rlimit(psutil.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        worker.rlimit(psutil.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(("spare", "seconds"), [(0, 15), (5, 4)])
def test_a_worker_at_its_limit_of_descriptors_tells_the_truth_and_recovers(stack, spare, seconds):
    """For so long that it falls out of discovery, and for a moment."""
    for shape in (A, B):
        served(stack, shape)
    worker = stack.worker.pid
    untrue: list[str] = []

    def one(shape: Shape) -> int:
        was_out = fallen_out(stack)
        answer = request(stack, shape)
        if answer.status_code == 200:
            check(video(answer), shape)
        elif answer.status_code not in (500, 503) and not (
            answer.status_code == 404 and (was_out or fallen_out(stack))
        ):
            untrue.append(f"{answer.status_code} {answer.text}")
        return answer.status_code

    with few_descriptors(stack, spare):
        asked = [in_background(lambda shape=shape: one(shape)) for shape in (A, B, C, A) * 3]
        with contextlib.suppress(AssertionError):  # those that wait for a start may wait until the limit is lifted
            wait(lambda: all(future.done() for future in asked), seconds)
    began = time.monotonic()
    for shape in (A, B, C):
        served(stack, shape, began + BACK - time.monotonic())
    assert stack.worker.pid == worker
    assert stack.worker.poll() is None
    wait(lambda: nothing_left(stack))
    status = stack.status()
    assert (status["waiting"], status["running"]) == (0, 0)  # the worker owes nobody an answer
    assert untrue == []
    # Dynamo itself would let those hang for which it had no descriptor.
    wait(lambda: all(future.done() for future in asked), 10)


def test_a_run_directory_that_cannot_be_written_is_a_503_and_costs_no_process(stack):
    expected = {shape: ask(stack, shape) for shape in (A, B)}
    before = pids(stack)
    for directory in (run_dir(stack) / "videos", run_dir(stack)):
        aside = directory.with_name("aside")
        directory.rename(aside)
        directory.touch()
        try:
            for shape in (A, B):
                assert request(stack, shape).status_code == 503
        finally:
            directory.unlink()
            aside.rename(directory)
        for shape in (A, B):
            assert ask(stack, shape) == expected[shape]
    assert pids(stack) == before
    assert "the file for the video cannot be made" in stack.log("worker")
    assert nothing_left(stack)


def test_a_checkpoint_that_is_away_for_a_while(stack, own_model):
    """Hot shapes serve on; when nothing can be made the worker is out of discovery, and back when something can."""
    for shape in (A, B):
        served(stack, shape)
    before = pids(stack)
    own_model.rename(own_model.with_name("away"))
    try:
        for shape in (A, B):
            check(ask(stack, shape), shape)
        assert pids(stack).items() >= {(A.key, before[A.key]), (B.key, before[B.key])}

        os.kill(before[A.key], signal.SIGKILL)
        lost = in_background(lambda: request(stack, A))
        check(ask(stack, B), B)
        assert pids(stack)[B.key] == before[B.key]

        # What is lent is kept: the next weights process needs no checkpoint, and nobody else notices.
        weights = stack.status()["helpers"]["weights"]
        os.kill(weights, signal.SIGKILL)
        wait(lambda: stack.status()["helpers"]["weights"] not in (None, weights))
        check(ask(stack, B), B)
        assert pids(stack)[B.key] == before[B.key]

        for pid in pids(stack).values():
            with contextlib.suppress(ProcessLookupError):  # a start that fails may be on its way out
                os.kill(pid, signal.SIGKILL)
        tried = [in_background(lambda shape=shape: request(stack, shape)) for shape in (B, C)]
        wait(lambda: stack.status()["health"] == "unable")
        wait(lambda: health(stack) == 503)
        wait(lambda: stack.model_name not in models(stack))
        assert request(stack, B).status_code in (404, 503)
        assert stack.status()["helpers"]["weights"]
    finally:
        own_model.with_name("away").rename(own_model)
    wait(lambda: stack.status()["health"] == "able")
    wait(lambda: health(stack) == 200)
    wait(lambda: stack.model_name in models(stack))
    assert {answer.result(ANSWERED).status_code for answer in (lost, *tried)} <= {200, 503}
    for shape in (A, B):  # each has a pause of its own, after three starts that failed
        served(stack, shape, timeout=120)
        assert pids(stack)[shape.key] != before[shape.key]
    assert nothing_left(stack)


@pytest.fixture(scope="module")
def alone(model: Path, baked: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Stack]]:
    """Workers with LTX2_POOL_MODE=0, one after the other behind one frontend."""
    root = tmp_path_factory.mktemp("alone")
    merge(baked, root / "cache" / "in-process", A, B)
    with stacks(model, baked, tmp_path_factory) as make:
        running: Stack | None = None

        def start(**options: str) -> Stack:
            nonlocal running
            if running is None:
                lenient = Path(__file__).with_name("lenient_worker.py")
                program = (sys.executable, str(lenient))
                running = make(cache_root=root / "cache", program=program, LTX2_POOL_MODE="0", **options)
            else:
                wait(lambda: not models(running))
                running._environment.update(options)
                running.start_worker()
                running.wait_ready()
            return running

        yield start


LONG = {"num_inference_steps": 50}


def in_work(stack: Stack) -> Future[httpx.Response]:
    """A long job that is being made, and whose way back to the frontend is open, as that of a later request is."""
    answer = in_background(lambda: request(stack, A, **LONG))
    wait(lambda: stack.status()["running"])
    assert stack.create(size="1x1").status_code == 400
    return answer


def test_without_the_pool_the_contract_is_the_same(alone):
    stack = alone(LTX2_POOL_MAX_QUEUE="1", LTX2_RUN_DIR="")
    ask(stack, A)
    before = scrape(stack)
    check(ask(stack, A), A)

    # One is made, one waits, and the others are told at once.
    burst = [in_background(lambda: request(stack, A, **LONG)) for _ in range(5)]
    statuses = [answer.result(60).status_code for answer in as_completed(burst)]
    made, refused = statuses.count(200), statuses.count(429)
    assert (statuses[0], made + refused) == (429, 5)

    # A client that leaves frees the generator.
    began = time.monotonic()
    ask(stack, A, **LONG)
    long = time.monotonic() - began
    body = {"model": stack.model_name, "prompt": "x", "size": A.size, "stream": True, "nvext": LONG}
    with (
        httpx.Client(base_url=stack.client.base_url, timeout=60) as client,
        client.stream("POST", "/v1/videos", json=body) as response,
    ):
        next(response.iter_lines())
    began = time.monotonic()
    check(ask(stack, A), A)
    assert time.monotonic() - began < long
    assert "cancelled by its client" in stack.log("worker")

    # One that fails says so, without its prompt.
    failed = stack.create("a very secret fox", size=A.size, nvext={"seed": MAX_SEED})
    assert (failed.status_code, "StageVerificationError" in failed.text) == (400, True)
    assert "Traceback" in stack.log("worker")
    assert "secret" not in stack.log("worker") + stack.log("frontend")

    series = scrape(stack)

    def grown(name: str, **labels: str) -> float:
        return value(series, name, **labels) - value(before, name, **labels)

    assert grown("ltx2_pool_request_total", shape_key=A.key, status="DONE") == made + 3
    assert grown("ltx2_pool_request_total", shape_key=A.key, status="ERROR") == 1
    assert grown("ltx2_pool_request_latency_seconds_count", shape_key=A.key) == made + 3
    assert grown("ltx2_pool_rejection_total", reason="queue_full") == refused
    assert grown("ltx2_pool_cancellation_total", shape_key=A.key) == 1

    # SIGTERM lets the job that is made finish.
    tree = family(stack)
    job = in_work(stack)
    assert stack.stop_worker() == 0
    assert job.result(60).status_code == 200
    assert alive(tree) == []

    # A deadline that no long job keeps, and every short one.
    stack = alone(LTX2_POOL_JOB_TIMEOUT=str(long / 2))
    served(stack, A)  # what it traces first may take longer
    assert request(stack, A, **LONG).status_code == 504
    served(stack, A)

    # A second SIGTERM waits for nothing.
    tree = family(stack)
    job = in_work(stack)
    stack.worker.send_signal(signal.SIGTERM)
    wait(lambda: stack.log("worker").count("ending with status 0: told to stop") == 2)
    assert stack.stop_worker(timeout=15) == 0
    assert job.result(60).status_code in (503, 504)  # 504 when its deadline was first
    assert alive(tree) == []
