"""What a client sees: answers, mistakes, streaming, cancellation, shutdown."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from urllib.parse import urlparse

import httpx
import psutil
import pytest

from ltx2_pool.words.requests import MAX_SEED

from .conftest import LENIENT, A, B, alive, ask, check, family, file_size_limit, in_background, pids, wait


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"size": "1x1"}, "size '1x1' is not on the menu: choose 64x64, 96x64 or 64x96"),
        ({"seconds": 5}, "seconds 5 is not offered for 64x64"),
        ({"prompt": ""}, "prompt is empty"),
        ({"nvext": {"num_inference_steps": 0}}, "num_inference_steps must be from 1 to 50"),
        ({"nvext": {"guidance_scale": 7.5}}, "guidance_scale must be 1"),
        ({"output_format": "gif"}, "output_format 'gif'"),
        ({"input_reference": "x"}, "the picture is no data: URI"),
        ({"frames": 9}, "unknown field: 'frames'"),
    ],
)
def test_a_mistake_is_a_400_with_the_reason_and_starts_nothing(pool, fields, words):
    before = pids(pool)
    answer = pool.create(**{"prompt": "a fox", **fields})
    assert answer.status_code == 400
    assert words in answer.json()["message"]
    assert pids(pool) == before


def test_the_answer_says_which_shape_was_made(pool):
    answer = pool.create(size=B.size, nvext={"num_frames": B.num_frames, "seed": 7})
    body = answer.json()
    assert body["id"].endswith(f"_{B.key}_seed7_steps2")
    assert (body["data"][0]["fps"], body["data"][0]["audio_sample_rate"]) == (24, 24000)
    assert body["inference_time_s"] > 0


def test_the_seed_decides_the_video(pool):
    assert ask(pool, A, seed=1) == ask(pool, A, seed=1) != ask(pool, A, seed=2)


def test_a_stream_reports_each_step_and_ends_with_the_video(pool):
    *events, last, done = pool.stream(size=A.size, nvext={"num_inference_steps": 4})
    assert done == "[DONE]"
    progress = [(event["status"], event["progress"]) for event in map(json.loads, events)]
    assert progress == [("in_progress", percent) for percent in (0, 25, 50, 75)]
    final = json.loads(last)
    assert (final["status"], final["progress"]) == ("completed", 100)
    assert final["data"][0]["b64_json"]


def test_a_url_is_delivered_through_the_media_store(pool):
    answer = pool.create(size=A.size, response_format="url")
    (data,) = answer.json()["data"]
    assert data["url"].startswith("http://media.example/v/videos/64x64@9f-")
    root = pool._environment["LTX2_MEDIA_OUTPUT_FS_URL"].removeprefix("file://")
    with open(f"{root}/videos/{urlparse(data['url']).path.rsplit('/', 1)[1]}", "rb") as file:  # noqa: PTH123
        check(file.read(), A)


def test_a_client_that_leaves_stops_its_job_and_not_the_process(pool):
    ask(pool, A)
    before, seen = pids(pool), len(pool.log("worker"))
    body = {
        "model": pool.model_name,
        "prompt": "x",
        "size": A.size,
        "stream": True,
        "nvext": {"num_inference_steps": 50},
    }
    try:
        with (
            httpx.Client(base_url=pool.client.base_url, timeout=60) as client,
            client.stream("POST", "/v1/videos", json=body) as response,
        ):
            next(response.iter_lines())
            os.kill(before[A.key], signal.SIGSTOP)  # a few steps into fifty: a busy machine must not make them all
        wait(lambda: "cancelled by its client" in pool.log("worker")[seen:])
    finally:
        os.kill(before[A.key], signal.SIGCONT)
    check(ask(pool, A), A)
    assert pids(pool) == before


def test_prompts_stay_out_of_the_log(pool):
    assert pool.create("a very secret fox", size=A.size).status_code == 200
    assert "secret fox" not in pool.log("worker")


def test_prompts_stay_out_of_the_log_when_a_job_fails(pool):
    """Refused by the pipeline, and failed in the middle of its file: both print a traceback."""
    ask(pool, A)
    before = len(pool.log("worker"))
    prompt = "a very secret fox " * 20
    assert pool.create(prompt, size=A.size, nvext={"seed": MAX_SEED}).status_code == 400
    with file_size_limit(pids(pool)[A.key], 1000):
        assert pool.create(prompt, size=A.size).status_code == 500
    check(ask(pool, A), A)
    printed = pool.log("worker")[before:]
    assert "StageVerificationError" in printed
    assert "File too large" in printed
    assert printed.count("Traceback") >= 2
    assert "secret" not in pool.log("worker") + pool.log("frontend")


def test_sigterm_lets_the_running_job_finish(make_stack):
    worker = make_stack(program=LENIENT, LTX2_POOL_MODE="1")
    ask(worker, A)
    tree = family(worker)
    answer = in_background(lambda: worker.create(size=A.size, nvext={"num_inference_steps": 50}))
    wait(lambda: worker.status()["running"])
    assert worker.create(size="1x1").status_code == 400  # the job's way back to the frontend is open, as this one's is
    assert worker.stop_worker() == 0
    assert answer.result(60).status_code == 200
    assert alive(tree) == []


def test_kill_9_of_the_worker_takes_its_whole_tree_along(make_stack, tmp_path):
    """In the middle of a cold compile, when compilers run that the shape process started."""
    stack = make_stack(cache_root=tmp_path / "cold", LTX2_POOL_MODE="1")

    request = in_background(lambda: stack.create(size=A.size))

    def tree_that_compiles() -> list[psutil.Process]:
        assert not request.done(), stack.log_tail("worker")
        tree = family(stack)
        return tree if "cc1plus" in map(_name, tree) else []

    tree = wait(tree_that_compiles)
    os.kill(stack.worker.pid, signal.SIGKILL)
    assert alive(tree, timeout=2) == []
    with contextlib.suppress(httpx.HTTPError):
        assert request.result(60).status_code >= 500


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name()
    return ""
