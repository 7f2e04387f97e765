"""Faults that once lost a job, a lease or a shape, each as it was found; all of these failed first."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import socket
from dataclasses import replace

import pytest

from ltx2_pool.processes.process import Timeouts
from ltx2_pool.processes.shape import ShapeProcess
from ltx2_pool.serving.breaker import Pauses
from ltx2_pool.serving.metrics import Metrics
from ltx2_pool.serving.tickets import Limits
from ltx2_pool.words.device import Device
from ltx2_pool.words.outcomes import JobFailed, NoRoom, Poisonous, PoolClosed, ProcessLost, Unavailable
from ltx2_pool.words.protocol import Memory, Step
from ltx2_pool.words.shapes import Shape
from tests.children import until

from .conftest import GIB, A, B, C, gathered, job, make, maker, nothing, pids, states

SHORT = Limits(job_timeout=15)


async def test_a_process_that_dies_while_it_encodes_costs_no_video(make_pool, tmp_path):
    """A1: the file of the first attempt was in the way of the second."""
    async with make_pool() as pool:
        video = await make(pool, A, f"die in encode once {tmp_path / 'met'}")
        assert video.path.exists()
        assert [path.name for path in (tmp_path / "run").iterdir()] == [video.path.name]


async def test_an_output_directory_that_cannot_be_made_costs_no_lease(make_pool, tmp_path):
    """A2: the error came up in the middle of the decision, and the lease was gone."""
    async with make_pool(Timeouts(term=1), limits=SHORT) as pool:
        await make(pool)
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").touch()
        with pytest.raises(NoRoom, match="cannot be made"):
            await make(pool)
        assert pool.status()["leases"] == 0
        (tmp_path / "run").unlink()
        assert (await make(pool)).path.exists()


@pytest.mark.parametrize("call", ["socketpair", "pipe", "pidfd_open"])
async def test_an_error_of_the_system_at_a_start_is_a_failed_start(make_pool, monkeypatch, call):
    """A3: one EMFILE made a shape unavailable until the worker was started again."""
    module = socket if call == "socketpair" else os
    errors, real = [OSError(errno.EMFILE, "Too many open files")], getattr(module, call)

    def once(*arguments):
        if errors:
            raise errors.pop()
        return real(*arguments)

    async with make_pool(limits=SHORT) as pool:
        monkeypatch.setattr(module, call, once)
        assert (await make(pool)).path.exists()
        assert not errors


async def test_a_job_dispatched_while_its_process_is_killed_is_tried_again(make_pool):
    """A4: an assertion failed, and its client was never answered."""
    async with make_pool(limits=SHORT, weights="shared") as pool:
        await make(pool)
        task = asyncio.create_task(make(pool))
        asyncio.get_running_loop().call_soon(pool._on_weights_lost, "cpu")
        assert (await task).path.exists()


async def test_no_more_warm_up_at_once_than_the_memory_is_counted_for(make_pool, gate, monkeypatch):
    """A5: eight at once, and memory was counted for one."""
    shapes = [Shape(64 * n, 64, 9) for n in range(1, 9)]
    door = gate()
    monkeypatch.setenv("LTX2_IMAGINARY", ",".join(f"{s.key}=gate{door.path}" for s in shapes))
    known = {s: Memory(resident=GIB, peak=20 * GIB) for s in shapes}
    async with make_pool(Timeouts(term=1), budget=76 * GIB, known=known, keys=shapes) as pool:
        jobs = [asyncio.create_task(make(pool, s)) for s in shapes]
        await until(lambda: len(pool.status()["processes"]) == 3)
        assert pool.status()["waiting"] == 8
        assert pool.status()["devices"]["cpu"]["held"] == 60 * GIB
        for task in jobs:
            task.cancel()
        await gathered(*jobs)
        pool.abort()


async def test_running_out_of_memory_is_nobody_s_poison_and_tried_again_alone(make_pool, tmp_path):
    """A6: a neighbour's memory was charged to the prompt, with a 400 after the second time."""
    async with make_pool(weights="private") as pool:
        await asyncio.gather(make(pool, A), make(pool, B))
        before = pool.status()["known"][A.key]["peak"]
        assert (await make(pool, A, f"oom once {tmp_path / 'first'}")).path.exists()
        assert pool.status()["known"][A.key]["raised"] or before
        # It runs out however often it is tried, alone too: that is told, and its parameters stay welcome.
        for _ in range(2):
            with pytest.raises(ProcessLost) as lost:
                await make(pool, C, "oom")
            assert lost.value.reason == "oom"


@pytest.mark.parametrize("outcome", ["cancelled", "soft", "refused"])
async def test_every_outcome_gives_the_memory_back(make_pool, outcome):
    """A7: after anything but success the allocator kept what it had, and nobody was told."""
    async with make_pool() as pool:
        await make(pool)
        started = asyncio.Event()
        prompt = "long" if outcome == "cancelled" else outcome
        task = asyncio.create_task(
            pool.generate(job(A, prompt), lambda event: started.set() if isinstance(event, Step) else None)
        )
        if outcome == "cancelled":
            await started.wait()
            task.cancel()
        await gathered(task)
        await until(lambda: states(pool) == {A.key: "ready"})
        assert pool.status()["processes"][0]["memory"]["resident"] == GIB
        # Its last words say that it has trimmed as often as it has worked: at the start, and for each of two jobs.
        with pytest.raises(ProcessLost) as lost:
            await make(pool, A, "die in denoise")
        assert lost.value.tail


async def test_a_broken_checkpoint_is_not_loaded_once_for_every_shape(make_pool, monkeypatch):
    """A9: ten shapes, thirty loads."""
    monkeypatch.setenv("LTX2_IMAGINARY", "weights=broken")
    shapes = [Shape(64 * n, 64, 9) for n in range(1, 11)]
    metrics = Metrics([shape.key for shape in shapes])
    devices = (Device("cpu", "cpu", "x86_64"),)
    async with make_pool(weights="shared", keys=shapes, budget=None, metrics=metrics, devices=devices) as pool:
        jobs = [asyncio.create_task(make(pool, shape)) for shape in shapes]
        await until(lambda: pool.health == "unable")
        assert metrics.failures.labels("helper")._value.get() <= 3
        assert "no checkpoint" in "".join(pool.status()["last_errors"].values())
        assert not any(task.done() for task in jobs)  # the next try may work: they wait for it
        monkeypatch.delenv("LTX2_IMAGINARY")
        videos = await asyncio.gather(*jobs)
        assert len(videos) == 10
        assert pool.health == "able"


async def test_a_worker_that_can_make_nothing_says_so_and_comes_back(make_pool, monkeypatch):
    """A10: it stayed registered and healthy, and answered 503 at once."""
    monkeypatch.setenv("LTX2_IMAGINARY", f"{A.key}=eof")
    async with make_pool(keys=[A], pauses=Pauses(first=0.3)) as pool:
        assert pool.health == "able"
        with pytest.raises(Unavailable):
            await make(pool)
        assert await pool.health_after("able") == "unable"
        monkeypatch.delenv("LTX2_IMAGINARY")
        # Nobody asks it any more: it has to find out by itself.
        async with asyncio.timeout(20):
            assert await pool.health_after("unable") == "able"
        assert (await make(pool)).path.exists()


async def test_a_drain_does_not_start_what_cannot_start_without_end(make_pool, monkeypatch):
    """A12: thirty-two starts in six seconds."""
    monkeypatch.setenv("LTX2_IMAGINARY", f"{A.key}=eof")
    metrics = Metrics([A.key])
    async with make_pool(metrics=metrics) as pool:
        task = asyncio.create_task(make(pool))
        await asyncio.sleep(0)
        await pool.close(20)
        with pytest.raises((PoolClosed, Unavailable)):
            await task
        assert metrics.spawns.labels(A.key)._value.get() == 3


async def test_a_client_that_leaves_as_its_video_comes_harms_nobody(make_pool, tmp_path, monkeypatch):
    """A13: the next client's process was killed for it, and the file stayed."""
    leaver, generate = {}, ShapeProcess.generate

    async def then_leave(self, j, *rest):
        done = await generate(self, j, *rest)
        if j is leaver.get("job"):
            asyncio.get_running_loop().call_soon(leaver["task"].cancel)
        return done

    monkeypatch.setattr(ShapeProcess, "generate", then_leave)
    async with make_pool(Timeouts(cancel=0.3)) as pool:
        await make(pool)
        leaver["job"] = job()
        leaver["task"] = asyncio.create_task(pool.generate(leaver["job"], nothing))
        await asyncio.sleep(0)
        pid = pids(pool)[A.key]
        video = await make(pool, A, "long 100")
        assert maker(video) == pid == pids(pool)[A.key]
        assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(leaver["job"].id)]


@pytest.mark.parametrize("why", ["capacity", "broken"])
async def test_ready_min_does_not_wait_for_more_than_can_become_ready(make_pool, monkeypatch, why):
    """A14: the worker never registered, and said nothing."""
    if why == "broken":
        monkeypatch.setenv("LTX2_IMAGINARY", f"{B.key}=eof")
    async with asyncio.timeout(20):
        async with make_pool(max_size=1 if why == "capacity" else None, prewarm=[A, B], ready_min=2) as pool:
            assert states(pool)[A.key] == "ready"
            assert pool.health == "able"


async def test_equal_requests_that_wait_already_end_no_more_than_two_processes(make_pool):
    """A17: each ended two."""
    metrics = Metrics([A.key])
    async with make_pool(metrics=metrics) as pool:
        answers = await gathered(*(make(pool, A, "die in denoise") for _ in range(5)))
        assert metrics.failures.labels("gen_eof")._value.get() == 2
        assert sorted(type(answer).__name__ for answer in answers) == ["Poisonous"] * 4 + ["ProcessLost"]
        with pytest.raises(Poisonous):
            await make(pool, A, "die in denoise")


@pytest.mark.parametrize("prompt", ["die when idle", "kill in denoise", "crash"])
async def test_a_death_that_is_not_a_job_s_is_not_held_against_it(make_pool, tmp_path, prompt):
    """A18: the death of an idle process was the next job's, and one before its first phase still is not."""
    async with make_pool() as pool:
        for number in range(3):
            if prompt == "die when idle":
                await make(pool, A, prompt)
                assert (await make(pool)).path.exists()
            else:
                word = f"{prompt} once {tmp_path / f'met{number}'}"
                assert (await make(pool, A, word)).path.exists()
        assert pool.status()["unavailable"] == {}


async def test_a_stopped_process_is_replaced_in_seconds_idle_or_not(make_pool):
    """A22: the GPU stood still for half an hour."""
    async with make_pool(Timeouts(spawn=20, generation=600, cancel=5, term=1, silence=1)) as pool:
        await make(pool)
        pid = pids(pool)[A.key]
        os.kill(pid, signal.SIGSTOP)
        async with asyncio.timeout(15):
            await until(lambda: pid not in pids(pool).values())
            started = asyncio.Event()
            task = asyncio.create_task(pool.generate(job(A, "long 300"), lambda _: started.set()))
            await started.wait()
            os.kill(pids(pool)[A.key], signal.SIGSTOP)
            assert (await task).path.exists()


async def test_a_peak_that_was_never_measured_is_unknown_and_runs_alone(make_pool, gate):
    """A23: without a warm-up, the peak of a start was taken for that of a video."""
    door = gate()
    async with make_pool(budget=100 * GIB, known={}) as pool:
        slow = asyncio.create_task(make(pool, A, f"gate {door.path}"))
        fd = await door.wait_for_child()
        other = asyncio.create_task(make(pool, B))
        await until(lambda: pool.status()["waiting"] == 1)
        assert states(pool) == {A.key: "spawning"}
        os.close(fd)
        await asyncio.gather(slow, other)
        assert pool.status()["known"][A.key]["peak"] == 2 * GIB


async def test_abort_starts_nothing_for_clients_that_were_told_no(make_pool):
    """A24: two more processes were started."""
    metrics = Metrics([A.key, B.key, C.key])
    async with make_pool(max_size=1, metrics=metrics) as pool:
        jobs = [asyncio.create_task(make(pool, shape, "hang")) for shape in (A, B, C)]
        await until(lambda: pool.status()["running"] == 1)
        pool.abort()
        assert {type(answer) for answer in await gathered(*jobs)} == {PoolClosed}
        await until(lambda: not pool.status()["processes"])
        assert sum(metrics.spawns.labels(shape.key)._value.get() for shape in (A, B, C)) == 1


async def test_the_wait_that_is_told_counts_videos_and_starts_only(make_pool, gate):
    """A36: crashes and cancels were averaged in as if they were videos, and starts were left out."""
    door = gate()
    async with make_pool() as pool:
        await make(pool, A, "long 20")
        for _ in range(5):
            with pytest.raises(JobFailed):
                await make(pool, A, "soft")
        busy = asyncio.create_task(make(pool, A, f"gate {door.path}"))
        fd = await door.wait_for_child()
        assert pool.status()["expected_wait_s"] >= 0.1
        os.close(fd)
        await busy


async def test_the_longest_prompts_do_not_end_a_process(make_pool):
    """A29: two prompts of control characters were longer than a message may be."""
    async with make_pool() as pool:
        pid = maker(await make(pool))
        longest = "\x01" * 100_000
        video = await pool.generate(replace(job(A, longest), negative_prompt=longest), nothing)
        assert maker(video) == pid


async def test_a_prewarm_shape_that_does_not_start_keeps_one_timer(make_pool, monkeypatch):
    """A26: one more at every decision."""
    monkeypatch.setenv("LTX2_IMAGINARY", f"{B.key}=eof")
    async with make_pool(prewarm=[A, B], ready_min=1) as pool:
        await until(lambda: pool.status()["unavailable"])
        loop, timers = asyncio.get_running_loop(), []

        class Counting:
            def call_later(self, *arguments):
                timers.append(loop.call_later(*arguments))
                return timers[-1]

            def __getattr__(self, name):
                return getattr(loop, name)

        with monkeypatch.context() as patch:
            patch.setattr(asyncio, "get_running_loop", Counting)
            for _ in range(20):
                await make(pool, A)
        assert len(timers) > 20
        assert sum(not timer.cancelled() for timer in timers) == 1
