"""The pool's logic, with real processes and real signals but without a model."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest

from ltx2_pool.processes.process import Timeouts
from ltx2_pool.processes.spawner import ExecSpawner
from ltx2_pool.serving.tickets import Limits
from ltx2_pool.words.menu import Offer
from ltx2_pool.words.outcomes import JobFailed, PoolClosed, ProcessLost, Unavailable, Video
from ltx2_pool.words.pictures import Picture, pixel_bytes
from ltx2_pool.words.protocol import Step
from tests.children import until

from .conftest import IMAGINARY, QUICK, A, B, C, job, make, maker, pids, states


async def test_a_hot_shape_keeps_its_process(make_pool):
    async with make_pool() as pool:
        first, second = await make(pool), await make(pool)
        assert maker(first) == maker(second) == pids(pool)[A.key]
        assert first.phases.keys() == {"queue", "text", "denoise", "decode", "encode"}


async def test_the_least_recently_used_shape_is_evicted(make_pool):
    async with make_pool(max_size=2) as pool:
        for shape in (A, B, A):
            await make(pool, shape)
        before = pids(pool)
        await make(pool, C)
        assert states(pool) == {A.key: "ready", C.key: "ready"}
        assert pids(pool)[A.key] == before[A.key]
        assert not psutil.pid_exists(before[B.key])


async def test_a_busy_process_is_never_evicted(make_pool, gate):
    door = gate()
    async with make_pool(max_size=1, concurrency=2) as pool:
        await make(pool, A)
        busy = asyncio.create_task(make(pool, A, f"gate {door.path}"))
        fd = await door.wait_for_child()
        other = asyncio.create_task(make(pool, B))
        await until(lambda: pool.status()["waiting"] == 1)
        assert states(pool) == {A.key: "generating"}
        os.close(fd)
        assert maker(await busy)
        await other
        assert states(pool) == {B.key: "ready"}


async def test_a_spawning_shape_does_not_hold_up_a_hot_one(make_pool, gate, monkeypatch):
    door = gate()
    monkeypatch.setenv("LTX2_IMAGINARY", f"{B.key}=gate{door.path}")
    async with make_pool(max_size=2) as pool:
        await make(pool, A)
        spawning = asyncio.create_task(make(pool, B))
        await until(lambda: states(pool).get(B.key) == "spawning")
        for _ in range(3):
            await make(pool, A)
        assert states(pool)[B.key] == "spawning"
        await door.open()
        await spawning


async def test_a_generating_shape_does_not_hold_up_another_when_two_may_run(make_pool, gate):
    door = gate()
    async with make_pool(max_size=2, concurrency=2) as pool:
        await asyncio.gather(make(pool, A), make(pool, B))
        slow = asyncio.create_task(make(pool, A, f"gate {door.path}"))
        fd = await door.wait_for_child()
        await make(pool, B)
        assert not slow.done()
        os.close(fd)
        await slow


async def test_one_generation_at_a_time_by_default(make_pool, gate):
    door = gate()
    async with make_pool(max_size=2) as pool:
        await asyncio.gather(make(pool, A), make(pool, B))
        order: list[str] = []
        slow = asyncio.create_task(make(pool, A, f"gate {door.path}"))
        fd = await door.wait_for_child()
        slow.add_done_callback(lambda _: order.append("slow"))
        next_one = asyncio.create_task(make(pool, B))
        next_one.add_done_callback(lambda _: order.append("next"))
        await until(lambda: pool.status()["waiting"] == 1)
        assert states(pool) == {A.key: "generating", B.key: "ready"}
        os.close(fd)
        await asyncio.gather(slow, next_one)
        assert order == ["slow", "next"]


async def test_the_gpu_is_free_while_a_file_is_encoded(make_pool, gate):
    door = gate()
    async with make_pool(max_size=2) as pool:
        await asyncio.gather(make(pool, A), make(pool, B))
        encoding = asyncio.create_task(make(pool, A, f"encode gate {door.path}"))
        fd = await door.wait_for_child()
        await make(pool, B)
        assert not encoding.done()
        os.close(fd)
        await encoding


async def test_an_old_job_gets_its_slot_from_shapes_in_constant_use(make_pool):
    async with make_pool(max_size=1, limits=Limits(patience=0)) as pool:
        flow = [asyncio.create_task(make(pool, A)) for _ in range(3)]
        cold = asyncio.create_task(make(pool, B))
        late = [asyncio.create_task(make(pool, A)) for _ in range(3)]
        done: list[str] = []
        for name, tasks in (("A", flow), ("B", [cold]), ("late A", late)):
            for task in tasks:
                task.add_done_callback(lambda _, name=name: done.append(name))
        await asyncio.gather(*flow, cold, *late)
        assert done == ["A"] * 3 + ["B"] + ["late A"] * 3


@pytest.mark.parametrize("kind", ["soft", "refused"])
async def test_a_soft_error_leaves_the_process_serving(make_pool, kind):
    async with make_pool() as pool:
        pid = maker(await make(pool))
        with pytest.raises(JobFailed, match=f"{kind} on purpose") as failed:
            await make(pool, A, kind)
        assert failed.value.kind == kind
        assert maker(await make(pool)) == pid


@pytest.mark.parametrize(
    ("prompt", "reason", "words"),
    [
        ("fatal", "cuda_fault", "fatal error"),
        ("die in denoise", "gen_eof", "SIGSEGV"),
        ("die in encode", "gen_eof", "SIGSEGV"),
        ("die and say goodbye", "gen_eof", "exit status 1"),
        ("truncated", "gen_eof", "exit status 0"),
        ("garbage", "parse_error", "broke the protocol"),
        ("oversized", "parse_error", "1073741824 bytes"),
        ("wrong id", "desync", "'another'"),
    ],
)
async def test_a_job_that_ends_two_processes_fails_and_the_shape_serves_on(make_pool, prompt, reason, words):
    async with make_pool() as pool:
        before = maker(await make(pool))
        with pytest.raises(ProcessLost, match=words) as lost:
            await make(pool, A, prompt)
        assert lost.value.reason == reason
        assert lost.value.name == A.key
        assert maker(await make(pool)) != before
        assert pool.status()["leases"] == 0


async def test_a_job_whose_process_dies_is_made_by_the_next_one(make_pool, tmp_path):
    async with make_pool() as pool:
        before = maker(await make(pool))
        video = await make(pool, A, f"crash once {tmp_path / 'crashed'}")
        assert maker(video) not in (before, 0)


async def test_a_generation_that_takes_too_long_is_ended_and_not_repeated(make_pool):
    async with make_pool(Timeouts(spawn=20, generation=0.5, cancel=5, term=0.5)) as pool:
        with pytest.raises(ProcessLost, match=r"over 0\.5 s") as lost:
            await make(pool, A, "deaf to cancel")
        assert lost.value.reason == "gen_timeout"
        await make(pool)


@pytest.mark.parametrize(
    ("spawn", "words"),
    [
        ("eof", "exit status 7"),
        ("broken", "no checkpoint"),
        ("garbage", "broke the protocol"),
        ("desync", "before READY"),
        ("hang", "LTX2_POOL_SPAWN_TIMEOUT"),
    ],
)
async def test_a_spawn_that_fails_three_times_fails_its_jobs_and_no_others(make_pool, monkeypatch, spawn, words):
    monkeypatch.setenv("LTX2_IMAGINARY", f"{A.key}={spawn}")
    timeouts = Timeouts(spawn=3, generation=20) if spawn == "hang" else QUICK
    async with make_pool(timeouts) as pool:
        results = await asyncio.gather(*(make(pool, A) for _ in range(3)), make(pool, B), return_exceptions=True)
        for refused in results[:3]:
            assert isinstance(refused, Unavailable)
            assert "unavailable after 3 failed starts" in str(refused)
            assert 29 < refused.retry_after <= 30
        assert isinstance(results[3], Video)
        assert words in pool.status()["last_errors"][A.key]
        assert pool.health == "able"


async def test_a_spawn_that_fails_once_is_repeated(make_pool, monkeypatch, tmp_path):
    monkeypatch.setenv("LTX2_IMAGINARY", f"{A.key}=eof:once:{tmp_path / 'failed'}")

    async with make_pool() as pool:
        assert maker(await make(pool))


async def test_a_program_that_cannot_be_started_is_a_machine_s_fault_and_waited_for(make_pool, tmp_path):
    program = tmp_path / "python"
    async with make_pool(spawner=ExecSpawner([str(program)])) as pool:
        waiting = asyncio.create_task(make(pool))
        await until(lambda: "No such file" in pool.status()["last_errors"].get(A.key, ""))
        program.write_text(f'#!/bin/sh\nexec {" ".join(IMAGINARY)} "$@"\n')
        program.chmod(0o700)
        assert (await waiting).path.exists()


async def test_the_exit_status_is_not_stolen_by_another_start(make_pool):
    """subprocess reaps what a forgotten Popen left behind whenever it starts something."""

    async with make_pool() as pool:
        pid = maker(await make(pool))
        gc.collect()
        os.kill(pid, signal.SIGKILL)
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            pass
        subprocess.run(["true"])  # noqa: ASYNC221 - it is this that must not reap another's child
        await until(lambda: not pool.status()["processes"])


async def test_an_idle_process_that_dies_is_missed_at_once_and_replaced(make_pool):
    async with make_pool() as pool:
        pid = maker(await make(pool))
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not pool.status()["processes"])
        assert maker(await make(pool)) != pid


async def test_a_queued_job_that_is_cancelled_never_starts(make_pool, gate):
    door = gate()
    async with make_pool() as pool:
        running = asyncio.create_task(make(pool, A, f"gate {door.path}"))
        fd = await door.wait_for_child()
        queued = asyncio.create_task(make(pool, A, "die in text"))
        await until(lambda: pool.status()["waiting"] == 1)
        queued.cancel()
        await until(queued.done)
        assert pool.status()["waiting"] == 0
        os.close(fd)
        await running
        await make(pool)


async def test_a_running_job_that_is_cancelled_stops_and_the_process_serves_on(make_pool):
    async with make_pool() as pool:
        pid = maker(await make(pool))
        started = asyncio.Event()
        task = asyncio.create_task(pool.generate(job(A, "until cancelled"), lambda _: started.set()))
        await started.wait()
        task.cancel()
        assert maker(await make(pool)) == pid


async def test_a_process_that_is_deaf_to_cancel_is_replaced(make_pool):
    async with make_pool(Timeouts(spawn=20, generation=20, cancel=0.2)) as pool:
        pid = maker(await make(pool))
        started = asyncio.Event()
        task = asyncio.create_task(
            pool.generate(job(A, "deaf to cancel"), lambda event: started.set() if isinstance(event, Step) else None)
        )
        await started.wait()
        task.cancel()
        assert maker(await make(pool)) != pid


async def test_a_video_that_nobody_waits_for_any_more_is_deleted(make_pool, gate, tmp_path):
    door = gate()
    async with make_pool() as pool:
        task = asyncio.create_task(make(pool, A, f"gate {door.path}"))
        fd = await door.wait_for_child()
        task.cancel()
        os.close(fd)
        await until(lambda: pool.status()["running"] == 0)
        assert list((tmp_path / "run").iterdir()) == []


async def test_cancellation_at_random_moments_leaves_nothing_behind(make_pool):
    moments = random.Random(7)
    async with make_pool(Timeouts(spawn=20, generation=20, cancel=0.3, term=0.5), max_size=2) as pool:
        for _ in range(40):
            task = asyncio.create_task(make(pool, moments.choice([A, B, C])))
            for _ in range(moments.randrange(60)):
                await asyncio.sleep(0 if moments.random() < 0.7 else 0.002)
            task.cancel()
        await asyncio.gather(make(pool, A), make(pool, B))
        await until(lambda: pool.status()["running"] == 0)
        assert pool.status()["leases"] == 0
        assert pool.status()["waiting"] == 0


async def test_closing_lets_admitted_jobs_finish(make_pool, gate):
    door = gate()
    async with make_pool() as pool:
        jobs = [asyncio.create_task(make(pool, A, f"gate {door.path}")), asyncio.create_task(make(pool, B))]
        fd = await door.wait_for_child()
        closing = asyncio.create_task(pool.close(30))
        await asyncio.sleep(0)
        with pytest.raises(PoolClosed):
            await make(pool, A)
        os.close(fd)
        videos = await asyncio.gather(*jobs)
        assert all(video.path.exists() for video in videos)
        await closing


async def test_closing_tells_jobs_that_do_not_finish_in_time(make_pool):
    async with make_pool() as pool:
        jobs = [asyncio.create_task(make(pool, shape, "hang")) for shape in (A, B)]
        await until(lambda: pool.status()["running"] == 1)
        await pool.close(0.1)
        for result in await asyncio.gather(*jobs, return_exceptions=True):
            assert isinstance(result, PoolClosed)


async def test_output_can_not_touch_the_protocol_and_its_tail_is_bounded(make_pool):
    async with make_pool() as pool:
        await make(pool, A, "chatter 2000")  # 2 MB
        with pytest.raises(ProcessLost) as lost:
            await make(pool, A, "die in denoise")
        assert len(lost.value.tail) <= 50


def test_the_children_die_with_a_parent_that_is_killed(tmp_path):
    """SIGKILL leaves the parent no chance: PDEATHSIG and the guard do it."""
    program = f"""
import asyncio, os, signal, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from ltx2_pool.processes.spawner import ExecSpawner
from ltx2_pool.processes.subprocesses import ProcessHost
from ltx2_pool.serving.book import Book
from ltx2_pool.serving.ledger import Ledger
from ltx2_pool.serving.pool import Pool
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import Shape
async def main():
    here = Path({str(tmp_path)!r})
    host = ProcessHost(Recipe(model_path="none"), here, here, weights="private", spawner=ExecSpawner({IMAGINARY!r}))
    pool = Pool(host, Book(Ledger({{"cpu": 2**40}})), here / "run")
    await pool.start()
    await pool.generate(Job("j", Shape(64, 64, 9), "fine", 1, 2, 1.0, 24), lambda _: None)
    print(*(p["pid"] for p in pool.status()["processes"]), host.pids["guard"], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    parent = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=60)
    assert parent.returncode == -signal.SIGKILL
    family = [int(pid) for pid in parent.stdout.split()]
    assert len(family) == 2
    _, alive = psutil.wait_procs([psutil.Process(p) for p in family if psutil.pid_exists(p)], timeout=2)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


async def test_an_innocent_job_that_is_tried_again_has_its_picture_still(make_pool, tmp_path):
    offer = Offer(A)
    content = bytes([7]) * pixel_bytes(offer.picture_sizes)
    async with make_pool(offers=[offer]) as pool:
        asked = replace(job(A, f"kill once {tmp_path / 'marker'}"), pictures=(Picture("1" * 64),))
        pixels = os.memfd_create("pixels", os.MFD_CLOEXEC)
        os.write(pixels, content)
        try:
            video = await pool.generate(asked, lambda _: None, pixels=[pixels])
        finally:
            os.close(pixels)
        assert (tmp_path / "marker").exists(), "the first process was lost"
        assert video.path.read_text().split()[-1] == hashlib.sha256(content).hexdigest()
