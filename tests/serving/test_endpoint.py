"""A worker's life over a made-up Dynamo: start, health, presence, drain, abort."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from types import SimpleNamespace

import pytest
from dynamo.llm.exceptions import HttpError

from ltx2_pool.serving import endpoint, names, presence
from ltx2_pool.serving.endpoint import serve
from ltx2_pool.serving.exits import BROKEN, FAILED, LOST, STOPPED, LastResort
from ltx2_pool.serving.traffic import Traffic
from ltx2_pool.tools.stack import TINY_MENU
from ltx2_pool.words.menu import Menu
from ltx2_pool.words.settings import Settings
from tests.serving.made_up import Counts, HangingFileSystem, MadeUpPool, Runtime, until


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a worker: its task, its pool, its Dynamo, and the statuses with which it was ended the hard way."""
    HangingFileSystem.start_again()
    monkeypatch.setattr(endpoint, "UNREGISTER_GRACE", 0.01)
    monkeypatch.setattr(endpoint, "SETTLE", 0.2)
    monkeypatch.setattr(names, "register_engine_metrics_callback", lambda *_, **__: None)

    async def register_model(*_, **__):
        pass

    monkeypatch.setattr(names, "register_model", register_model)
    for name, value in (("interval", 0.01), ("misses", 2), ("give_up", 0.1)):
        monkeypatch.setitem(presence.Presence.__init__.__kwdefaults__, name, value)
    monkeypatch.setattr(presence, "_LOOK", 0.01)

    async def go(*, ready=True, **settings):
        pool, runtime, hard = MadeUpPool(tmp_path), Runtime(), []
        if not ready:
            pool.ready.clear()
        traffic = Traffic(tmp_path / "traffic.json")
        task = asyncio.create_task(
            serve(
                runtime,
                pool,
                Menu.load(TINY_MENU),
                Settings(model=tmp_path, shapes=TINY_MENU, **settings),
                Counts(),
                traffic,
                LastResort(hard.append),
            )
        )
        if ready:
            await until(lambda: runtime.healthy and runtime.made.served)
        return SimpleNamespace(task=task, pool=pool, runtime=runtime, endpoint=runtime.made, hard=hard, traffic=traffic)

    yield go
    HangingFileSystem.let_go.set()


def tell() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


async def ended(worker, status: int) -> None:
    async with asyncio.timeout(20):
        assert await worker.task == status
    assert worker.pool.closes == 1
    assert worker.hard == []
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def refused(request, status: int = 503) -> None:
    with pytest.raises(HttpError) as caught:
        await request
    assert caught.value.code == status


async def test_the_first_signal_lets_the_jobs_finish(start, tmp_path):
    worker = await start()
    request = worker.endpoint.ask("hold")
    await until(lambda: worker.pool.held)
    tell()
    await until(lambda: worker.pool.closing)
    assert not worker.endpoint.listed
    assert worker.pool.drain_timeout == 600
    worker.pool.release()
    assert (await request)["status"] == "completed"
    await ended(worker, STOPPED)
    assert Traffic(tmp_path / "traffic.json").scores().keys() == {"64x64@9f"}


async def test_nothing_outlives_the_drain(start):
    """Neither a job, which the pool refuses, nor a delivery, which it knows nothing of."""
    worker = await start(drain_timeout=0.1, media_output_fs_url="hanging://media", delivery_timeout=1000)
    upload = worker.endpoint.ask(response_format="url")
    job = worker.endpoint.ask("hold")
    await until(lambda: HangingFileSystem.waiting and worker.pool.held)
    tell()
    await refused(job)
    await refused(upload)
    await ended(worker, STOPPED)


async def test_the_second_signal_tells_everybody_at_once(start):
    worker = await start(media_output_fs_url="hanging://media", delivery_timeout=1000)
    upload = worker.endpoint.ask(response_format="url")
    job = worker.endpoint.ask("hold")
    await until(lambda: HangingFileSystem.waiting and worker.pool.held)
    tell()
    await until(lambda: worker.pool.closing)
    assert not job.done()
    assert not upload.done()
    tell()
    await refused(job)
    await refused(upload)
    await ended(worker, STOPPED)
    assert worker.pool.aborted


async def test_a_pool_that_does_not_end_is_left_behind(start, monkeypatch):
    monkeypatch.setattr(endpoint, "ABORT_TIMEOUT", 0.05)
    worker = await start()
    gate = asyncio.Event()

    async def hang(_drain=0):
        await gate.wait()

    worker.pool.close = hang
    tell()
    tell()
    await until(lambda: worker.hard)
    assert worker.hard == [FAILED]
    gate.set()
    assert await worker.task == STOPPED


async def test_a_signal_during_the_start(start):
    worker = await start(ready=False)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    tell()
    await ended(worker, STOPPED)
    assert not worker.endpoint.served
    assert not worker.runtime.healthy


@pytest.mark.parametrize("status", [STOPPED, LOST])
async def test_a_registration_that_hangs_can_be_stopped_and_is_given_up(start, monkeypatch, status):
    registering = asyncio.Event()
    armed = []

    async def hang(*_, **__):
        registering.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(names, "register_model", hang)
    monkeypatch.setattr(LastResort, "arm", lambda _, seconds, status: armed.append((worker.pool.closing, status)))
    if status == LOST:
        monkeypatch.setattr(endpoint, "REGISTER_TIMEOUT", 0.01)
    worker = await start(ready=False)
    worker.pool.ready.set()
    if status == STOPPED:
        await registering.wait()
        tell()
    await ended(worker, status)
    assert armed[0] == (False, status), "nothing would end it if its way out hung"
    assert not worker.endpoint.served


async def test_a_start_that_fails_says_so_and_closes_the_pool(start):
    worker = await start(ready=False)

    async def fail():
        raise OSError("no GPU")

    worker.pool.start = fail
    with pytest.raises(OSError, match="no GPU"):
        await worker.task
    assert worker.pool.closes == 1


async def test_unable_is_out_of_discovery_and_able_is_back(start, caplog):
    worker = await start()
    worker.pool.health = "unable"
    await until(lambda: not worker.endpoint.listed)
    assert worker.runtime.healthy is False
    assert "no shape can be made now" in caplog.text
    assert "disk on fire" in caplog.text
    assert (await worker.endpoint.ask())["status"] == "completed"  # whoever still comes is served as well as it goes
    worker.pool.health = "able"
    await until(lambda: worker.endpoint.listed and worker.runtime.healthy)
    assert "videos can be made again" in caplog.text
    assert (await worker.runtime.routes["video/status"](None))["health"] == "able"
    tell()
    await ended(worker, STOPPED)


async def test_unable_while_the_end_of_a_shortage_is_told_is_neither_listed_nor_healthy(start, monkeypatch):
    class Shortage:
        short = False

        def look(self):
            pass

        async def watch(self, tell):
            self.tell = tell
            await asyncio.Event().wait()

    shortage, registering, answer = Shortage(), asyncio.Event(), asyncio.Event()
    monkeypatch.setattr(endpoint, "Descriptors", lambda: shortage)
    worker = await start()

    async def register_model(*_, **__):
        registering.set()
        await answer.wait()

    monkeypatch.setattr(names, "register_model", register_model)
    shortage.short = True
    await shortage.tell()
    assert (worker.endpoint.listed, worker.runtime.healthy) == (False, False)
    shortage.short = False
    back = asyncio.create_task(shortage.tell())
    await registering.wait()
    worker.pool.health = "unable"
    answer.set()
    await back
    await until(lambda: not worker.endpoint.listed and not worker.runtime.healthy)
    tell()
    await ended(worker, STOPPED)


async def test_broken_ends_a_worker_that_cannot_leave_discovery(start, monkeypatch):
    monkeypatch.setattr(presence, "ANSWER_TIMEOUT", 0.05)
    monkeypatch.setattr(names, "LEAVE_TIMEOUT", 0.05)
    worker = await start()
    leaving = asyncio.Event()

    async def hang():
        leaving.set()
        await asyncio.Event().wait()

    worker.endpoint.unregister_endpoint_instance = hang
    worker.pool.health = "unable"
    await leaving.wait()
    worker.pool.health = "broken"
    await ended(worker, BROKEN)


async def test_broken_answers_what_is_there_and_ends_for_its_supervisor(start, caplog):
    worker = await start()
    request = worker.endpoint.ask("hold")
    await until(lambda: worker.pool.held)
    worker.pool.health = "broken"
    await until(lambda: worker.pool.closing)
    assert not worker.endpoint.listed
    assert worker.pool.drain_timeout == endpoint.BROKEN_DRAIN
    worker.pool.release()
    assert (await request)["status"] == "completed"
    await ended(worker, BROKEN)
    assert "ending with status 4: nothing can be made here" in caplog.text


async def test_a_worker_that_fell_out_of_discovery_gets_back(start, caplog):
    worker = await start()
    worker.endpoint.listed = False
    await until(lambda: worker.endpoint.listed)
    assert worker.endpoint.entered == 1
    assert not worker.task.done()
    tell()
    await ended(worker, STOPPED)


async def test_a_worker_that_does_not_get_back_drains_and_ends_with_status_3(start, caplog):
    worker = await start()
    request = worker.endpoint.ask("hold")
    await until(lambda: worker.pool.held)
    worker.endpoint.cannot_enter = OSError("the store is away")
    worker.endpoint.listed = False
    await until(lambda: worker.pool.closing)
    worker.pool.release()
    assert (await request)["status"] == "completed"
    await ended(worker, LOST)
    assert "ending with status 3: not in discovery" in caplog.text


async def test_dynamo_that_stops_serving_unasked_ends_the_worker(start):
    worker = await start()
    worker.endpoint.stop.set()
    await ended(worker, LOST)


async def test_a_watch_that_fails_begins_again(start, caplog):
    worker = await start()
    calm, worker.pool.health_after = worker.pool.health_after, None
    worker.pool.health = "unable"
    await until(lambda: "a watch failed" in caplog.text)
    worker.pool.health_after = calm
    worker.pool.health = "able"
    await until(lambda: worker.endpoint.listed and worker.runtime.healthy)
    tell()
    await ended(worker, STOPPED)


async def test_a_worker_that_is_cancelled_ends_in_order(start):
    worker = await start()
    worker.task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await worker.task
    assert worker.pool.closes == 1
    assert not worker.endpoint.listed
