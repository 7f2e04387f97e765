"""A gang of made-up ranks: they are READY together, are given each job, and die together."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from ltx2_pool.processes.gang import Gang
from ltx2_pool.processes.shape import ShapeProcess
from ltx2_pool.processes.slate import Slate
from ltx2_pool.words.menu import Offer
from ltx2_pool.words.outcomes import JobFailed, NoRoom, ProcessLost
from ltx2_pool.words.pictures import Picture
from ltx2_pool.words.protocol import Memory
from tests.children import Gate, until

from .conftest import KEY, QUICK, SHAPE, Events, job, nothing, soon, warm_up

MakeHost = Callable[..., Any]
FOUR = tuple(f"cpu:{number}" for number in range(4))
IMPATIENT = replace(QUICK, cancel=1)


def a_gang(make_host: MakeHost, size: int = 2, **options: Any) -> Any:
    """A host whose key is made by so many."""
    return make_host(offers=[Offer(SHAPE, gpus=size)], **options)


async def ready(place: Any, size: int = 2, warm: bool = False) -> Gang:
    gang = place.host.process(KEY, FOUR[:size])
    await soon(place.host.start_process(gang, (warm_up(),) if warm else ()))
    return gang


def pids(gang: Gang) -> list[int]:
    return [rank.pid for rank in gang.ranks if rank.pid is not None]


async def all_gone(gang: Gang) -> None:
    await soon(gang.exited())
    assert not gang.alive
    assert not [pid for pid in pids(gang) if psutil.pid_exists(pid)]


async def test_four_ranks_make_videos_together(make_host: MakeHost) -> None:
    async with a_gang(make_host, 4) as place:
        gang = await ready(place, 4, warm=True)
        assert gang.devices == FOUR
        assert gang.pid == gang.ranks[0].pid
        assert len(set(pids(gang))) == 4
        events = Events()
        for number in range(2):
            output = place.output()
            done = await gang.generate(job(), output, events)
            assert output.read_text() == f"{SHAPE.key} by {gang.pid}"
            assert gang.jobs_done == number + 1
            assert done.memory == gang.memory
        assert events.phases == ["text", "denoise", "decode", "encode"] * 2
        done, _ = await place.make(gang, "rank 1: memory 3000 7000 | memory 5000 6000")
        assert done.memory == gang.memory == Memory(resident=5000, peak=7000, encoding=7000)
        await soon(gang.stop())
        await all_gone(gang)


async def test_each_rank_is_given_the_pictures(make_host: MakeHost) -> None:
    async with a_gang(make_host) as place:
        gang = await ready(place)
        picture = Slate([(SHAPE.width, SHAPE.height)])
        given = replace(job("rank 0: until cancelled | fine"), pictures=(Picture("a"),))
        output = place.output()
        await gang.generate(replace(given, prompt="fine"), output, nothing, [picture.fd])
        picture.close()
        assert len(output.read_text().split()) == 4
        for rank in gang.ranks:
            assert rank._slate is not None
            assert os.pread(rank._slate.fd, 1, 0) == b"\0"
        with pytest.raises(NoRoom):
            await gang.generate(given, output, nothing, [-1])
        await place.make(gang)


@pytest.mark.parametrize("victim", [0, 3])
async def test_a_rank_that_is_killed_takes_the_others_with_it(make_host: MakeHost, victim: int) -> None:
    async with a_gang(make_host, 4) as place:
        gang = await ready(place, 4)
        events = Events()
        making = asyncio.create_task(gang.generate(job("until cancelled"), place.output(), events))
        await events.step()
        os.kill(pids(gang)[victim], signal.SIGKILL)
        with pytest.raises(ProcessLost) as caught:
            await soon(making)
        assert (caught.value.name, caught.value.reason) == (SHAPE.key, "killed")
        assert f"rank {victim} of 4: process {pids(gang)[victim]} " in caught.value.what
        await all_gone(gang)


async def test_an_idle_rank_that_dies_takes_the_others_with_it(make_host: MakeHost) -> None:
    async with a_gang(make_host) as place:
        gang = await ready(place)
        os.kill(pids(gang)[1], signal.SIGKILL)
        await all_gone(gang)
        with pytest.raises(ProcessLost) as caught:
            await gang.generate(job(), place.output(), nothing)
        assert caught.value.reason == "killed"


async def test_a_rank_that_crashes_is_the_one_whose_words_are_heard(make_host: MakeHost) -> None:
    async with a_gang(make_host) as place:
        gang = await ready(place)
        with pytest.raises(ProcessLost) as caught:
            await soon(place.make(gang, "rank 1: die and say farewell | until cancelled"))
        assert caught.value.reason == "gen_eof"
        assert caught.value.began
        assert caught.value.tail[-1] == gang.tail[-1] == "farewell"
        await all_gone(gang)


async def test_ranks_that_stop_in_step_serve_on(make_host: MakeHost) -> None:
    """Whether all were told to, all refused, or rank 0 failed in what it does alone."""
    async with a_gang(make_host) as place:
        gang = await ready(place)
        before = pids(gang)
        events, asked = Events(), job("until cancelled")
        making = asyncio.create_task(gang.generate(asked, place.output(), events))
        await events.step()
        gang.cancel(asked)
        with pytest.raises(JobFailed) as cancelled:
            await soon(making)
        assert cancelled.value.kind == "cancelled"
        with pytest.raises(JobFailed) as refused:
            await place.make(gang, "refused")
        assert refused.value.kind == "refused"
        with pytest.raises(JobFailed, match="No space left"):
            await place.make(gang, "no space")
        await place.make(gang)
        assert pids(gang) == before


@pytest.mark.parametrize(
    "prompt", ["rank 1: soft | until cancelled", "rank 1: deaf to cancel | fine", "rank 1: refused | soft", "soft"]
)
async def test_ranks_that_fall_out_of_step_are_ended(make_host: MakeHost, prompt: str) -> None:
    async with a_gang(make_host, timeouts=IMPATIENT) as place:
        gang = await ready(place)
        with pytest.raises(ProcessLost, match="fell out of step: rank 0 ") as caught:
            await soon(place.make(gang, prompt))
        assert caught.value.reason == "desync"
        await all_gone(gang)


@pytest.mark.parametrize(("prompt", "reason"), [("oom", "oom"), ("fatal", "cuda_fault")])
async def test_a_fault_of_one_rank_is_the_gangs(make_host: MakeHost, prompt: str, reason: str) -> None:
    async with a_gang(make_host) as place:
        gang = await ready(place)
        with pytest.raises(ProcessLost) as caught:
            await soon(place.make(gang, f"rank 1: {prompt} | until cancelled"))
        assert caught.value.reason == reason
        assert caught.value.devices == FOUR[1:2]
        await all_gone(gang)


@pytest.mark.parametrize("suffers", ["says so", "aborts"])
@pytest.mark.parametrize(("number", "reason"), [(signal.SIGKILL, "killed"), (signal.SIGSEGV, "gen_eof")])
async def test_a_rank_that_suffers_from_the_end_of_another_may_be_noticed_first(
    make_host: MakeHost, monkeypatch: pytest.MonkeyPatch, suffers: str, number: int, reason: str
) -> None:
    """An exchange with a rank that dies fails before that is gone: with an error of the device, or torch's watchdog."""
    monkeypatch.setattr("ltx2_pool.processes.gang._LAST_WORDS", 60.0)
    async with a_gang(make_host) as place:
        gang = await ready(place)
        events = Events()
        prompt = "rank 0: fatal | until cancelled" if suffers == "says so" else "until cancelled"
        making = asyncio.create_task(gang.generate(job(prompt), place.output(), events))
        await until(lambda: "denoise" in events.phases)
        if suffers == "aborts":
            os.kill(pids(gang)[0], signal.SIGABRT)
        await until(lambda: not gang.ranks[0].alive)
        os.kill(pids(gang)[1], number)
        with pytest.raises(ProcessLost, match="rank 1 of 2: ") as caught:
            await soon(making)
        assert (caught.value.reason, caught.value.devices) == (reason, FOUR[1:2])
        await all_gone(gang)


async def test_a_rank_whose_start_fails_for_want_of_another_is_not_to_blame(
    make_host: MakeHost, starts: Callable[[str], None], gate: Callable[[], Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shape was: three such starts made it unavailable."""
    monkeypatch.setattr("ltx2_pool.processes.gang._LAST_WORDS", 60.0)
    door = gate()
    starts(f"{KEY} on cpu:0=broken,{KEY} on cpu:1=gate{door.path}")
    async with a_gang(make_host) as place:
        gang = place.host.process(KEY, FOUR[:2])
        starting = asyncio.create_task(place.host.start_process(gang))
        waits = await door.wait_for_child()
        await until(lambda: not gang.ranks[0].alive)
        os.kill(pids(gang)[1], signal.SIGKILL)
        os.close(waits)
        with pytest.raises(ProcessLost, match="rank 1 of 2: ") as caught:
            await soon(starting)
        assert caught.value.reason == "killed"
        await all_gone(gang)


async def test_a_rank_that_hangs_is_found(make_host: MakeHost) -> None:
    async with a_gang(make_host, timeouts=replace(QUICK, silence=4)) as place:
        gang = await ready(place)
        with pytest.raises(ProcessLost) as caught:
            await soon(place.make(gang, "rank 1: stop | until cancelled"))
        assert caught.value.reason == "silent"
        await all_gone(gang)


@pytest.mark.parametrize(("behaviour", "reason"), [("eof", "spawn_eof"), ("oom", "oom"), ("hang", "spawn_timeout")])
async def test_half_a_start_leaves_nothing(
    make_host: MakeHost, starts: Callable[[str], None], behaviour: str, reason: str
) -> None:
    starts(f"{KEY} on cpu:1={behaviour}")
    async with a_gang(make_host, timeouts=replace(QUICK, spawn=60 if behaviour != "hang" else 4)) as place:
        gang = place.host.process(KEY, FOUR[:3])
        place.host._offers[KEY] = Offer(SHAPE, gpus=3)
        with pytest.raises(ProcessLost) as caught:
            await soon(place.host.start_process(gang, (warm_up(),)))
        assert caught.value.reason == reason
        assert "rank 1 of 3: " in caught.value.what
        await all_gone(gang)


async def test_cancelling_a_start_ends_all_ranks(
    make_host: MakeHost, starts: Callable[[str], None], gate: Callable[[], Gate]
) -> None:
    door = gate()
    starts(f"{KEY} on cpu:1=gate{door.path}")
    async with a_gang(make_host) as place:
        gang = place.host.process(KEY, FOUR[:2])
        starting = asyncio.create_task(place.host.start_process(gang))
        os.close(await door.wait_for_child())
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        await all_gone(gang)


async def test_cancelling_a_job_kills_the_gang(make_host: MakeHost) -> None:
    async with a_gang(make_host) as place:
        gang = await ready(place)
        events = Events()
        making = asyncio.create_task(gang.generate(job("until cancelled"), place.output(), events))
        await events.step()
        making.cancel()
        with pytest.raises(asyncio.CancelledError):
            await making
        await all_gone(gang)


async def test_a_listener_that_raises_ends_the_gang(make_host: MakeHost) -> None:
    def listener(_event: object) -> None:
        raise ZeroDivisionError

    async with a_gang(make_host) as place:
        gang = await ready(place)
        with pytest.raises(ZeroDivisionError):
            await soon(gang.generate(job("until cancelled"), place.output(), listener))
        await all_gone(gang)


async def test_a_damaged_cache_is_replaced_once(make_host: MakeHost, tmp_path: Path) -> None:
    async with a_gang(make_host) as place:
        gang = await ready(place)
        with pytest.raises(ProcessLost):
            await soon(place.make(gang, "compile"))
        await all_gone(gang)
        assert [path.name for path in (tmp_path / "scratch" / "caches").iterdir()] == [f"{KEY}-1"]


async def test_one_device_is_no_gang(make_host: MakeHost) -> None:
    async with make_host() as place:
        assert isinstance(place.host.process(KEY, FOUR[:1]), ShapeProcess)
