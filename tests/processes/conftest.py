"""Real processes and real signals: the real child program over an engine that is made up, on a real host."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from ltx2_pool.processes.process import Timeouts
from ltx2_pool.processes.shape import ShapeProcess
from ltx2_pool.processes.spawner import ExecSpawner
from ltx2_pool.processes.subprocesses import ProcessHost
from ltx2_pool.words.protocol import Done, Phase, Step
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import Key, Shape
from tests.children import DEADLINE, open_files

SHAPE = Shape(64, 64, 9)
KEY = Key(SHAPE)
QUICK = Timeouts(spawn=60, weights=60, generation=60, cancel=30, term=30, silence=30)
_ids = itertools.count()


def imaginary() -> ExecSpawner:
    return ExecSpawner([sys.executable, "-m", "ltx2_pool.tools.imaginary"])


def job(prompt: str = "fine", shape: Shape = SHAPE) -> Job:
    return Job(id=f"job{next(_ids)}", shape=shape, prompt=prompt, seed=1, steps=2, guidance=1.0, fps=24)


def warm_up() -> Job:
    return Job("warm-up", SHAPE, "a warm-up", 1, 2, 1.0, 24)


def nothing(_event: Phase | Step) -> None:
    pass


class Events:
    """What a job said, and a way to wait for it."""

    def __init__(self) -> None:
        self.seen: list[Phase | Step] = []
        self._news = asyncio.Event()

    def __call__(self, event: Phase | Step) -> None:
        self.seen.append(event)
        self._news.set()

    @property
    def phases(self) -> list[str]:
        return [event.phase for event in self.seen if isinstance(event, Phase)]

    async def phase(self, name: str) -> None:
        await self._until(lambda: name in self.phases)

    async def step(self) -> None:
        await self._until(lambda: any(isinstance(event, Step) for event in self.seen))

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE):
            while not condition():
                self._news.clear()
                await self._news.wait()


def kill_and_wait(pid: int) -> None:
    """SIGKILL a child, and return when it is dead, but not yet reaped."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


class Place:
    """A host, and files for its videos."""

    def __init__(self, host: ProcessHost, directory: Path) -> None:
        self.host = host
        self._directory = directory

    def output(self) -> Path:
        path = self._directory / f"{next(_ids)}.mp4"
        path.touch()
        return path

    async def ready(self, key: Key = KEY, warm: bool = False) -> ShapeProcess:
        process = self.host.process(key)
        await self.host.start_process(process, (warm_up(),) if warm else ())
        return process

    async def make(self, process: ShapeProcess, prompt: str = "fine") -> tuple[Done, Path]:
        output = self.output()
        return await process.generate(job(prompt), output, nothing), output


@pytest.fixture
def make_host(tmp_path: Path) -> Callable[..., Any]:
    """A host over imaginary children; afterwards it must have left no descriptor, no process and no task."""

    @contextlib.asynccontextmanager
    async def make(timeouts: Timeouts = QUICK, *, weights: Any = "private", **options: Any) -> AsyncIterator[Place]:
        with socket.socketpair()[0] as one:  # libuv keeps a descriptor from its first stream on
            (await asyncio.open_unix_connection(sock=one.dup()))[1].transport.abort()
        files, children, tasks = open_files(), psutil.Process().children(), asyncio.all_tasks()
        options.setdefault("spawner", imaginary())
        videos = tmp_path / "videos"
        videos.mkdir(exist_ok=True)
        host = ProcessHost(
            Recipe(model_path="none"), tmp_path / "cache", tmp_path / "scratch", timeouts, weights=weights, **options
        )
        await host.start()
        try:
            yield Place(host, videos)
        finally:
            async with asyncio.timeout(DEADLINE):
                await host.close()
        left: list[str] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                while left := [file for fd, file in open_files().items() if files.get(fd) != file]:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
        assert not left
        assert [child for child in psutil.Process().children() if child not in children] == []
        assert asyncio.all_tasks() <= tasks

    return make


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Say how starts misbehave."""
    return lambda behaviours: monkeypatch.setenv("LTX2_IMAGINARY", behaviours)


@pytest.fixture(autouse=True)
def harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LTX2_IMAGINARY", raising=False)


async def soon(awaited: Awaitable[Any]) -> Any:
    """With a deadline."""
    async with asyncio.timeout(DEADLINE):
        return await awaited
