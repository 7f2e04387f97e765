"""One host over several devices: what a child sees, whom it borrows from, and whose end it shares."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import pytest

from ltx2_pool.words.outcomes import ProcessLost
from ltx2_pool.words.shapes import Key, Shape
from tests.children import until

from .conftest import KEY, imaginary, soon

MakeHost = Callable[..., Any]
TWO = ("GPU-aa", "GPU-bb")
OTHER = Key(Shape(96, 64, 9))


async def ready(place: Any, key: Key, device: str) -> Any:
    process = place.host.process(key, (device,))
    await soon(place.host.start_process(process))
    return process


class Recording:
    """A spawner that remembers which devices each child was shown."""

    def __init__(self) -> None:
        self._spawner = imaginary()
        self.shown: dict[int, tuple[str, str]] = {}

    async def launch(self, environment: Mapping[str, str], *others: Any) -> Any:
        launched = await self._spawner.launch(environment, *others)
        self.shown[launched.pid] = (environment["CUDA_VISIBLE_DEVICES"], environment["LTX2_DEVICES"])
        return launched

    async def close(self) -> None:
        await self._spawner.close()


async def test_a_child_and_its_lender_see_their_own_device_only(make_host: MakeHost) -> None:
    spawner = Recording()
    async with make_host(weights="shared", devices=TWO, spawner=spawner) as place:
        for device in TWO:
            process = await ready(place, KEY, device)
            lender = place.host.pids[f"weights {device}"]
            assert spawner.shown[process.pid] == spawner.shown[lender] == (device, device)
            assert psutil.Process(process.pid).cmdline()[0].split() == ["ltx2", str(KEY), "on", device]
            assert psutil.Process(lender).cmdline()[0].split() == ["ltx2-weights", "on", device]
            assert place.host.lending(device) is not None


async def test_borrowers_share_the_end_of_their_own_lender_only(make_host: MakeHost) -> None:
    told: list[str] = []
    async with make_host(weights="shared", devices=TWO) as place:
        place.host.on_weights_lost(told.append)
        first, second = [await ready(place, KEY, device) for device in TWO]
        os.kill(place.host.pids["weights GPU-aa"], signal.SIGKILL)
        await until(lambda: told)
        assert told == ["GPU-aa"]
        assert not first.alive
        assert second.alive
        await place.make(second)
        assert (place.host.lending("GPU-aa"), place.host.lending("GPU-bb") is None) == (None, False)


async def test_a_device_that_is_given_up_lends_again_when_it_is_wanted(make_host: MakeHost) -> None:
    async with make_host(weights="shared", devices=TWO) as place:
        first, second = [await ready(place, KEY, device) for device in TWO]
        lender = place.host.pids["weights GPU-bb"]
        place.host.give_up("GPU-bb")
        await until(lambda: not second.alive)
        await ready(place, OTHER, "GPU-bb")
        assert place.host.pids["weights GPU-bb"] not in (None, lender)
        assert first.alive


async def test_what_does_not_start_on_one_device_pauses_that_one_alone(
    make_host: MakeHost, starts: Callable[[str], None]
) -> None:
    starts("weights on GPU-aa=broken")
    async with make_host(weights="shared", devices=TWO) as place:
        for _ in range(3):
            with pytest.raises(ProcessLost, match="no checkpoint"):
                await ready(place, KEY, "GPU-aa")
        assert place.host.helpers_pause("GPU-aa")
        assert not place.host.helpers_pause("GPU-bb")
        await asyncio.gather(ready(place, KEY, "GPU-bb"), ready(place, OTHER, "GPU-bb"))
