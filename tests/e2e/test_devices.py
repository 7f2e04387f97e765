"""One worker on two stand-ins for GPUs, with the tiny model behind the real frontend."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from ltx2_pool.tools.stack import WORKER

from .conftest import MENU, A, B, C, ask, in_background, stacks, wait

BOTH = ["cpu:0", "cpu:1"]


@pytest.fixture(scope="module")
def pool(model, baked, tmp_path_factory):
    with stacks(model, baked, tmp_path_factory) as make:
        yield make(LTX2_DEVICES=",".join(BOTH), LTX2_POOL_MODE="1", LTX2_POOL_PREWARM="all", LTX2_POOL_READY_MIN="3")


def places(pool) -> dict[str, list[str]]:
    """By shape, where its processes are."""
    found: dict[str, list[str]] = {}
    for process in pool.status()["processes"]:
        found.setdefault(process["shape"], []).extend(process["devices"])
    return found


def test_shapes_are_spread_and_a_copy_makes_the_same_bytes(pool):
    spread = places(pool)
    assert set(spread) == {A.key, B.key, C.key}
    assert sorted(len([s for s in spread.values() if device in s]) for device in BOTH) == [1, 2]
    made: set[bytes] = set()

    def both_have_made_one() -> bool:
        """A copy starts while jobs wait; when it is there, those may be done."""
        videos = [in_background(lambda: ask(pool, A)) for _ in range(6)]
        made.update(video.result() for video in videos)
        return [p["jobs_done"] > 0 for p in pool.status()["processes"] if p["shape"] == A.key] == [True, True]

    wait(both_have_made_one)
    assert len(made) == 1
    assert sorted(places(pool)[A.key]) == BOTH


def test_the_weights_process_of_a_device_dies_and_nothing_is_lost(pool):
    helpers = pool.status()["helpers"]
    videos = [in_background(lambda shape=shape: ask(pool, shape)) for shape in (A, B, C, A)]
    os.kill(helpers["weights cpu:1"], signal.SIGKILL)
    assert all(video.result() for video in videos)
    wait(lambda: pool.status()["helpers"]["weights cpu:1"] not in (None, helpers["weights cpu:1"]))
    assert pool.status()["helpers"]["weights cpu:0"] == helpers["weights cpu:0"]


def test_the_status_numbers_the_devices(pool):
    environment = {**os.environ, "DYN_SYSTEM_PORT": str(pool.system_port), "COLUMNS": "160"}
    shown = subprocess.run([*WORKER, "status"], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert "device 0  cpu:0" in shown.stdout
    assert "device 1  cpu:1" in shown.stdout


@pytest.mark.parametrize(
    ("devices", "menu", "why"),
    [
        ("cpu:0,cpu:0", MENU.read_text(), "cpu:0 is there twice"),
        ("0", MENU.read_text(), "there is no GPU 0"),
        (
            "cpu:0",
            "model: m\nshapes: [{shape: 64x64@9, gpus: 2}]\n",
            "has gpus: 2, and this worker has 1 device:",
        ),
    ],
)
def test_devices_that_will_not_do_are_refused_before_anything_starts(model, tmp_path, devices, menu, why):
    (tmp_path / "menu.yaml").write_text(menu)
    command = [*WORKER, "--pool-mode", "--model", str(model), "--shapes", str(tmp_path / "menu.yaml")]
    done = subprocess.run([*command, "--devices", devices], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert why in done.stderr
