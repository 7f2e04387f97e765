"""What a second reader proved against the new core, each as it was found; all of these failed first."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import time

import pytest

from ltx2_pool.processes.spawner import ExecSpawner
from ltx2_pool.processes.subprocesses import ProcessHost
from ltx2_pool.serving.book import RIDDLES, Book
from ltx2_pool.serving.breaker import Pauses
from ltx2_pool.serving.ledger import Ledger
from ltx2_pool.serving.metrics import Metrics
from ltx2_pool.serving.pool import Pool
from ltx2_pool.words.device import Device
from ltx2_pool.words.outcomes import ProcessLost
from ltx2_pool.words.protocol import Memory, Phase
from ltx2_pool.words.shapes import Key
from tests.children import CONFINED, needs_landlock, until

from .conftest import GIB, A, B, gathered, job, make, maker, nothing, pids, states

DEVICES = (Device("cpu", "cpu", "x86_64"),)


def both_unheard(pool: Pool, weights: int) -> None:
    """Keeps the loop until the weights process is dead and the only other one has sent READY: both come at once."""
    os.waitid(os.P_PID, weights, os.WEXITED | os.WNOWAIT)
    (handle,) = pool._handles.values()
    connection = handle._channel._writer.get_extra_info("socket")
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        deadline = time.monotonic() + 20
        heard = b""
        while b'"ready"' not in heard:
            assert time.monotonic() < deadline
            with contextlib.suppress(BlockingIOError):  # it has not said anything yet
                heard = same.recv(1 << 16, socket.MSG_PEEK)
            time.sleep(0.002)


async def test_a_budget_is_not_measured_while_the_weights_are_dying(make_pool, gate, monkeypatch):
    """READY and the end of the weights process came in one poll: the budget was that of a device without weights."""
    door, pools = gate(), []

    def free(_: Device) -> int:  # 40 GiB of weights, there or gone
        return 60 * GIB if pools[0]._host.lending("cpu") is not None else 100 * GIB

    monkeypatch.setattr(Device, "free", free)
    prompts = [f"gate {door.path}"]
    async with make_pool(
        weights="shared",
        budget=None,
        known={},
        prewarm=[A],
        devices=DEVICES,
        warm_up=lambda shape: (job(shape.shape, prompts.pop() if prompts else "fine"),),
    ) as pool:
        pools.append(pool)
        fd = await door.wait_for_child()
        weights = pool.status()["helpers"]["weights"]
        os.kill(weights, signal.SIGKILL)
        os.close(fd)
        both_unheard(pool, weights)
        await until(lambda: pool._host.lending("cpu") is not None and states(pool).get(A.key) == "ready")
        await make(pool, A)
        assert pool.status()["devices"]["cpu"]["budget"] <= 62 * GIB


async def test_a_client_that_leaves_as_its_job_is_given_to_a_process_holds_nothing(make_pool):
    """The cancel came before the process had the job, and was lost: it was made to its end for nobody."""
    async with make_pool() as pool:
        await asyncio.gather(make(pool, A), make(pool, B))
        real = pool._book.encoding

        def and_then_leave(entry):
            real(entry)
            asyncio.get_running_loop().call_soon(leaver.cancel)

        pool._book.encoding = and_then_leave
        first = asyncio.create_task(make(pool, A))
        await asyncio.sleep(0)
        leaver = asyncio.create_task(make(pool, B, "until cancelled"))
        await gathered(first, leaver)
        pool._book.encoding = real
        async with asyncio.timeout(3):
            await make(pool, A)
        assert pool.status()["running"] == 0


async def test_a_budget_that_could_not_be_measured_is_asked_for_again(make_pool, monkeypatch):
    """With private weights one error of the driver meant one process at a time for ever."""
    asked = []

    def free(_: Device) -> int:
        asked.append(1)
        if len(asked) == 1:
            raise RuntimeError("NVML: unknown error")
        return 100 * GIB

    monkeypatch.setattr(Device, "free", free)
    async with make_pool(budget=None, devices=DEVICES) as pool:
        await make(pool, A)
        await make(pool, B)
        assert len(states(pool)) == 2


async def test_a_broken_shape_to_prewarm_does_not_keep_the_others_out(make_pool, monkeypatch):
    monkeypatch.setenv("LTX2_IMAGINARY", f"{A.key}=eof")
    async with asyncio.timeout(15):
        async with make_pool(prewarm=[A], ready_min=1) as pool:
            assert pool.health == "able"
            assert (await make(pool, B)).path.exists()


@pytest.mark.parametrize("prompt", ["compile", "exit 1"])
async def test_a_job_that_ends_processes_for_no_reason_from_outside_costs_three(make_pool, tmp_path, prompt):
    """It cost ten, and ten directories."""
    metrics = Metrics([A.key])
    async with make_pool(metrics=metrics) as pool:
        with pytest.raises(ProcessLost):
            await make(pool, A, prompt)
        assert metrics.spawns.labels(A.key)._value.get() <= RIDDLES + 1
        caches = tmp_path / "scratch" / "caches"
        assert not caches.exists() or len(list(caches.iterdir())) == 1


async def test_a_prewarmed_process_that_dies_at_once_is_started_with_pauses(make_pool, monkeypatch):
    """Thirty starts in six seconds."""
    real = ProcessHost.start_process

    async def start(self, process, warm_up, cache=None):
        ready = await real(self, process, warm_up, cache)
        asyncio.get_running_loop().call_soon(os.kill, process.pid, signal.SIGSEGV)
        return ready

    monkeypatch.setattr(ProcessHost, "start_process", start)
    began = time.monotonic()
    metrics = Metrics([A.key])
    async with make_pool(metrics=metrics, prewarm=[A]):
        spawns = metrics.spawns.labels(A.key)._value.get
        await until(lambda: spawns() == 5)
        assert time.monotonic() - began >= 0.1 + 0.2 + 0.4 + 0.8


async def test_jobs_that_wait_in_a_pause_do_not_stop_prewarming(make_pool, monkeypatch):
    monkeypatch.setenv("LTX2_IMAGINARY", f"{A.key}=kill")
    async with make_pool(prewarm=[B], pauses=Pauses(disturbed=2, longest_disturbed=2)) as pool:
        await until(lambda: states(pool).get(B.key) == "ready")
        waiting = asyncio.create_task(make(pool, A))
        await until(lambda: pool._book.starts.get(Key(A)))
        pid = pids(pool)[B.key]
        os.kill(pid, signal.SIGKILL)
        await until(lambda: states(pool).get(B.key) == "ready" and pids(pool)[B.key] != pid)
        waiting.cancel()
        await gathered(waiting)


async def test_cancelled_jobs_cost_no_turns(make_pool, gate):
    async with make_pool() as pool:
        await make(pool)
        door = gate()
        busy = asyncio.create_task(pool.generate(job(A, f"gate {door.path}"), nothing, "x"))
        fd = await door.wait_for_child()
        for _ in range(30):
            task = asyncio.create_task(pool.generate(job(), nothing, "innocent"))
            await asyncio.sleep(0)
            task.cancel()
            await gathered(task)
        order: list[str] = []

        async def one(user: str) -> None:
            await pool.generate(job(), nothing, user)
            order.append(user)

        jobs = [asyncio.create_task(one(user)) for user in ["innocent"] + ["greedy"] * 20]
        await until(lambda: pool.status()["waiting"] == 21)
        os.close(fd)
        await asyncio.gather(busy, *jobs)
        assert order.index("innocent") <= 1


async def test_a_start_that_does_not_fit_its_device_fails_whatever_the_other_device_does():
    """It was tried without end, because something was on the other one."""
    book = Book(Ledger({"d0": 100, "d1": 100}), keys=[Key(A), Key(B)])
    book.admit(job(A), Key(A), "", lambda _: None, 0.0)
    (begun,) = book.next_actions(0.0)
    book.ready(begun.process, Memory(resident=10, peak=20), 1.0)
    book.next_actions(0.0)
    answers: list[object] = []
    book.admit(job(B), Key(B), "", answers.append, 0.0)
    now, starts = 0.0, 0
    while not answers and starts < 20:
        for action in book.next_actions(now):
            if hasattr(action, "warm"):
                starts += 1
                book.start_failed(action.process, ProcessLost("b", "oom", "memory ran out"), now)
                book.gone(action.process)
        now += 1.0
    assert answers
    assert starts <= 4


async def test_the_death_of_an_idle_process_is_counted_once(make_pool):
    """Not at all, if anything happened before it was buried."""
    metrics = Metrics([A.key, B.key])
    async with make_pool(metrics=metrics) as pool:
        pid = maker(await make(pool))
        (handle,) = pool._handles.values()
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not handle.alive)
        await make(pool)
        assert metrics.failures.labels("killed")._value.get() == 1


async def test_abort_does_not_wait_for_a_pause(make_pool, tmp_path):
    pauses = Pauses(disturbed=8.0, longest_disturbed=10)
    async with make_pool(spawner=ExecSpawner([str(tmp_path / "none")]), pauses=pauses) as pool:
        waiting = asyncio.create_task(make(pool))
        await until(lambda: pool._book.starts and not pool.status()["processes"])
        closing = asyncio.create_task(pool.close(60))
        await asyncio.sleep(0)
        async with asyncio.timeout(3):
            pool.abort()
            await gathered(waiting)
            await closing


async def test_a_listener_that_raises_costs_nobody_a_process(make_pool):
    metrics = Metrics([A.key])

    def listener(event: object) -> None:
        if isinstance(event, Phase):
            raise ValueError("on purpose")

    async with make_pool(metrics=metrics) as pool:
        assert (await pool.generate(job(), listener)).path.exists()
        assert metrics.spawns.labels(A.key)._value.get() == 1


@needs_landlock
async def test_a_directory_of_videos_that_is_gone_costs_confined_shapes_a_process_and_no_job(make_pool, tmp_path):
    """They were kept out of the new one for ever, and every job of a hot shape failed from then on."""
    videos, metrics = tmp_path / "run", Metrics([A.key, B.key])
    videos.mkdir()
    async with make_pool(spawner=ExecSpawner(CONFINED), metrics=metrics) as pool:
        for _ in range(3):
            before = [maker(await make(pool, shape)) for shape in (A, B)]
            shutil.rmtree(videos)
            after = [maker(await make(pool, shape)) for shape in (A, B)]
            assert set(before).isdisjoint(after)
            assert pids(pool) == dict(zip((A.key, B.key), after, strict=True))
        assert metrics.failures.labels("system")._value.get() == 6
        assert metrics.retries.labels(A.key)._value.get() == 3


@needs_landlock
async def test_a_directory_that_no_process_may_write_costs_a_job_three_processes_and_nobody_is_blamed(
    make_pool, tmp_path
):
    """It is beside the caches, where confinement lets nobody write."""
    forbidden = tmp_path / "cache" / "per-shape" / "run"
    forbidden.mkdir(parents=True)
    (tmp_path / "run").symlink_to(forbidden)
    metrics = Metrics([A.key])
    async with make_pool(spawner=ExecSpawner(CONFINED), metrics=metrics) as pool:
        for number in (1, 2, 3):
            with pytest.raises(ProcessLost, match="may not write the file") as lost:  # and never Poisonous
                await make(pool)
            assert lost.value.reason == "system"
            assert metrics.spawns.labels(A.key)._value.get() == number * RIDDLES
        (tmp_path / "run").unlink()
        (tmp_path / "run").mkdir()
        assert (await make(pool)).path.exists()
