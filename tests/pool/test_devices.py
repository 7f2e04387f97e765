"""Several devices in one pool: stand-ins, each with a weights process and processes of its own."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter

import pytest

from ltx2_pool.serving.breaker import Pauses
from ltx2_pool.serving.metrics import Metrics
from ltx2_pool.words.device import Device, DeviceError
from ltx2_pool.words.outcomes import ProcessLost, Video
from ltx2_pool.words.protocol import Memory
from ltx2_pool.words.shapes import Shape
from tests.children import until

from .conftest import GIB, A, B, C, gathered, make, maker

BOTH = ("cpu:0", "cpu:1")
EIGHT = tuple(f"cpu:{n}" for n in range(8))


def places(pool):
    """Devices by the pid of the process there."""
    return {p["pid"]: tuple(p["devices"]) for p in pool.status()["processes"]}


def on(pool, device):
    return sorted(p["shape"] for p in pool.status()["processes"] if device in p["devices"])


async def at(gate, pool, *args):
    """A job that runs until its gate is opened, which is returned with it. Tried again, it does not wait."""
    door = gate()
    task = asyncio.create_task(make(pool, *args, f"gate {door.path} once {door.path}.passed"))
    return task, await door.wait_for_child()


async def test_two_devices_serve_two_jobs_at_once(make_pool, gate):
    async with make_pool(devices=BOTH, weights="shared") as pool:
        first, one = await at(gate, pool, A)
        second, other = await at(gate, pool, B)
        await until(lambda: Counter(p["state"] for p in pool.status()["processes"]) == {"spawning": 2})
        assert [on(pool, device) for device in BOTH] == [[A.key], [B.key]]
        for fd in (one, other):
            os.close(fd)
        assert len({places(pool)[maker(video)] for video in await asyncio.gather(first, second)}) == 2
        helpers = pool.status()["helpers"]
        assert helpers["weights cpu:0"] != helpers["weights cpu:1"]


async def test_a_hot_shape_gets_a_copy_where_a_device_is_free(make_pool, gate):
    async with make_pool(devices=BOTH) as pool:
        hot = maker(await make(pool))
        slow, fd = await at(gate, pool, A)
        copy = maker(await make(pool))
        assert {places(pool)[hot], places(pool)[copy]} == {(device,) for device in BOTH}
        os.close(fd)
        await slow
        assert {maker(video) for video in await asyncio.gather(make(pool), make(pool))} == {hot, copy}


async def test_a_job_whose_device_is_busy_is_made_on_the_other(make_pool, gate):
    """Both shapes are hot on one device; the other has room for a copy."""
    async with make_pool(devices=BOTH, prewarm=[A, B, C], ready_min=3) as pool:
        device = next(name for name in BOTH if len(on(pool, name)) == 2)
        await asyncio.gather(*(make(pool, shape) for shape in (A, B, C)))
        first, second = (Shape.parse(key) for key in on(pool, device)[:2])
        slow, fd = await at(gate, pool, first)
        video = await make(pool, second)
        assert not slow.done()
        assert places(pool)[maker(video)] != (device,)
        os.close(fd)
        await slow


async def test_a_rare_shape_has_one_process(make_pool):
    async with make_pool(devices=EIGHT) as pool:
        for _ in range(3):
            for shape in (A, B, C):
                await make(pool, shape)
        assert Counter(p["shape"] for p in pool.status()["processes"]) == {A.key: 1, B.key: 1, C.key: 1}
        assert len(set(places(pool).values())) == 3


async def test_what_is_started_ahead_is_spread_evenly(make_pool):
    shapes = [Shape(64 * n, 64, 9) for n in range(1, 13)]
    async with make_pool(devices=EIGHT, keys=shapes, prewarm=shapes, ready_min=12) as pool:
        assert sorted(len(on(pool, device)) for device in EIGHT) == [1] * 4 + [2] * 4


async def test_eight_devices_make_eight_videos_at_once(make_pool, gate):
    async with make_pool(devices=EIGHT, weights="shared") as pool:
        await make(pool)
        doors = [gate() for _ in EIGHT]
        jobs = [asyncio.create_task(make(pool, A, f"gate {door.path}")) for door in doors]
        gates = await asyncio.gather(*(door.wait_for_child() for door in doors))
        assert sorted(places(pool).values()) == [(device,) for device in EIGHT]
        for fd in gates:
            os.close(fd)
        assert len({maker(video) for video in await asyncio.gather(*jobs)}) == 8


async def test_a_copy_ends_before_the_last_process_of_a_shape(make_pool, gate):
    async with make_pool(devices=BOTH, max_size=2) as pool:
        await make(pool, B)
        await make(pool, A)
        slow, fd = await at(gate, pool, A)
        await make(pool, A)
        os.close(fd)
        await slow
        await make(pool, B)
        await make(pool, A)
        await make(pool, Shape(128, 64, 9))  # there is room for one more
        await make(pool, C)
        assert Counter(p["shape"] for p in pool.status()["processes"])[A.key] == 1
        assert len(pool.status()["processes"]) == 4


async def test_the_end_of_one_devices_weights_process_harms_no_other(make_pool, gate):
    async with make_pool(devices=BOTH, weights="shared") as pool:
        slow, fd = await at(gate, pool, A)
        unhurt, there = await at(gate, pool, B)
        (device,) = (name for name in BOTH if on(pool, name) == [A.key])
        before = places(pool)
        os.kill(pool.status()["helpers"][f"weights {device}"], signal.SIGKILL)
        await until(lambda: before.keys() - places(pool).keys())
        os.close(fd)
        os.close(there)
        assert before[maker(await unhurt)] != (device,)
        assert isinstance(await slow, Video)  # tried again
        assert pool.health == "able"


async def test_a_device_whose_weights_never_start_is_out_and_comes_back(make_pool, monkeypatch):
    monkeypatch.setattr("ltx2_pool.processes.pause._FIRST", 4.0)
    monkeypatch.setenv("LTX2_IMAGINARY", "weights on cpu:0=broken")
    metrics = Metrics([A.key, B.key], BOTH)
    async with make_pool(devices=BOTH, weights="shared", metrics=metrics) as pool:
        videos = [await make(pool, shape) for shape in (A, B, C)]
        assert {places(pool)[maker(video)] for video in videos} == {("cpu:1",)}
        assert metrics.device_out.labels("cpu:0")._value.get() == 1
        assert pool.status()["devices"]["cpu:0"]["out_s"] > 0
        assert pool.health == "able"
        monkeypatch.delenv("LTX2_IMAGINARY")
        await until(lambda: not pool.status()["devices"]["cpu:0"]["out_s"])
        await asyncio.gather(make(pool, A, "long"), make(pool, B))
        assert on(pool, "cpu:0")
        assert metrics.device_out.labels("cpu:0")._value.get() == 0


@pytest.mark.parametrize("weights", ["shared", "private"])
async def test_a_device_on_which_all_starts_fault_is_taken_out_and_comes_back(make_pool, monkeypatch, weights):
    shapes = [Shape(64 * n, 64, 9) for n in range(1, 7)]
    monkeypatch.setenv("LTX2_IMAGINARY", ",".join(f"{shape.key} on cpu:0=broken" for shape in shapes))
    async with make_pool(devices=BOTH, weights=weights, pauses=Pauses(first=4.0), keys=shapes) as pool:
        videos = await asyncio.gather(*(make(pool, shape) for shape in shapes))
        assert {places(pool)[maker(video)] for video in videos} == {("cpu:1",)}
        assert pool.status()["unavailable"] == {}
        assert pool.status()["devices"]["cpu:0"]["out_s"] > 0
        assert pool.status()["helpers"].get("weights cpu:0") is None
        monkeypatch.delenv("LTX2_IMAGINARY")
        await until(lambda: not pool.status()["devices"]["cpu:0"]["out_s"])
        await make(pool, C)
        assert on(pool, "cpu:0") == [C.key]


async def test_a_job_that_faults_on_two_devices_is_at_fault_and_the_devices_are_not(make_pool):
    async with make_pool(devices=BOTH) as pool:
        await make(pool)
        for _ in range(3):
            (lost,) = await gathered(make(pool, A, "fatal"))
            assert isinstance(lost, ProcessLost) or "refused" in str(lost)
        await make(pool)
        assert [device["out_s"] for device in pool.status()["devices"].values()] == [0, 0]


async def test_memory_is_counted_for_each_device(make_pool):
    known = dict.fromkeys((A, B, C), Memory(resident=10 * GIB, peak=30 * GIB))
    async with make_pool(devices=BOTH, budget=40 * GIB, known=known) as pool:
        await asyncio.gather(*(make(pool, shape) for shape in (A, B, C)))
        assert sorted(len(on(pool, device)) for device in BOTH) == [1, 2]
        assert all(device["held"] <= 40 * GIB for device in pool.status()["devices"].values())


async def test_a_device_that_its_driver_has_lost_is_taken_out_at_once(make_pool, monkeypatch, tmp_path):
    lost, real = set(), Device.free

    def free(device):
        if device.id in lost:
            raise DeviceError("GPU is lost")
        return real(device)

    monkeypatch.setattr(Device, "free", free)
    devices = [Device(name, "cpu", "x86_64") for name in BOTH]
    async with make_pool(devices=devices, weights="shared", budget=None) as pool:
        await make(pool)
        (device,) = (name for name in BOTH if on(pool, name))
        lost.add(device)
        video = await make(pool, A, f"fatal once {tmp_path / 'faulted'}")
        await until(lambda: pool.status()["devices"][device]["out_s"])
        assert isinstance(video, Video)
        assert (await make(pool)).path.exists()
        assert on(pool, device) == []
