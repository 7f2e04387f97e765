"""The made-up pool behind the real Dynamo frontend: statuses on the wire, discovery, signals, exits."""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from ltx2_pool.serving.exits import BROKEN, STOPPED
from ltx2_pool.tools.stack import TINY_MENU, Stack
from tests import waiting
from tests.paths import REPOSITORY
from tests.serving.made_up import CONTENT, STATUSES
from tests.waiting import in_background

PROGRAM = (sys.executable, "-m", "tests.serving.made_up_worker")


def make(directory: Path, **environment: str) -> Stack:
    """A frontend and a made-up worker that is steered through the directory."""
    return Stack(
        directory / "stack",
        directory,
        TINY_MENU,
        directory,
        program=PROGRAM,
        MADE_UP_DIR=str(directory),
        PYTHONPATH=str(REPOSITORY),
        **environment,
    )


wait = functools.partial(waiting.wait, timeout=30)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with make(tmp_path_factory.mktemp("worker")) as running:
        yield running


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Callable[..., Stack]]:
    """Stacks that a test may end, or ruin."""
    with contextlib.ExitStack() as started:
        yield lambda **environment: started.enter_context(make(tmp_path, **environment))


def test_a_video_crosses_the_wire(stack):
    answer = stack.create("fine", user="somebody")
    assert base64.b64decode(answer.json()["data"][0]["b64_json"]) == CONTENT


@pytest.mark.parametrize(("prompt", "status"), STATUSES.items())
def test_each_failure_has_its_status_and_quarantines_nobody(stack, prompt, status):
    assert stack.create(prompt).status_code == status
    assert stack.create("fine").status_code == 200


def test_a_stream_ends_with_the_video(stack):
    *events, last, done = stack.stream("fine")
    assert [json.loads(event)["status"] for event in events] == ["in_progress", "in_progress"]
    assert json.loads(last)["data"][0]["b64_json"]
    assert done == "[DONE]"


def test_unable_is_out_of_discovery_and_able_is_back(own, tmp_path):
    stack = own()
    (tmp_path / "health").write_text("unable")
    wait(lambda: stack.create("fine").status_code in (404, 503))
    assert httpx.get(f"http://127.0.0.1:{stack.system_port}/health").status_code == 503
    (tmp_path / "health").write_text("able")
    wait(lambda: stack.create("fine").status_code == 200)
    assert httpx.get(f"http://127.0.0.1:{stack.system_port}/health").status_code == 200


def test_broken_answers_what_is_there_and_ends_with_its_status(own, tmp_path):
    stack = own()
    job = in_background(lambda: stack.create("hold"))
    wait(lambda: stack.status()["running"])
    (tmp_path / "health").write_text("broken")
    wait(lambda: "ending with status" in stack.log("worker"))
    (tmp_path / "release").touch()
    assert job.result(20).status_code == 200
    assert stack.worker.wait(20) == BROKEN


def test_the_first_sigterm_drains(own, tmp_path):
    stack = own()
    job = in_background(lambda: stack.create("hold"))
    wait(lambda: stack.status()["running"])
    assert stack.create("fine", size="1x1").status_code == 400  # the job's way back is open, as this one's is
    stack.worker.send_signal(signal.SIGTERM)
    wait(lambda: stack.create("fine").status_code in (404, 503))
    (tmp_path / "release").touch()
    assert job.result(20).status_code == 200
    assert stack.worker.wait(20) == STOPPED


@pytest.mark.parametrize("signals", [1, 2])
def test_an_upload_that_hangs_outlives_neither_the_drain_nor_the_second_sigterm(own, signals):
    stack = own(
        LTX2_MEDIA_OUTPUT_FS_URL="hanging://media",
        LTX2_DRAIN_TIMEOUT="1" if signals == 1 else "600",
        LTX2_DELIVERY_TIMEOUT="1000",
    )
    uploads = [in_background(lambda: stack.create("fine", response_format="url")) for _ in range(3)]
    held = in_background(lambda: stack.create("hold"))
    wait(lambda: stack.status()["running"])
    assert stack.create("fine").status_code == 200  # base64, alongside uploads that hang
    stack.worker.send_signal(signal.SIGTERM)
    if signals == 2:
        wait(lambda: "ending with status 0" in stack.log("worker"))
        stack.worker.send_signal(signal.SIGTERM)
    assert [request.result(15).status_code for request in [*uploads, held]] == [503] * 4
    assert stack.worker.wait(10) == STOPPED
    assert "leaving without an orderly end" not in stack.log("worker")


def test_sigterm_during_the_start(tmp_path):
    (tmp_path / "not ready").touch()
    stack = make(tmp_path)
    stack.directory.mkdir()
    stack.start_worker()
    try:
        wait(lambda: "system port" in stack.log("worker"))
        assert stack.stop_worker(20) == STOPPED
    finally:
        stack.close()
