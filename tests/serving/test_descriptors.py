"""A worker that runs out of descriptors does not ask for requests that it could not answer."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import resource
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ltx2_pool.serving import descriptors
from ltx2_pool.serving.descriptors import CALM, ENOUGH, FEW, RESERVE, Descriptors, Exhausted
from tests.serving.made_up import until

PLENTY = ENOUGH + 10


@pytest.fixture
def leave() -> Iterator[Callable[[int], None]]:
    """Leaves this process so many descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def leave(number: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        taken = descriptors._take(number + 1)  # always the lowest that is free
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken[number], hard))

    yield leave
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def open_now() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@contextlib.asynccontextmanager
async def watching(watched: Descriptors, tell: Any, interval: float) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(watched.watch(tell, interval))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_a_shortage_is_told_when_it_begins_and_when_it_ends(leave):
    told: asyncio.Queue[bool] = asyncio.Queue()
    watched = Descriptors()

    async def tell() -> None:
        await told.put(watched.short)

    async with watching(watched, tell, 20), asyncio.timeout(5):
        await asyncio.sleep(0)  # it has looked, and found enough
        assert told.empty()
        leave(FEW - 1)
        watched.look()  # a request has come: nobody waits for the next look
        assert await told.get() is True
        assert descriptors.spare(3) == 3  # the reserve was given back
        leave(PLENTY)
        watched._seen.set()
        assert await told.get() is False


async def test_a_shortage_that_is_seen_while_the_end_of_another_is_told_is_told_next(leave, monkeypatch):
    """The request that saw it may hang, and nobody else would see it."""
    monkeypatch.setattr(descriptors, "PATIENCE", math.inf)
    told: list[bool] = []
    watched = Descriptors()

    async def tell() -> None:
        told.append(watched.short)
        if watched.short:
            leave(PLENTY)
            watched._seen.set()
        elif len(told) == 2:
            leave(0)
            watched.look()
            leave(PLENTY)

    leave(0)
    async with watching(watched, tell, 600):
        await until(lambda: len(told) == 4)
    assert told == [True, False, True, False]


@pytest.mark.parametrize("between", [0, PLENTY], ids=["lasting", "flapping"])
async def test_too_few_for_too_long_is_for_another_process_to_cure(leave, monkeypatch, between):
    """Also when they are enough whenever nobody is served."""
    monkeypatch.setattr(descriptors, "PATIENCE", 0.02)
    told: list[bool] = []
    watched = Descriptors()

    async def tell() -> None:
        told.append(watched.short)
        leave(between if watched.short else 0)

    before = open_now()
    leave(0)
    async with watching(watched, tell, 0.001) as task:
        await until(task.done)
        with pytest.raises(Exhausted):
            task.result()
    leave(PLENTY)
    assert open_now() == before
    assert len(told) > 30 if between else told == [True]


async def test_neither_a_failed_word_nor_a_clock_that_ran_on_counts_as_patience_spent(leave, monkeypatch):
    """A process that was stopped for two minutes has not looked for two minutes."""
    told: list[bool] = []
    watched = Descriptors()

    async def fail() -> None:
        raise RuntimeError("on purpose")

    async def tell() -> None:
        told.append(watched.short)

    leave(0)
    with pytest.raises(RuntimeError, match="on purpose"):
        await watched.watch(fail)
    async with watching(watched, tell, 0.001):
        await until(lambda: told == [True])
        real = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: real() + 1000)
        looks = watched._short_looks
        await until(lambda: watched._short_looks > looks + 5)
        leave(PLENTY)
        await until(lambda: told == [True, False])


@pytest.mark.parametrize("free", [10, PLENTY])
async def test_looking_takes_few_away_from_those_who_need_them(leave, monkeypatch, free):
    """For a moment they are missing, and a thread of Dynamo's may need one just then."""
    asked: list[int] = []
    spare = descriptors.spare
    monkeypatch.setattr(descriptors, "spare", lambda most: asked.append(most) or spare(most))
    watched = Descriptors()
    leave(free)
    before = open_now()
    async with watching(watched, None, 0.0001):
        await until(lambda: len(asked) > CALM)
        watched.look()
        assert open_now() == before + (RESERVE if free == PLENTY else 0)
    assert open_now() == before  # cancelled, it gives its reserve back
    assert asked[:2] == [FEW, ENOUGH]
    assert set(asked[2:CALM]) == {asked[-1]} == {FEW}


def test_looking_leaves_nothing_open():
    before = open_now()
    assert descriptors.spare(ENOUGH) == ENOUGH
    assert open_now() == before
