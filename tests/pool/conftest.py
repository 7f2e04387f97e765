"""A pool over fake children, and the check that it leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from ltx2_pool.processes.host import ProcessHost
from ltx2_pool.processes.process import ExecSpawner, Timeouts
from ltx2_pool.serving.capacity import FixedCapacity
from ltx2_pool.serving.pool import SubprocessPool
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import Shape

FAKE_CHILD = Path(__file__).with_name("fake_child.py")
A, B, C = Shape(64, 64, 9), Shape(96, 64, 17), Shape(64, 96, 9)
QUICK = Timeouts(spawn=20, generation=20, cancel=5, term=5)
_ids = itertools.count()
uvloop.run(asyncio.sleep(0))  # libuv opens a pipe for the whole process with its first loop


def job(shape: Shape = A, prompt: str = "fine") -> Job:
    return Job(id=f"job{next(_ids)}", shape=shape, prompt=prompt, seed=1, steps=2, guidance=1.0, fps=24)


class Gate:
    """A FIFO that a fake child waits at until the test opens it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)

    async def wait_for_child(self) -> int:
        """Returns the writing end once a child waits at the gate."""
        while True:
            with contextlib.suppress(OSError):  # ENXIO: nobody reads yet
                return os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
            await asyncio.sleep(0.005)

    async def open(self) -> None:
        os.close(await self.wait_for_child())


@pytest.fixture
def gate(tmp_path: Path) -> Callable[[], Gate]:
    numbers = itertools.count()
    return lambda: Gate(tmp_path / f"gate{next(numbers)}")


@pytest.fixture
def make_pool(tmp_path: Path) -> Callable[..., Any]:
    @contextlib.asynccontextmanager
    async def make(
        timeouts: Timeouts = QUICK, *, weights: str = "private", max_size: int | None = None, **options: Any
    ) -> AsyncIterator[SubprocessPool]:
        host = ProcessHost(
            Recipe(model_path="none"),
            timeouts,
            weights=weights,
            spawner=ExecSpawner([sys.executable, str(FAKE_CHILD)]),
        )
        run_dir = tmp_path / "run"
        run_dir.mkdir(exist_ok=True)
        if max_size is not None:
            options["capacity"] = FixedCapacity(max_size)
        pool = SubprocessPool(host, tmp_path / "cache", run_dir, **options)
        await pool.start()
        try:
            yield pool
        finally:
            await pool.close()
            assert not pool._tasks
            assert not pool._processes

    return make


@pytest.fixture
def run() -> Callable[[Awaitable[None]], None]:
    """Run a coroutine on the loop the worker uses, and check that no fd, process or task outlives it."""

    async def main(body: Awaitable[None]) -> None:
        async with asyncio.timeout(60):
            await body
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left

    def go(body: Awaitable[None]) -> None:
        before, children = _open_files(), psutil.Process().children()
        uvloop.run(main(body))
        assert [child for child in psutil.Process().children() if child not in children] == []
        left = {fd: file for fd, file in _open_files().items() if before.get(fd) != file}
        assert not left

    return go


def _open_files() -> dict[str, str]:
    files = {}
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the directory's own
            files[fd.name] = str(fd.readlink())
    return files


def states(pool: SubprocessPool) -> dict[str, str]:
    return {p["shape"]: p["state"] for p in pool.status()["processes"]}


def pids(pool: SubprocessPool) -> dict[str, int]:
    return {p["shape"]: p["pid"] for p in pool.status()["processes"]}


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - any condition, of any object
        await asyncio.sleep(0.005)
