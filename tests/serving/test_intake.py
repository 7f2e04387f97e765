"""How many requests' pictures are taken in at once, and of whom."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
from types import SimpleNamespace

import pytest

from ltx2_pool.processes.pictures import PicturesBusy
from ltx2_pool.serving import intake
from ltx2_pool.words.outcomes import NoRoom, QueueFull
from ltx2_pool.words.pictures import PictureLimits
from ltx2_pool.words.requests import Reference

PICTURE = Reference(f"data:image/png;base64,{base64.b64encode(b'a picture').decode()}", "first", 1.0)


class Reader:
    """Decodes nothing before it may."""

    def __init__(self) -> None:
        self.may, self.reading, self.error = asyncio.Event(), asyncio.Semaphore(0), None
        self.opened: list[int] = []

    async def read(self, _data, _sizes) -> int:
        if self.error:
            raise self.error
        self.reading.release()
        await self.may.wait()
        self.opened.append(os.open(os.devnull, os.O_RDONLY))
        return self.opened[-1]


@pytest.fixture
async def taking():
    """Has pictures taken in for a user, all of which hang in the reader."""
    reader = Reader()
    taker = intake.Intake(reader, PictureLimits())
    tasks: list[asyncio.Task[None]] = []

    async def take(user: str) -> None:
        async with taker.taken([PICTURE], [(64, 64)], user):
            pass

    async def begin(count: int, user: str) -> None:
        for _ in range(count):
            tasks.append(asyncio.create_task(take(user)))
            await reader.reading.acquire()

    yield SimpleNamespace(take=take, begin=begin, tasks=tasks, reader=reader)
    reader.may.set()
    await asyncio.gather(*tasks)
    for descriptor in reader.opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


async def test_a_user_cannot_take_every_place(taking):
    await taking.begin(intake.PER_USER, "one")
    with pytest.raises(QueueFull) as refused:
        await taking.take("one")
    assert refused.value.reason == "user_queue_full"
    await taking.begin(intake.AT_ONCE - intake.PER_USER, "other")
    with pytest.raises(QueueFull) as refused:
        await taking.take("third")
    assert (refused.value.reason, refused.value.retry_after) == ("picture_queue_full", intake.BUSY_SECONDS)
    taking.tasks[0].cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await taking.tasks.pop(0)
    await taking.begin(1, "one")  # a place is free again


async def test_a_reader_that_cannot_is_said_to_be_busy_or_without_room(taking):
    taking.reader.error = PicturesBusy()
    with pytest.raises(QueueFull, match="wait already"):
        await taking.take("one")
    taking.reader.error = OSError(24, "Too many open files")
    with pytest.raises(NoRoom, match="Too many open files"):
        await taking.take("one")
