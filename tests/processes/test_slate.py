"""Pictures on their way to a shape process: the job's own, whole, and nobody else's."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from ltx2_pool.processes import slate
from ltx2_pool.processes.slate import Slate
from ltx2_pool.words.menu import Offer
from ltx2_pool.words.outcomes import NoRoom, ProcessLost
from ltx2_pool.words.pictures import Picture
from ltx2_pool.words.shapes import Shape
from tests.children import open_files

from .conftest import KEY, SHAPE, job, nothing, soon

MakeHost = Callable[..., Any]
TWO_STAGES = Offer(Shape(128, 64, 9), variant="two", refine=2)
FIRST, LAST = Picture("1" * 64), Picture("2" * 64, "last", 0.5)


def pixels(offer: Offer, shade: int) -> bytes:
    return bytes([shade]) * sum(3 * width * height for width, height in offer.picture_sizes)


async def seen(place: Any, process: Any, pictures: tuple[Picture, ...], contents: Sequence[bytes]) -> list[str]:
    """What the child found of each picture."""
    output = place.output()
    asked = replace(job(shape=process.key.shape), variant=process.key.variant, pictures=pictures)
    descriptors = [os.memfd_create("pixels", os.MFD_CLOEXEC) for _ in contents]
    try:
        for descriptor, content in zip(descriptors, contents, strict=True):
            os.write(descriptor, content)
        await process.generate(asked, output, nothing, descriptors)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return output.read_text().split()[3:]


@pytest.mark.parametrize("offer", [Offer(SHAPE), TWO_STAGES])
async def test_a_process_finds_the_pictures_of_its_job_and_then_those_of_the_next(
    make_host: MakeHost, offer: Offer
) -> None:
    one, two, three = (pixels(offer, shade) for shade in (1, 2, 3))
    async with make_host(offers=[offer]) as place:
        process = await place.ready(offer.key)
        for pictures, contents in (((FIRST, LAST), (one, two)), ((FIRST,), (three,)), ((), ()), ((LAST,), (one,))):
            digests = [hashlib.sha256(content).hexdigest() for content in contents]
            assert await seen(place, process, pictures, contents) == digests


async def test_pictures_that_cannot_be_written_cost_their_job_and_not_the_process(
    make_host: MakeHost,
) -> None:
    offer = Offer(SHAPE)
    async with make_host(offers=[offer]) as place:
        process = await place.ready()
        with pytest.raises(NoRoom, match="could not be given the pictures"):
            await soon(seen(place, process, (FIRST,), [b"few"]))
        assert process.alive
        assert await seen(place, process, (FIRST,), [pixels(offer, 9)])


async def test_without_memory_for_pictures_a_start_fails_and_leaves_nothing(
    make_host: MakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(24, "Too many open files")

    async with make_host(offers=[Offer(SHAPE)]) as place:
        with monkeypatch.context() as refusing:
            refusing.setattr(slate.os, "memfd_create", refuse)
            with pytest.raises(ProcessLost, match="no memory for pictures") as caught:
                await soon(place.ready())
        assert caught.value.reason == "system"
        assert not [file for file in open_files().values() if "ltx2-pictures" in file]
        await place.ready()


async def test_a_process_that_is_killed_before_it_starts_leaves_no_memory(make_host: MakeHost) -> None:
    async with make_host(offers=[Offer(SHAPE)]) as place:
        process = place.host.process(KEY)
        process.kill()
        with pytest.raises(ProcessLost):
            await soon(place.host.start_process(process))
        assert not [file for file in open_files().values() if "ltx2-pictures" in file]


async def test_a_slate_takes_no_memory_until_there_is_a_picture() -> None:
    empty = Slate([(1920, 1088)])
    try:
        held = os.fstat(empty.fd)
        assert held.st_size == 2 * 3 * 1920 * 1088
        assert held.st_blocks == 0
    finally:
        empty.close()
