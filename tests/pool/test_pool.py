"""The pool's logic, with real processes and real signals but without a model."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import subprocess
import sys

import psutil
import pytest

from ltx2_pool.processes.process import JobFailed, ProcessLost, Timeouts
from ltx2_pool.serving.pool import PoolClosed, Video

from .conftest import FAKE_CHILD, QUICK, A, B, C, job, pids, states, until


def nothing(_event: object) -> None:
    pass


async def make(pool, *args) -> Video:
    return await pool.generate(job(*args), nothing)


def maker(video: Video) -> int:
    """The pid that wrote the file."""
    return int(video.path.read_bytes().split()[-1])


def test_a_hot_shape_keeps_its_process(make_pool, run):
    async def body():
        async with make_pool() as pool:
            first, second = await make(pool), await make(pool)
            assert maker(first) == maker(second) == pids(pool)[A.key]
            assert first.phases.keys() == {"queue", "denoise"}

    run(body())


def test_the_least_recently_used_shape_is_evicted(make_pool, run):
    async def body():
        async with make_pool(max_size=2) as pool:
            for shape in (A, B, A):
                await make(pool, shape)
            before = pids(pool)
            await make(pool, C)
            assert states(pool) == {A.key: "ready", C.key: "ready"}
            assert pids(pool)[A.key] == before[A.key]
            assert not psutil.pid_exists(before[B.key])

    run(body())


def test_a_busy_process_is_never_evicted(make_pool, run, gate):
    async def body():
        door = gate()
        async with make_pool(max_size=1, gpu_concurrency=2) as pool:
            busy = asyncio.create_task(make(pool, A, f"gate {door.path}"))
            fd = await door.wait_for_child()
            other = asyncio.create_task(make(pool, B))
            await until(lambda: pool.status()["waiting"] == 1)
            assert states(pool) == {A.key: "busy"}
            os.close(fd)
            assert maker(await busy)
            await other
            assert states(pool) == {B.key: "ready"}

    run(body())


def test_a_spawning_shape_does_not_hold_up_a_hot_one(make_pool, run, gate, monkeypatch):
    async def body():
        door = gate()
        monkeypatch.setenv("FAKE_SPAWN", f"{B.key}=gate{door.path}")
        async with make_pool(max_size=2) as pool:
            await make(pool, A)
            spawning = asyncio.create_task(make(pool, B))
            await until(lambda: states(pool).get(B.key) == "spawning")
            for _ in range(3):
                await make(pool, A)
            assert states(pool)[B.key] == "spawning"
            await door.open()
            await spawning

    run(body())


def test_a_generating_shape_does_not_hold_up_another_when_two_may_run(make_pool, run, gate):
    async def body():
        door = gate()
        async with make_pool(max_size=2, gpu_concurrency=2) as pool:
            await make(pool, B)
            slow = asyncio.create_task(make(pool, A, f"gate {door.path}"))
            fd = await door.wait_for_child()
            await make(pool, B)
            assert not slow.done()
            os.close(fd)
            await slow

    run(body())


def test_one_generation_at_a_time_by_default(make_pool, run, gate):
    async def body():
        door = gate()
        async with make_pool(max_size=2) as pool:
            await make(pool, B)
            order: list[str] = []
            slow = asyncio.create_task(make(pool, A, f"gate {door.path}"))
            fd = await door.wait_for_child()
            slow.add_done_callback(lambda _: order.append("slow"))
            next_one = asyncio.create_task(make(pool, B))
            next_one.add_done_callback(lambda _: order.append("next"))
            await until(lambda: pool.status()["waiting"] == 1)
            assert states(pool) == {A.key: "busy", B.key: "ready"}
            os.close(fd)
            await asyncio.gather(slow, next_one)
            assert order == ["slow", "next"]

    run(body())


def test_the_gpu_is_free_while_a_file_is_encoded(make_pool, run, gate):
    async def body():
        door = gate()
        async with make_pool(max_size=2) as pool:
            encoding = asyncio.create_task(make(pool, A, f"encode gate {door.path}"))
            fd = await door.wait_for_child()
            await make(pool, B)
            assert not encoding.done()
            os.close(fd)
            await encoding

    run(body())


def test_an_old_job_gets_its_slot_from_shapes_in_constant_use(make_pool, run):
    async def body():
        async with make_pool(max_size=1) as pool:
            flow = [asyncio.create_task(make(pool, A)) for _ in range(3)]
            cold = asyncio.create_task(make(pool, B))
            late = [asyncio.create_task(make(pool, A)) for _ in range(3)]
            done: list[str] = []
            for name, tasks in (("A", flow), ("B", [cold]), ("late A", late)):
                for task in tasks:
                    task.add_done_callback(lambda _, name=name: done.append(name))
            await asyncio.gather(*flow, cold, *late)
            assert done == ["A"] * 3 + ["B"] + ["late A"] * 3

    run(body())


@pytest.mark.parametrize("kind", ["soft", "refused"])
def test_a_soft_error_leaves_the_process_serving(make_pool, run, kind):
    async def body():
        async with make_pool() as pool:
            pid = maker(await make(pool))
            with pytest.raises(JobFailed, match=f"{kind} on purpose") as failed:
                await make(pool, A, kind)
            assert failed.value.kind == kind
            assert maker(await make(pool)) == pid

    run(body())


@pytest.mark.parametrize(
    ("prompt", "reason", "words"),
    [
        ("fatal", "cuda_fault", "fatal on purpose"),
        ("crash", "gen_eof", "SIGSEGV"),
        ("kill", "gen_eof", "SIGKILL"),
        ("exit 0", "gen_eof", "exit status 0"),
        ("truncated", "gen_eof", "exit status 0"),
        ("garbage", "parse_error", "broke the protocol"),
        ("oversized", "parse_error", "1073741824 bytes"),
        ("wrong id", "desync", "'another'"),
    ],
)
def test_a_job_that_loses_two_processes_fails_and_the_shape_serves_on(make_pool, run, prompt, reason, words):
    async def body():
        async with make_pool() as pool:
            before = maker(await make(pool))
            with pytest.raises(ProcessLost, match=words) as lost:
                await make(pool, A, prompt)
            assert lost.value.reason == reason
            assert lost.value.name == A.key
            assert "fake child of 64x64@9f starts" in str(lost.value)
            assert maker(await make(pool)) != before
            assert pool._leases == 1

    run(body())


def test_a_job_whose_process_dies_is_made_by_the_next_one(make_pool, run, tmp_path):
    async def body():
        async with make_pool() as pool:
            before = maker(await make(pool))
            video = await make(pool, A, f"crash once {tmp_path / 'crashed'}")
            assert maker(video) not in (before, 0)

    run(body())


@pytest.mark.parametrize("prompt", ["hang", "stop"])
def test_a_generation_that_takes_too_long_is_ended_and_not_repeated(make_pool, run, prompt):
    async def body():
        async with make_pool(Timeouts(spawn=20, generation=0.5, cancel=5, term=0.5)) as pool:
            with pytest.raises(ProcessLost, match=r"over 0\.5 s") as lost:
                await make(pool, A, prompt)
            assert lost.value.reason == "gen_timeout"
            await make(pool)

    run(body())


@pytest.mark.parametrize(
    ("spawn", "reason", "words"),
    [
        ("eof", "spawn_eof", "exit status 7"),
        ("broken", "spawn_eof", "no checkpoint"),
        ("garbage", "spawn_parse_error", "broke the protocol"),
        ("early", "spawn_parse_error", "before READY"),
        ("hang", "spawn_timeout", "LTX2_POOL_SPAWN_TIMEOUT"),
    ],
)
def test_a_spawn_that_fails_three_times_fails_its_jobs_and_no_others(make_pool, run, monkeypatch, spawn, reason, words):
    monkeypatch.setenv("FAKE_SPAWN", f"{A.key}={spawn}")

    async def body():
        timeouts = Timeouts(spawn=1.5, generation=20) if spawn == "hang" else QUICK
        async with make_pool(timeouts) as pool:
            results = await asyncio.gather(*(make(pool, A) for _ in range(3)), make(pool, B), return_exceptions=True)
            for lost in results[:3]:
                assert isinstance(lost, ProcessLost)
                assert lost.reason == reason
                assert words in str(lost)
            assert isinstance(results[3], Video)
            if spawn == "eof":
                assert "about to give up" in str(results[0])

    run(body())


def test_a_spawn_that_fails_once_is_repeated(make_pool, run, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_SPAWN", f"{A.key}=eof:once:{tmp_path / 'failed'}")

    async def body():
        async with make_pool() as pool:
            assert maker(await make(pool))

    run(body())


def test_a_program_that_can_not_be_started_is_a_spawn_failure(make_pool, run):
    async def body():
        async with make_pool() as pool:
            pool._host._spawner._program = ["/nonexistent/python"]
            with pytest.raises(ProcessLost, match="could not be started") as lost:
                await make(pool)
            assert lost.value.reason == "spawn_eof"

    run(body())


def test_the_exit_status_is_not_stolen_by_another_start(make_pool, run):
    """subprocess reaps what a forgotten Popen left behind whenever it starts something."""

    async def body():
        async with make_pool() as pool:
            pid = maker(await make(pool))
            gc.collect()
            os.kill(pid, signal.SIGKILL)
            while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                pass
            subprocess.run(["true"])  # noqa: ASYNC221 - it is this that must not reap another's child
            await until(lambda: not pool.status()["processes"])

    run(body())


def test_an_idle_process_that_dies_is_missed_at_once_and_replaced(make_pool, run):
    async def body():
        async with make_pool() as pool:
            pid = maker(await make(pool))
            os.kill(pid, signal.SIGKILL)
            await until(lambda: not pool.status()["processes"])
            assert maker(await make(pool)) != pid

    run(body())


def test_a_queued_job_that_is_cancelled_never_starts(make_pool, run, gate):
    async def body():
        door = gate()
        async with make_pool() as pool:
            running = asyncio.create_task(make(pool, A, f"gate {door.path}"))
            fd = await door.wait_for_child()
            queued = asyncio.create_task(make(pool, A, "crash"))
            await until(lambda: pool.status()["waiting"] == 1)
            queued.cancel()
            await until(queued.done)
            assert pool.status()["waiting"] == 0
            os.close(fd)
            await running
            await make(pool)

    run(body())


def test_a_running_job_that_is_cancelled_stops_and_the_process_serves_on(make_pool, run):
    async def body():
        async with make_pool() as pool:
            pid = maker(await make(pool))
            started = asyncio.Event()
            task = asyncio.create_task(pool.generate(job(A, "until cancelled"), lambda _: started.set()))
            await started.wait()
            task.cancel()
            assert maker(await make(pool)) == pid

    run(body())


def test_a_process_that_is_deaf_to_cancel_is_replaced(make_pool, run):
    async def body():
        async with make_pool(Timeouts(spawn=20, generation=20, cancel=0.2)) as pool:
            pid = maker(await make(pool))
            started = asyncio.Event()
            task = asyncio.create_task(pool.generate(job(A, "deaf to cancel"), lambda _: started.set()))
            await started.wait()
            task.cancel()
            assert maker(await make(pool)) != pid

    run(body())


def test_a_video_that_nobody_waits_for_any_more_is_deleted(make_pool, run, gate, tmp_path):
    async def body():
        door = gate()
        async with make_pool() as pool:
            task = asyncio.create_task(make(pool, A, f"gate {door.path}"))
            fd = await door.wait_for_child()
            task.cancel()
            os.close(fd)
            await until(lambda: pool.status()["running"] == 0)
            assert list((tmp_path / "run").iterdir()) == []

    run(body())


def test_cancellation_at_random_moments_leaves_nothing_behind(make_pool, run):
    async def body():
        moments = random.Random(7)
        async with make_pool(Timeouts(spawn=20, generation=20, cancel=0.3, term=0.5), max_size=2) as pool:
            for _ in range(40):
                task = asyncio.create_task(make(pool, moments.choice([A, B, C])))
                for _ in range(moments.randrange(60)):
                    await asyncio.sleep(0 if moments.random() < 0.7 else 0.002)
                task.cancel()
            await asyncio.gather(make(pool, A), make(pool, B))
            await until(lambda: pool.status()["running"] == 0)
            assert pool._leases == 1
            assert pool.status()["waiting"] == 0

    run(body())


def test_closing_lets_admitted_jobs_finish(make_pool, run, gate):
    async def body():
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

    run(body())


def test_closing_tells_jobs_that_do_not_finish_in_time(make_pool, run):
    async def body():
        async with make_pool() as pool:
            jobs = [asyncio.create_task(make(pool, shape, "hang")) for shape in (A, B)]
            await until(lambda: pool.status()["running"] == 1)
            await pool.close(0.1)
            for result in await asyncio.gather(*jobs, return_exceptions=True):
                assert isinstance(result, PoolClosed)

    run(body())


def test_output_can_not_touch_the_protocol_and_its_tail_is_bounded(make_pool, run):
    async def body():
        async with make_pool() as pool:
            await make(pool, A, "chatter 2000")  # 2 MB
            process = pool._processes[A]
            await until(lambda: len(process.tail) == 50)
            assert set(process.tail) == {"x" * 99}

    run(body())


def test_the_children_die_with_a_parent_that_is_killed(tmp_path):
    """SIGKILL leaves the parent no chance: PDEATHSIG and the guard do it."""
    program = f"""
import asyncio, os, signal, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from ltx2_pool.serving.pool import SubprocessPool
from ltx2_pool.processes.host import ProcessHost
from ltx2_pool.processes.process import ExecSpawner
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import Shape
async def main():
    host = ProcessHost(Recipe(model_path="none"), weights="private",
                       spawner=ExecSpawner([sys.executable, {str(FAKE_CHILD)!r}]))
    pool = SubprocessPool(host, Path({str(tmp_path)!r}), Path({str(tmp_path)!r}))
    await pool.start()
    await pool.generate(Job("j", Shape(64, 64, 9), "fine", 1, 2, 1.0, 24), lambda _: None)
    print(*(p["pid"] for p in pool.status()["processes"]), host._guard._process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    parent = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=60)
    assert parent.returncode == -signal.SIGKILL
    family = [int(pid) for pid in parent.stdout.split()]
    assert len(family) == 2
    _, alive = psutil.wait_procs([psutil.Process(p) for p in family if psutil.pid_exists(p)], timeout=2)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
