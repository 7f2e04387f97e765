"""What a client sees: answers, mistakes, streaming, cancellation, shutdown."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import threading
import time
from urllib.parse import urlparse

import httpx
import psutil
import pytest

from .conftest import A, B, alive, ask, check, family, pids


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"size": "1x1"}, "size '1x1' is not on the menu: choose 64x64, 96x64 or 64x96"),
        ({"seconds": 5}, "seconds 5 is not offered for 64x64"),
        ({"prompt": ""}, "prompt is empty"),
        ({"nvext": {"num_inference_steps": 0}}, "num_inference_steps must be from 1 to 50"),
        ({"nvext": {"guidance_scale": 7.5}}, "guidance_scale must be 1"),
        ({"output_format": "gif"}, "output_format 'gif'"),
        ({"input_reference": "x"}, "from text only"),
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
    assert body["id"].endswith(f"_{B.key}")
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
    before = pids(pool)
    body = {
        "model": pool.model_name,
        "prompt": "x",
        "size": A.size,
        "stream": True,
        "nvext": {"num_inference_steps": 50},
    }
    with (
        httpx.Client(base_url=pool.client.base_url, timeout=60) as client,
        client.stream("POST", "/v1/videos", json=body) as response,
    ):
        next(response.iter_lines())  # and the connection closes, a few steps into fifty
    check(ask(pool, A), A)
    assert pids(pool) == before
    assert "cancelled by its client" in pool.log("worker")


def test_prompts_stay_out_of_the_log(pool):
    pool.create("a very secret fox", size=A.size)
    assert "secret fox" not in pool.log("worker")


def test_the_idle_worker_is_light(pool):
    worker = psutil.Process(pool.worker.pid)
    assert worker.memory_info().rss < 200e6
    worker.cpu_percent()
    assert worker.cpu_percent(interval=3) < 1


def test_the_way_through_the_pool_costs_little(pool):
    """A hot request takes at most 1.1 times what the generator itself takes for it."""
    ask(pool, A, num_inference_steps=20)
    ratios = []
    for _ in range(9):
        began = time.monotonic()
        ask(pool, A, num_inference_steps=20)
        elapsed = time.monotonic() - began
        line = [line for line in pool.log("worker").splitlines() if " done shape=" in line][-1]
        phases = dict(part.split("=") for part in line.split() if part.count("=") == 1)
        own = sum(float(phases[name]) for name in ("text", "denoise", "decode", "encode"))
        ratios.append(elapsed / own)
    assert statistics.median(ratios) <= 1.1, ratios


def test_sigterm_lets_the_running_job_finish(pool, make_stack):
    worker = make_stack(LTX2_POOL_MODE="1")
    ask(worker, A)
    tree = family(worker)
    answers: list[httpx.Response] = []
    request = threading.Thread(
        target=lambda: answers.append(worker.create(size=A.size, nvext={"num_inference_steps": 50}))
    )
    request.start()
    while not worker.status()["running"]:
        pass
    assert worker.stop_worker() == 0
    request.join()
    assert answers[0].status_code == 200
    assert alive(tree) == []


def test_kill_9_of_the_worker_takes_its_whole_tree_along(make_stack, tmp_path):
    """In the middle of a cold compile, when compilers run that the shape process started."""
    stack = make_stack(cache_root=tmp_path / "cold", LTX2_POOL_MODE="1")

    def lost_request() -> None:
        with contextlib.suppress(httpx.HTTPError):
            stack.create(size=A.size)

    request = threading.Thread(target=lost_request)
    request.start()
    tree = family(stack)
    while not _has_compiler(tree):
        assert request.is_alive(), stack.log_tail("worker")
        tree = family(stack)
    os.kill(stack.worker.pid, signal.SIGKILL)
    assert alive(tree, timeout=2) == []
    request.join()


def _has_compiler(tree: list[psutil.Process]) -> bool:
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() == "cc1plus":
                return True
    return False
