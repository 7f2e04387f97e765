"""What is admitted, refused, retried and given up; with real processes and without a model."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from ltx2_pool.processes.process import ProcessLost, Timeouts
from ltx2_pool.serving.breaker import Breaker
from ltx2_pool.serving.metrics import Metrics
from ltx2_pool.serving.pool import JobTimeout, Limits, Poisonous, PoolClosed, QueueFull, Unavailable
from ltx2_pool.words.protocol import Phase
from tests.paths import REPOSITORY

from .conftest import A, B, C, job, pids, states, until


def nothing(_event: object) -> None:
    pass


def test_a_full_queue_says_so_at_once(make_pool, run, gate):
    async def body():
        door, metrics = gate(), Metrics([A.key, B.key])
        limits = Limits(max_queue=2, max_queue_per_shape=1)
        async with make_pool(limits=limits, metrics=metrics) as pool:
            jobs = [asyncio.create_task(pool.generate(job(A, f"gate {door.path}"), nothing))]
            fd = await door.wait_for_child()
            for shape in (A, B):
                jobs.append(asyncio.create_task(pool.generate(job(shape), nothing)))
            await until(lambda: pool.status()["waiting"] == 2)
            with pytest.raises(QueueFull, match="2 jobs wait already") as full:
                await pool.generate(job(C), nothing)
            assert full.value.reason == "queue_full"
            jobs.pop().cancel()
            await until(lambda: pool.status()["waiting"] == 1)
            with pytest.raises(QueueFull, match="1 jobs wait already") as full:
                await pool.generate(job(A), nothing)
            assert full.value.reason == "shape_queue_full"
            os.close(fd)
            await asyncio.gather(*jobs)
        assert metrics.rejections.labels("queue_full")._value.get() == 1
        assert metrics.requests.labels(A.key, "DONE")._value.get() == 2

    run(body())


def test_a_job_that_misses_its_deadline_is_given_up_wherever_it_is(make_pool, run, gate):
    async def body():
        door = gate()
        async with make_pool(Timeouts(spawn=20, generation=20, cancel=0.2), limits=Limits(job_timeout=1)) as pool:
            running = asyncio.create_task(pool.generate(job(A, "deaf to cancel"), nothing))
            await until(lambda: pool.status()["running"] == 1)
            waiting = asyncio.create_task(pool.generate(job(A, f"gate {door.path}"), nothing))
            for task in (running, waiting):
                with pytest.raises(JobTimeout, match="not done within 1 s"):
                    await task
            await until(lambda: pool.status()["running"] == pool.status()["waiting"] == 0)

    run(body())


def test_parameters_that_ended_two_processes_are_refused(make_pool, run):
    async def body():
        async with make_pool() as pool:
            poison = job(A, "crash")
            with pytest.raises(ProcessLost, match="SIGSEGV"):
                await pool.generate(poison, nothing)
            spawned = pids(pool)
            with pytest.raises(Poisonous, match="refused for 600 s more"):
                await pool.generate(replace(poison, id="another"), nothing)
            await pool.generate(replace(poison, id="third", prompt="fine"), nothing)
            assert pids(pool) != spawned  # the refusal touched no process, the good job started one
            pool._poisons[replace(poison, id="")] = 0.0
            with pytest.raises(ProcessLost):
                await pool.generate(replace(poison, id="fourth"), nothing)

    run(body())


def test_a_shape_that_does_not_start_is_left_alone_for_a_while(make_pool, run, monkeypatch):
    monkeypatch.setenv("FAKE_SPAWN", f"{A.key}=eof")
    now = 1000.0

    async def body():
        nonlocal now
        metrics = Metrics([A.key, B.key])
        async with make_pool(make_breaker=lambda: Breaker(clock=lambda: now), metrics=metrics) as pool:
            with pytest.raises(ProcessLost):
                await pool.generate(job(A), nothing)
            assert metrics.spawns.labels(A.key)._value.get() == 3
            spawns = metrics.spawns.labels(A.key)._value.get()
            with pytest.raises(Unavailable, match="left alone for"):
                await pool.generate(job(A), nothing)
            assert metrics.spawns.labels(A.key)._value.get() == spawns
            assert pool.status()["unavailable"].keys() == {A.key}
            assert "about to give up" in pool.status()["last_errors"][A.key]
            assert metrics.breaker.labels(A.key)._value.get() == 1
            await pool.generate(job(B), nothing)  # the others serve on
            now += 3600
            monkeypatch.delenv("FAKE_SPAWN")
            await pool.generate(job(A), nothing)
            assert pool.status()["unavailable"] == {}

    run(body())


def test_all_borrowers_are_replaced_when_the_weights_process_dies(make_pool, run, gate):
    async def body():
        door = gate()
        async with make_pool(weights="shared", max_size=3) as pool:
            await asyncio.gather(*(pool.generate(job(shape), nothing) for shape in (A, B, C)))
            before = pids(pool)
            running = asyncio.create_task(pool.generate(job(A, f"gate {door.path}"), nothing))
            fd = await door.wait_for_child()
            os.kill(pool.status()["helpers"]["weights"], 9)
            await until(lambda: not before.items() & pids(pool).items())
            os.close(fd)
            await door.open()  # the job is tried again, on the next process
            await running
            assert pool.status()["helpers"]["weights"] not in (None, *before.values())

    run(body())


def test_a_job_is_tried_twice_when_it_meets_two_losses_that_are_not_its_own(make_pool, run, gate, tmp_path):
    """It is told the truth after the second, and its parameters are welcome again."""

    async def body():
        async with make_pool(weights="shared") as pool:
            door = gate()
            unlucky = job(A, f"gate {door.path}")
            task = asyncio.create_task(pool.generate(unlucky, nothing))
            for _ in range(2):
                fd = await door.wait_for_child()
                process = pool._processes[A]
                os.kill(pool.status()["helpers"]["weights"], 9)
                await process.exited()
                os.close(fd)
            with pytest.raises(ProcessLost) as lost:
                await task
            assert lost.value.reason == "weights_lost"
            assert not pool._poisons

    run(body())


def test_shapes_are_started_ahead_one_by_one_and_only_while_nobody_waits(make_pool, run, gate, monkeypatch):
    async def body():
        door = gate()
        monkeypatch.setenv("FAKE_SPAWN", f"{B.key}=gate{door.path}")
        async with make_pool(max_size=3, prewarm=[A, B, C], ready_min=1) as pool:
            assert states(pool) == {A.key: "ready", B.key: "spawning"}
            inner = gate()
            busy = asyncio.create_task(pool.generate(job(A, f"gate {inner.path}"), nothing))
            fd = await inner.wait_for_child()
            waiting = asyncio.create_task(pool.generate(job(A), nothing))
            await until(lambda: pool.status()["waiting"] == 1)
            await door.open()
            await until(lambda: states(pool)[B.key] == "ready")
            assert C.key not in states(pool)  # somebody waits
            os.close(fd)
            await asyncio.gather(busy, waiting)
            await until(lambda: states(pool).get(C.key) == "ready")

    run(body())


def test_the_next_job_starts_before_the_last_file_is_written(make_pool, run, gate):
    """Ten queued jobs, each held back while it writes its file: the next one's GPU work begins all the same."""

    async def body():
        doors = [gate() for _ in range(10)]
        async with make_pool(max_size=10, gpu_concurrency=1) as pool:
            trace: list[tuple[str, int]] = []

            def on_event(number: int):
                return lambda event: trace.append((event.phase, number)) if isinstance(event, Phase) else None

            shapes = [replace(A, width=64 * (1 + number)) for number in range(10)]
            jobs = [
                asyncio.create_task(pool.generate(job(shape, f"encode gate {door.path}"), on_event(number)))
                for number, (shape, door) in enumerate(zip(shapes, doors, strict=True))
            ]
            await until(lambda: sum(phase == "encode" for phase, _ in trace) == 10)
            assert not any(task.done() for task in jobs)  # all ten had the GPU, no file is complete
            for door in doors:
                await door.open()
            await asyncio.gather(*jobs)

    run(body())


def test_a_gigabyte_of_output_harms_nobody(make_pool, run):
    async def body():
        async with make_pool(Timeouts(spawn=20, generation=120)) as pool:
            await pool.generate(job(A, "flood"), nothing)
            tail = pool._processes[A].tail
            assert len(tail) <= 50
            assert max(map(len, tail)) <= 2000

    run(body())


def test_an_output_directory_that_is_gone_is_made_again(make_pool, run, tmp_path):
    async def body():
        async with make_pool() as pool:
            await pool.generate(job(A), nothing)
            shutil.rmtree(tmp_path / "run")
            video = await pool.generate(job(A), nothing)
            assert video.path.exists()

    run(body())


def test_told_to_stop_again_the_pool_does_not_drain(make_pool, run):
    async def body():
        async with make_pool() as pool:
            jobs = [asyncio.create_task(pool.generate(job(shape, "hang"), nothing)) for shape in (A, B)]
            await until(lambda: pool.status()["running"] == 1)
            closing = asyncio.create_task(pool.close(600))
            await asyncio.sleep(0)
            pool.abort()
            await closing
            results = await asyncio.gather(*jobs, return_exceptions=True)
            assert [type(result).__name__ for result in results] == ["PoolClosed", "PoolClosed"]

    run(body())


def test_closing_does_not_wait_for_weights_that_are_still_loaded(make_pool, run, monkeypatch):
    monkeypatch.setenv("FAKE_SPAWN", "weights=hang")

    async def body():
        async with make_pool(Timeouts(weights=600), weights="shared") as pool:
            waiting = asyncio.create_task(pool.generate(job(A), nothing))
            await until(lambda: pool._host.lender._process is not None and pool._host.lender._process.pid)
            async with asyncio.timeout(10):
                await pool.close()
            with pytest.raises(PoolClosed):
                await waiting

    run(body())


def test_a_short_chaos_run_loses_nothing(tmp_path):
    """The long one is for people: python benchmark.py chaos --jobs 1000."""
    command = [
        sys.executable,
        str(REPOSITORY / "benchmark.py"),
        "chaos",
        "--jobs",
        "80",
        "--kill-rate",
        "0.3",
        "--seed",
        "5",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.strip("│ ").split("│") for line in done.stdout.splitlines() if line.startswith("│")]
    ledger = {name.strip(): text.strip() for name, text in rows}
    assert ledger["admitted"] == "80"
    assert (ledger["lost"], ledger["wrong bytes"], ledger["left behind"]) == ("0", "0", "0")
    assert int(ledger["killed: shape process"]) > 5
