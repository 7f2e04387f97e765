"""What is admitted, refused, retried and given up; with real processes and without a model."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from dataclasses import replace

import pytest

from ltx2_pool.processes.process import Timeouts
from ltx2_pool.serving.breaker import Pauses
from ltx2_pool.serving.demand import Demand
from ltx2_pool.serving.metrics import Metrics
from ltx2_pool.serving.tickets import Limits
from ltx2_pool.words.outcomes import JobTimeout, Poisonous, PoolClosed, ProcessLost, QueueFull, Unavailable
from ltx2_pool.words.protocol import Phase
from tests.children import until

from .conftest import A, B, C, gathered, job, make, nothing, pids, states


async def test_a_full_queue_says_so_at_once(make_pool, gate):
    door, metrics = gate(), Metrics([A.key, B.key])
    limits = Limits(max_queue=2, max_queue_per_shape=1, max_queue_per_user=2)
    async with make_pool(limits=limits, metrics=metrics) as pool:
        await asyncio.gather(make(pool, A), make(pool, B))
        jobs = [asyncio.create_task(make(pool, A, f"gate {door.path}"))]
        fd = await door.wait_for_child()
        for shape in (A, B):
            jobs.append(asyncio.create_task(make(pool, shape)))
        await until(lambda: pool.status()["waiting"] == 2)
        with pytest.raises(QueueFull, match="2 jobs wait already") as full:
            await make(pool, C)
        assert full.value.reason == "queue_full"
        assert full.value.retry_after is not None
        jobs.pop().cancel()
        await until(lambda: pool.status()["waiting"] == 1)
        with pytest.raises(QueueFull, match="1 jobs wait already") as full:
            await make(pool, A)
        assert full.value.reason == "shape_queue_full"
        os.close(fd)
        await asyncio.gather(*jobs)
    assert metrics.rejections.labels("queue_full")._value.get() == 1
    assert metrics.requests.labels(A.key, "DONE")._value.get() == 3


async def test_no_user_can_fill_the_queue_or_starve_the_others(make_pool, gate):
    door = gate()
    async with make_pool(limits=Limits(max_queue=8, max_queue_per_user=6)) as pool:
        await make(pool, A)
        busy = asyncio.create_task(make(pool, A, f"gate {door.path}"))
        fd = await door.wait_for_child()
        order: list[str] = []

        async def ask(user: str) -> None:
            await pool.generate(job(A), nothing, user)
            order.append(user)

        flood = [asyncio.create_task(ask("greedy")) for _ in range(6)]
        await until(lambda: pool.status()["waiting"] == 6)
        with pytest.raises(QueueFull) as full:
            await pool.generate(job(A), nothing, "greedy")
        assert full.value.reason == "user_queue_full"
        modest = asyncio.create_task(ask("modest"))
        await until(lambda: pool.status()["waiting"] == 7)
        os.close(fd)
        await asyncio.gather(busy, *flood, modest)
        assert "modest" in order[:2]


async def test_shapes_do_not_push_each_other_out_at_every_turn(make_pool):
    metrics = Metrics([A.key, B.key])
    async with make_pool(max_size=1, metrics=metrics) as pool:
        await asyncio.gather(*(make(pool, shape) for _ in range(6) for shape in (A, B)))
    for counter in (metrics.spawns, metrics.cold):
        assert sum(counter.labels(shape.key)._value.get() for shape in (A, B)) == 2


async def test_a_waiting_client_of_a_cold_shape_pays_for_one_video(make_pool, tmp_path):
    """What is started for a job makes no warm-up first; what is started ahead does."""
    made = []

    def warm_up(key):
        made.append(key.shape)
        return (job(key.shape),)

    metrics = Metrics([A.key, B.key])
    async with make_pool(warm_up=warm_up, prewarm=[B], ready_min=1, metrics=metrics) as pool:
        await make(pool, A)
        await make(pool, B)
        assert made == [B]
    assert [metrics.cold.labels(shape.key)._value.get() for shape in (A, B)] == [1, 0]


async def test_a_job_that_misses_its_deadline_is_given_up_wherever_it_is(make_pool, gate):
    door = gate()
    async with make_pool(Timeouts(spawn=20, generation=20, cancel=0.2), limits=Limits(job_timeout=1)) as pool:
        running = asyncio.create_task(make(pool, A, "deaf to cancel"))
        await until(lambda: pool.status()["running"] == 1)
        waiting = asyncio.create_task(make(pool, A, f"gate {door.path}"))
        for task in (running, waiting):
            with pytest.raises(JobTimeout, match="not done within 1 s"):
                await task
        await until(lambda: pool.status()["running"] == pool.status()["waiting"] == 0)


async def test_parameters_that_ended_two_processes_are_refused(make_pool):
    async with make_pool() as pool:
        poison = job(A, "die in denoise")
        with pytest.raises(ProcessLost, match="SIGSEGV"):
            await pool.generate(poison, nothing)
        spawned = pids(pool)
        with pytest.raises(Poisonous, match="refused for 600 s more"):
            await pool.generate(replace(poison, id="another"), nothing)
        await pool.generate(replace(poison, id="third", prompt="fine"), nothing)
        assert pids(pool) != spawned  # the refusal touched no process, the good job started one


async def test_a_shape_that_does_not_start_is_unavailable_for_a_while(make_pool, monkeypatch, tmp_path):
    monkeypatch.setenv("LTX2_IMAGINARY", f"{A.key}=eof")
    metrics = Metrics([A.key, B.key])
    async with make_pool(pauses=Pauses(first=1.5), metrics=metrics) as pool:
        with pytest.raises(Unavailable):
            await make(pool, A)
        spawns = metrics.spawns.labels(A.key)._value.get
        assert spawns() == 3
        with pytest.raises(Unavailable, match="unavailable after 3 failed starts") as refused:
            await make(pool, A)
        assert 0 < refused.value.retry_after <= 1.5
        assert spawns() == 3
        assert pool.status()["unavailable"].keys() == {A.key}
        assert "exit status 7" in pool.status()["last_errors"][A.key]
        assert metrics.unavailable.labels(A.key)._value.get() == 1
        await make(pool, B)  # the others serve on
        monkeypatch.delenv("LTX2_IMAGINARY")
        await until(lambda: not pool.status()["unavailable"])
        await make(pool, A)


async def test_a_start_that_is_killed_from_outside_is_not_a_shape_that_does_not_start(make_pool, gate, monkeypatch):
    """Twelve of them in a row: nobody is refused, and the job is made."""
    async with make_pool(pauses=Pauses(longest_disturbed=0.1)) as pool:
        for _ in range(12):
            door = gate()
            monkeypatch.setenv("LTX2_IMAGINARY", f"{A.key}=gate{door.path}")
            if _ == 0:
                waiting = asyncio.create_task(make(pool, A))
            fd = await door.wait_for_child()
            pid = pids(pool)[A.key]
            os.kill(pid, signal.SIGKILL)
            os.close(fd)
            await until(lambda pid=pid: pid not in pids(pool).values())
        monkeypatch.delenv("LTX2_IMAGINARY")
        assert (await waiting).path.exists()


async def test_all_borrowers_are_replaced_when_the_weights_process_dies(make_pool, gate):
    door = gate()
    async with make_pool(weights="shared", max_size=3) as pool:
        await asyncio.gather(*(make(pool, shape) for shape in (A, B, C)))
        before = pids(pool)
        running = asyncio.create_task(make(pool, A, f"gate {door.path}"))
        fd = await door.wait_for_child()
        os.kill(pool.status()["helpers"]["weights"], 9)
        await until(lambda: not before.items() & pids(pool).items())
        os.close(fd)
        await door.open()  # the job is tried again, on the next process
        await running
        assert pool.status()["helpers"]["weights"] not in (None, *before.values())


async def test_losses_that_are_not_its_own_are_never_held_against_a_job(make_pool, gate):
    async with make_pool(weights="shared") as pool:
        door = gate()
        task = asyncio.create_task(make(pool, A, f"gate {door.path}"))
        for _ in range(4):
            fd = await door.wait_for_child()
            pid = pids(pool)[A.key]
            os.kill(pool.status()["helpers"]["weights"], 9)
            await until(lambda pid=pid: pid not in pids(pool).values())
            os.close(fd)
        await door.open()
        assert (await task).path.exists()


async def test_shapes_are_started_ahead_one_by_one_and_only_while_nobody_waits(make_pool, gate, monkeypatch):
    door = gate()
    monkeypatch.setenv("LTX2_IMAGINARY", f"{B.key}=gate{door.path}")
    async with make_pool(max_size=3, prewarm=[A, B, C], ready_min=1, warm_up=lambda key: (job(key.shape),)) as pool:
        assert states(pool) == {A.key: "ready", B.key: "spawning"}
        inner = gate()
        busy = asyncio.create_task(make(pool, A, f"gate {inner.path}"))
        fd = await inner.wait_for_child()
        waiting = asyncio.create_task(make(pool, A))
        await until(lambda: pool.status()["waiting"] == 1)
        await door.open()
        await until(lambda: states(pool)[B.key] == "ready")
        assert C.key not in states(pool)  # somebody waits
        os.close(fd)
        await asyncio.gather(busy, waiting)
        await until(lambda: states(pool).get(C.key) == "ready")


async def test_the_next_job_starts_before_the_last_file_is_written(make_pool, gate):
    """Ten queued jobs, each held back while it writes its file: the next one's GPU work begins all the same."""
    doors = [gate() for _ in range(10)]
    shapes = [replace(A, width=64 * (1 + number)) for number in range(10)]
    async with make_pool(max_size=10, keys=shapes) as pool:
        await asyncio.gather(*(make(pool, shape) for shape in shapes))
        trace: list[tuple[str, int]] = []

        def on_event(number: int):
            return lambda event: trace.append((event.phase, number)) if isinstance(event, Phase) else None

        jobs = [
            asyncio.create_task(pool.generate(job(shape, f"encode gate {door.path}"), on_event(number)))
            for number, (shape, door) in enumerate(zip(shapes, doors, strict=True))
        ]
        await until(lambda: sum(phase == "encode" for phase, _ in trace) == 10)
        assert not any(task.done() for task in jobs)  # all ten had the GPU, no file is complete
        for door in doors:
            await door.open()
        await asyncio.gather(*jobs)


async def test_a_gigabyte_of_output_harms_nobody(make_pool):
    """While one process floods, another shape's hot video takes its usual way; the flooder's tail is bounded."""
    async with make_pool(Timeouts(spawn=20, generation=120), concurrency=2) as pool:
        await asyncio.gather(make(pool, A), make(pool, B))
        flood = asyncio.create_task(make(pool, A, "flood"))
        await until(lambda: states(pool)[A.key] == "generating")
        for _ in range(3):
            await make(pool, B)
        assert not flood.done()
        await flood
        with pytest.raises(ProcessLost) as lost:
            await make(pool, A, "die in denoise")
        assert max(map(len, lost.value.tail)) <= 2000


async def test_an_output_directory_that_is_gone_is_made_again(make_pool, tmp_path):
    async with make_pool() as pool:
        await make(pool, A)
        shutil.rmtree(tmp_path / "run")
        video = await make(pool, A)
        assert video.path.exists()


async def test_told_to_stop_again_the_pool_does_not_drain(make_pool):
    async with make_pool() as pool:
        jobs = [asyncio.create_task(make(pool, shape, "hang")) for shape in (A, B)]
        await until(lambda: pool.status()["running"] == 2)
        closing = asyncio.create_task(pool.close(600))
        await asyncio.sleep(0)
        pool.abort()
        await closing
        assert [type(result) for result in await gathered(*jobs)] == [PoolClosed, PoolClosed]


async def test_closing_does_not_wait_for_weights_that_are_still_loaded(make_pool, monkeypatch):
    monkeypatch.setenv("LTX2_IMAGINARY", "weights=hang")
    async with make_pool(Timeouts(weights=600), weights="shared") as pool:
        waiting = asyncio.create_task(make(pool, A))
        await until(lambda: pool.status()["helpers"]["weights"])
        async with asyncio.timeout(10):
            await pool.close()
        with pytest.raises(PoolClosed):
            await waiting


async def test_what_the_fleet_has_elsewhere_goes_first_and_status_and_metrics_say_why(make_pool):
    metrics = Metrics([A.key, B.key, C.key])
    async with make_pool(max_size=2, metrics=metrics) as pool:
        assert pool.status()["fleet"] == {"routers": 0, "saves_starts_per_hour": {}}
        await make(pool, A)
        await make(pool, B)
        demand = Demand("r", {A.key: 0.1, B.key: 0.1, C.key: 0.1}, {B.key: 3}, 0.5)
        pool.listener.hear(demand, time.monotonic())
        said = pool.status()["fleet"]
        assert metrics.registry.get_sample_value("ltx2_pool_routers") == said["routers"] == 1
        assert said["saves_starts_per_hour"] == {A.key: 360.0, B.key: 45.0, C.key: 360.0}
        await make(pool, C)
        assert set(states(pool)) == {A.key, C.key}  # and not B, although A was used before it
