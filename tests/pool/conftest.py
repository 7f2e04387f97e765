"""A pool over the real child with a made-up engine, and the check that it leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from ltx2_pool.processes.process import Timeouts
from ltx2_pool.processes.spawner import ExecSpawner
from ltx2_pool.processes.subprocesses import ProcessHost
from ltx2_pool.serving.book import Book
from ltx2_pool.serving.breaker import Pauses
from ltx2_pool.serving.ledger import Ledger
from ltx2_pool.serving.pool import Pool
from ltx2_pool.serving.tickets import Limits
from ltx2_pool.words.device import Device
from ltx2_pool.words.menu import Offer
from ltx2_pool.words.outcomes import Video
from ltx2_pool.words.protocol import Memory
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import Key, Shape
from tests.children import open_files

GIB = 2**30
IMAGINARY = [sys.executable, "-m", "ltx2_pool.tools.imaginary"]
A, B, C = Shape(64, 64, 9), Shape(96, 64, 17), Shape(64, 96, 9)
QUICK = Timeouts(spawn=20, generation=20, cancel=5, term=5)
MEMORY = Memory(resident=GIB, peak=2 * GIB)
_ids = itertools.count()
uvloop.run(asyncio.sleep(0))  # libuv opens a pipe for the whole process with its first loop


def job(shape: Shape = A, prompt: str = "fine") -> Job:
    return Job(id=f"job{next(_ids)}", shape=shape, prompt=prompt, seed=1, steps=2, guidance=1.0, fps=24)


def nothing(_event: object) -> None:
    pass


async def make(pool: Pool, *args: Any) -> Video:
    return await pool.generate(job(*args), nothing)


def maker(video: Video) -> int:
    """The pid that wrote the file."""
    return int(video.path.read_bytes().split()[-1])


@pytest.fixture
def make_pool(tmp_path: Path) -> Callable[..., Any]:
    """Makes pools; what their shapes need is known, unless `known` says otherwise. Devices that are no strings are
    measured."""

    @contextlib.asynccontextmanager
    async def make(
        timeouts: Timeouts = QUICK,
        *,
        weights: str = "private",
        spawner: Any = None,
        max_size: int | None = None,
        budget: int | None = sys.maxsize,
        concurrency: int = 1,
        known: dict[Shape, Memory] | None = None,
        limits: Limits | None = None,
        pauses: Pauses | None = None,
        keys: Sequence[Shape] = (A, B, C),
        prewarm: Sequence[Shape] = (),
        offers: Sequence[Offer] = (),
        devices: Sequence[str | Device] = ("cpu",),
        **options: Any,
    ) -> AsyncIterator[Pool]:
        names = [device if isinstance(device, str) else device.id for device in devices]
        measured = tuple(device for device in devices if isinstance(device, Device))
        host = ProcessHost(
            Recipe(model_path="none"),
            tmp_path / "cache",
            tmp_path / "scratch",
            timeouts,
            weights=weights,
            spawner=spawner or ExecSpawner(IMAGINARY),
            offers=offers,
            devices=names,
        )
        ledger = Ledger(dict.fromkeys(names, budget), concurrency=concurrency, max_processes=max_size)
        for shape, memory in (dict.fromkeys(keys, MEMORY) if known is None else known).items():
            ledger.observe(Key(shape), memory)
        book = Book(
            ledger,
            limits or Limits(),
            [Key(shape) for shape in keys],
            [Key(shape) for shape in prewarm],
            pauses or Pauses(),
            {offer.key: offer.gpus for offer in offers},
        )
        pool = Pool(host, book, tmp_path / "run", devices=measured, **options)
        await pool.start()
        try:
            yield pool
        finally:
            await pool.close()
            assert pool.status()["processes"] == []
            assert {device["held"] for device in pool.status()["devices"].values()} == {0}

    return make


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No descriptor and no process outlives a test."""
    before, children = open_files(), psutil.Process().children()
    yield
    assert [child for child in psutil.Process().children() if child not in children] == []
    assert {fd: file for fd, file in open_files().items() if before.get(fd) != file} == {}


@pytest.fixture(autouse=True)
async def no_task_left(nothing_left: None, caplog: pytest.LogCaptureFixture) -> AsyncIterator[None]:
    """No task outlives a test, and no owner has failed to settle what it owned."""
    before = asyncio.all_tasks()
    yield
    assert "report this" not in caplog.text
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    assert not left, left


def states(pool: Pool) -> dict[str, str]:
    return {p["shape"]: p["state"] for p in pool.status()["processes"]}


def pids(pool: Pool) -> dict[str, int]:
    return {p["shape"]: p["pid"] for p in pool.status()["processes"]}


async def gathered(*jobs: Awaitable[Any]) -> list[Any]:
    return await asyncio.gather(*jobs, return_exceptions=True)
