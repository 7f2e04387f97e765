"""Real routers between a real frontend and workers: what passes through, and what becomes of a lost worker."""

from __future__ import annotations

import base64
import contextlib
import json
import random
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from ltx2_pool.tools.stack import TINY_MENU
from ltx2_pool.words.menu import Menu
from tests.fleet.conftest import MadeUpFleet, wait
from tests.serving.made_up import CONTENT, STATUSES

SHAPES = Menu.load(TINY_MENU).shapes


def ask(stack: MadeUpFleet, number: int = 0, prompt: str = "fine") -> httpx.Response:
    shape = SHAPES[number]
    return stack.create(prompt, size=shape.size, nvext={"num_frames": shape.num_frames})


def test_a_video_crosses_the_router(fleet):
    assert base64.b64decode(ask(fleet).json()["data"][0]["b64_json"]) == CONTENT


def test_the_workers_hear_both_routers(fleet):
    wait(lambda: {fleet.status_of(number)["routers"] for number in range(3)} == {2})


@pytest.mark.parametrize(("prompt", "status"), STATUSES.items())
def test_each_failure_keeps_its_status_and_quarantines_nobody(fleet, prompt, status):
    assert ask(fleet, prompt=prompt).status_code == status
    assert ask(fleet).status_code == 200


def test_a_mistake_keeps_the_workers_words(fleet):
    answer = fleet.create("a fox", size="1x1")
    assert answer.status_code == 400
    assert "size '1x1' is not on the menu: choose" in answer.json()["message"]


def test_a_stream_passes_through(fleet):
    *events, last, done = fleet.stream("fine")
    assert [json.loads(event)["status"] for event in events] == ["in_progress", "in_progress"]
    assert json.loads(last)["data"][0]["b64_json"]
    assert done == "[DONE]"


def test_a_client_that_leaves_stops_its_job(fleet):
    body = {"model": fleet.model_name, "prompt": "hold", "stream": True}
    with (
        httpx.Client(base_url=fleet.client.base_url, timeout=60) as client,
        client.stream("POST", "/v1/videos", json=body) as response,
    ):
        lines = response.iter_lines()  # which closes the connection when it is forgotten
        next(lines)
        wait(lambda: sum(fleet.status_of(number)["running"] for number in range(3)) == 1)
    wait(lambda: sum(fleet.status_of(number)["running"] for number in range(3)) == 0)


def test_three_shapes_on_three_workers_with_a_place_each_are_hot(fleet):
    """Round robin would meet its shape in one of three workers."""
    chance = random.Random(1)
    asked = chance.choices(range(3), weights=(1, 1 / 2, 1 / 3), k=300)
    for shape in range(3):
        ask(fleet, shape)
    before = sum(fleet.status_of(number)["cold"] for number in range(3))
    assert {ask(fleet, shape).status_code for shape in asked} == {200}
    cold = sum(fleet.status_of(number)["cold"] for number in range(3)) - before
    assert cold <= 15


def test_a_router_that_ends_drains_and_the_other_one_takes_over(fleet):
    with ThreadPoolExecutor(4) as pool:
        held = pool.submit(ask, fleet, 0, "hold")
        wait(lambda: sum(fleet.status_of(number)["running"] for number in range(3)) == 1)
        fleet.routers[0].send_signal(signal.SIGTERM)
        wait(lambda: "leaving" in fleet.log("router0"))
        # The frontend gives up what it sends to an instance in the moment in which that leaves discovery.
        statuses = sorted(ask(fleet, number % 3).status_code for number in range(20))
        assert statuses in ([200] * 20, [200] * 19 + [503])
        assert fleet.routers[0].poll() is None or held.done()
        for number in range(3):
            (fleet.steered(number) / "release").touch()
        assert held.result(30).status_code == 200
    assert fleet.routers[0].wait(30) == 0


def test_kill_9_of_a_worker_under_load_loses_no_request(fleet):
    """The last test of this fleet: two workers are left."""
    for number in range(3):
        with contextlib.suppress(FileNotFoundError):
            (fleet.steered(number) / "release").unlink()
    with ThreadPoolExecutor(12) as pool:
        held = [pool.submit(ask, fleet, number % 3, "hold") for number in range(6)]
        try:
            wait(lambda: sum(fleet.status_of(number)["running"] for number in range(3)) == 6)
            victim = next(number for number in range(3) if fleet.status_of(number)["running"])
            left = [number for number in range(3) if number != victim]
            fleet.workers[victim].kill()
            quick = [pool.submit(ask, fleet, number % 3) for number in range(40)]
            assert [answer.result(60).status_code for answer in quick] == [200] * 40
            wait(lambda: sum(fleet.status_of(number)["running"] for number in left) == 6)
        finally:
            for number in range(3):
                (fleet.steered(number) / "release").touch()
        assert [answer.result(60).status_code for answer in held] == [200] * 6
    assert fleet.metric("ltx2_router_retry_total") >= 1
