"""kill -9 of one of two routers under load: what a client of the frontend sees, and what a gateway's jobs do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from ltx2_pool.tools.bench import fakeworker
from ltx2_pool.tools.fleetstack import FleetStack
from ltx2_pool.tools.stack import TINY_MENU
from tests.fleet.conftest import MadeUpFleet, wait
from tests.waiting import in_background

FAKE = (sys.executable, "-m", "ltx2_pool.tools.bench.fakeworker")


@pytest.fixture
def held(tmp_path: Path) -> Iterator[MadeUpFleet]:
    """Two routers, and a worker that holds what it is asked to."""
    with MadeUpFleet(tmp_path / "stack", 1, 2) as running:
        yield running


def test_the_frontends_client_loses_what_the_router_had_and_the_other_one_serves_on(held):
    """Dynamo tries no video again: what was on its way through the router is a 503. Whoever asks then is served."""
    asked = [in_background(lambda: held.create("hold")) for _ in range(6)]
    wait(lambda: held.status_of(0)["running"] == 6)
    through = [held.metric("ltx2_router_choice_total", number) for number in range(2)]
    assert sum(through) == 6
    held.routers[0].kill()
    wait(lambda: sum(one.done() for one in asked) == through[0])
    assert {one.result().status_code for one in asked if one.done()} == {503}
    # Until the lease of the dead one ends, the frontend may meet it once more.
    after = [held.create("fine").status_code for _ in range(30)]
    assert after.count(200) >= 29
    assert set(after) <= {200, 503}
    (held.steered(0) / "release").touch()
    assert sorted(one.result(60).status_code for one in asked) == [200] * int(through[1]) + [503] * int(through[0])


def test_every_job_of_a_gateway_survives_the_router_that_had_it(tmp_path):
    with FleetStack(tmp_path / "stack", tmp_path, TINY_MENU, tmp_path, workers=2, routers=2, program=FAKE) as running:
        url = running.start_gateway(tmp_path / "gateway", "--shapes", str(TINY_MENU))
        with httpx.Client(base_url=url, timeout=30) as client:

            def create(number: int) -> str:
                answer = client.post("/v1/videos", json={"prompt": f"job {number}"})
                assert answer.status_code == 200, answer.text
                return str(answer.json()["id"])

            jobs = {number: create(number) for number in range(20)}
            for router in range(2):
                wait(lambda router=router: running.metric("ltx2_router_choice_total", router) >= 4)
            running.routers[0].kill()
            jobs |= {number: create(number) for number in range(20, 30)}

            def ended() -> list[dict[str, str]]:
                found = [client.get(f"/v1/videos/{id}").json() for id in jobs.values()]
                return found if all(one["status"] in ("completed", "failed") for one in found) else []

            assert [one["status"] for one in wait(ended)] == ["completed"] * 30
            for number, id in jobs.items():
                assert client.get(f"/v1/videos/{id}/content").content == fakeworker.video(f"job {number}")
        assert running.log("gateway").count("tried again") >= 1
