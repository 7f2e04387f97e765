"""Mode 0 keeps the contract: one generator inside the worker, here an imaginary one."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import ltx2_pool.model
from ltx2_pool.processes import inprocess
from ltx2_pool.processes.inprocess import InProcessHost
from ltx2_pool.processes.process import Timeouts
from ltx2_pool.serving.book import Book
from ltx2_pool.serving.ledger import Ledger
from ltx2_pool.serving.pool import Pool
from ltx2_pool.serving.tickets import Limits
from ltx2_pool.tools import imaginary
from ltx2_pool.words.outcomes import JobFailed, JobTimeout, NoRoom, PoolClosed, ProcessLost, QueueFull, Unavailable
from ltx2_pool.words.protocol import Step
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.shapes import Key
from tests.children import until

from .conftest import A, B, C, gathered, job, make, nothing

ENDS = {"exit": SystemExit(5), "stop": StopIteration("on purpose")}
"""What ends a program, or a coroutine, when nobody minds it."""


class Generator:
    """Takes steps for as long as the prompt says; a deaf one does not listen in between."""

    modules: dict[str, object] = {}  # noqa: RUF012 - nothing is in it

    def generate(self, asked, sink, on_phase, on_step, pixels=()):
        self.seen = [bytes(picture[:4]) for picture in pixels]
        word, _, seconds = asked.prompt.partition(" ")
        on_phase("text")
        on_phase("denoise")
        if word == "fault":
            raise imaginary.misbehaviour.DeviceFault("on purpose")
        if word == "oom":
            raise imaginary.misbehaviour.OutOfMemory("on purpose")
        if word == "soft":
            raise RuntimeError("on purpose")
        if word in ENDS:
            raise ENDS[word]
        end = time.monotonic() + float(seconds or 0)
        while time.monotonic() < end:
            if word != "deaf":
                on_step(0, 1)
            time.sleep(0.005)
        on_phase("decode")


@pytest.fixture
def loading(monkeypatch) -> Iterator[threading.Event]:
    """The checkpoint is loaded while this is set."""
    loaded = threading.Event()
    loaded.set()

    def build(*_):
        loaded.wait(30)
        return built

    built = Generator()

    monkeypatch.setattr(imaginary, "build_generator", build)
    for name in ("engine", "mp4"):
        monkeypatch.setitem(sys.modules, f"ltx2_pool.model.{name}", imaginary)
        monkeypatch.setattr(ltx2_pool.model, name, imaginary, raising=False)
    yield loaded
    loaded.set()


def pool_of(directory: Path, timeouts: Timeouts, limits: Limits | None = None, **options) -> Pool:
    host = InProcessHost(Recipe(model_path="none"), directory / "cache", timeouts)
    book = Book(Ledger({"cpu": sys.maxsize}), limits or Limits(), [Key(A), Key(B), Key(C)], [Key(A)])
    return Pool(host, book, directory / "run", **options)


async def test_videos_one_after_the_other_and_every_soft_outcome(loading, tmp_path):
    pool = pool_of(tmp_path, Timeouts(), ready_min=1)
    await pool.start()
    assert pool.health == "able"
    videos = await asyncio.gather(*(make(pool, shape, "fine") for shape in (A, B, C, A)))
    assert all(video.path.exists() for video in videos)
    with pytest.raises(JobFailed, match="on purpose"):
        await make(pool, A, "soft")
    with pytest.raises(ProcessLost) as lost:
        await make(pool, A, "oom")
    assert lost.value.reason == "oom"
    assert (await make(pool, B, "fine")).path.exists()  # memory that ran out breaks nothing
    await pool.close()


@pytest.mark.parametrize("end", ENDS)
async def test_a_library_that_would_end_the_program_ends_a_start_or_a_job(loading, tmp_path, monkeypatch, end):
    def build(*_):
        raise ENDS[end]

    pool = pool_of(tmp_path, Timeouts())
    with monkeypatch.context() as broken:
        broken.setattr(imaginary, "build_generator", build)
        await pool.start()
        async with asyncio.timeout(10):
            with pytest.raises(Unavailable, match=type(ENDS[end]).__name__):
                await make(pool, A, "fine")
    async with asyncio.timeout(10):
        with pytest.raises((JobFailed, ProcessLost), match=type(ENDS[end]).__name__):
            await make(pool, B, end)
        assert (await make(pool, B, "fine")).path.exists()
    await pool.close()


async def test_the_same_limits_and_deadlines(loading, tmp_path):
    pool = pool_of(tmp_path, Timeouts(cancel=5), Limits(max_queue=1, job_timeout=0.5))
    await pool.start()
    await make(pool, A, "fine")
    running = asyncio.create_task(make(pool, A, "long 20"))
    await until(lambda: pool.status()["running"] == 1)
    waiting = asyncio.create_task(make(pool, B, "fine"))
    await until(lambda: pool.status()["waiting"] == 1)
    with pytest.raises(QueueFull):
        await make(pool, A, "fine")
    with pytest.raises(JobTimeout):
        await running
    await gathered(waiting)
    await until(lambda: pool.status()["running"] == 0)  # it stopped at its next step
    assert (await make(pool, A, "fine")).path.exists()
    await pool.close()


async def test_a_client_that_leaves_frees_the_generator(loading, tmp_path):
    pool = pool_of(tmp_path, Timeouts(cancel=5))
    await pool.start()
    started = asyncio.Event()

    def on_event(event: object) -> None:
        if isinstance(event, Step):
            started.set()

    task = asyncio.create_task(pool.generate(job(A, "long 20"), on_event))
    await started.wait()
    task.cancel()
    async with asyncio.timeout(5):
        assert (await make(pool, A, "fine")).path.exists()
    await pool.close()


@pytest.mark.parametrize("fault", ["fault", "deaf 3"])
async def test_what_cannot_be_cured_is_said(loading, tmp_path, fault):
    """A device fault, and a job that can be stopped by nothing."""
    pool = pool_of(tmp_path, Timeouts(generation=20, cancel=0.5, term=1))
    await pool.start()
    await make(pool, A, "fine")
    task = asyncio.create_task(make(pool, A, fault))
    if fault != "fault":
        await until(lambda: pool.status()["running"] == 1)
        task.cancel()
    await gathered(task)
    await until(lambda: pool.health == "broken", 10)
    with pytest.raises(PoolClosed, match="any more"):
        await make(pool, B, "fine")
    await pool.close()


async def test_a_load_that_hangs_is_said_and_start_returns(loading, tmp_path):
    loading.clear()
    pool = pool_of(tmp_path, Timeouts(weights=0.3), ready_min=1)
    async with asyncio.timeout(10):
        await pool.start()
        assert pool.health == "broken"
        await pool.close()


async def test_closing_does_not_wait_for_a_load(loading, tmp_path):
    loading.clear()
    pool = pool_of(tmp_path, Timeouts(weights=600))
    await pool.start()
    waiting = asyncio.create_task(make(pool, A, "fine"))
    await until(lambda: pool.status()["processes"])
    async with asyncio.timeout(5):
        await pool.close()
    assert [type(answer) for answer in await gathered(waiting)] == [PoolClosed]


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_closing_waits_for_a_deaf_job_no_longer_than_the_grace(loading, tmp_path, how):
    pool = pool_of(tmp_path, Timeouts(generation=600, cancel=0.5))
    await pool.start()
    await make(pool, A, "fine")
    task = asyncio.create_task(pool.generate(job(A, "deaf 3"), nothing))
    await until(lambda: pool.status()["running"] == 1)
    if how == "abort":
        pool.abort()
    async with asyncio.timeout(5):
        await pool.close()
    assert [type(answer) for answer in await gathered(task)] == [PoolClosed]


async def test_pictures_that_cannot_be_mapped_cost_their_job_and_nothing_else(loading, tmp_path, monkeypatch):
    """They were mapped half-way through: the generator was never free again, and the worker never ended."""
    pool = pool_of(tmp_path, Timeouts())
    await pool.start()
    pixels = os.memfd_create("pixels", os.MFD_CLOEXEC)
    os.write(pixels, b"seen")
    try:
        with monkeypatch.context() as refusing:
            refusing.setattr(inprocess.mmap, "mmap", _refuse)
            with pytest.raises(NoRoom, match="could not be mapped"):
                await pool.generate(job(A), nothing, pixels=[pixels])
        await pool.generate(job(A), nothing, pixels=[pixels])
        assert imaginary.build_generator().seen == [b"seen"]
    finally:
        os.close(pixels)
        await pool.close()


def _refuse(*_):
    raise OSError(24, "Too many open files")
