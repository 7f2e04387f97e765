"""A worker that runs out of descriptors does not ask for requests that it could not answer."""

from __future__ import annotations

import asyncio
import os
import resource
from pathlib import Path

from ltx2_pool.serving import descriptors


async def test_a_shortage_is_told_when_it_begins_and_when_it_ends():
    told: asyncio.Queue[bool] = asyncio.Queue()
    watched = descriptors.Descriptors()

    async def tell() -> None:
        await told.put(watched.short)

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    watching = asyncio.create_task(watched.watch(tell, 600))
    try:
        await asyncio.sleep(0)  # it has looked, and found enough
        assert told.empty()
        lowest = os.open(os.devnull, os.O_RDONLY)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + descriptors.FEW - 1, hard))
        watched.look()  # a request has come: nobody waits for the next look
        async with asyncio.timeout(5):
            assert await told.get() is True
            assert descriptors.spare(3) == 3  # the reserve was given back
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            watched._seen.set()
            assert await told.get() is False
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        watching.cancel()
        await asyncio.wait([watching])


def open_now() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_looking_leaves_nothing_open():
    before = open_now()
    assert descriptors.spare(descriptors.ENOUGH) == descriptors.ENOUGH
    assert open_now() == before
