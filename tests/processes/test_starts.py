"""How a process starts, every way in which that fails, and that nothing is left of a start that failed."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ltx2_pool.processes import process as process_module
from ltx2_pool.processes import reaping
from ltx2_pool.words.outcomes import SHAPES_OWN_FAULT, ProcessLost
from ltx2_pool.words.protocol import Memory
from ltx2_pool.words.shapes import CacheDirs
from tests.children import Gate, until

from .conftest import KEY, QUICK, SHAPE, imaginary, kill_and_wait, soon, warm_up

MakeHost = Callable[..., Any]
Starts = Callable[[str], None]


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("eof", "spawn_eof"),
        ("kill", "killed"),
        ("broken", "spawn_eof"),
        ("oom", "oom"),
        ("compile", "compile"),
        ("no space", "system"),
        ("hang", "spawn_timeout"),
        ("deaf", "spawn_timeout"),
        ("stop", "silent"),
        ("garbage", "spawn_parse_error"),
        ("desync", "spawn_parse_error"),
    ],
)
async def test_a_start_that_fails_says_why(make_host: MakeHost, starts: Starts, behaviour: str, reason: str) -> None:
    starts(f"{SHAPE.key}={behaviour}")
    timeouts = replace(QUICK, silence=4, spawn=60 if reason != "spawn_timeout" else 6)
    async with make_host(timeouts) as place:
        process = place.host.process(KEY)
        with pytest.raises(ProcessLost) as caught:
            await soon(place.host.start_process(process, (warm_up(),)))
        lost = caught.value
        assert lost.reason == reason, lost
        assert (lost.reason in SHAPES_OWN_FAULT) == (reason not in ("killed", "system", "silent"))
        assert lost.name == SHAPE.key
        assert f"imaginary child of {SHAPE.key} starts" in str(lost) or behaviour == "deaf"
        assert not lost.began
        assert not process.alive
        await soon(process.exited())
        starts("")
        await place.ready()


async def test_memory_of_a_process_that_has_made_nothing(make_host: MakeHost) -> None:
    """A23: without a warm-up its peak is that of loading."""
    async with make_host() as place:
        cold, warm = await place.ready(), await place.ready(warm=True)
        assert not cold.memory.generated
        assert warm.memory.generated
        done, _ = await place.make(cold)
        assert done.memory.generated


async def test_memory_of_a_start_that_had_not_enough(make_host: MakeHost, starts: Starts) -> None:
    starts(f"{SHAPE.key}=oom")
    async with make_host() as place:
        process = place.host.process(KEY)
        with pytest.raises(ProcessLost) as caught:
            await place.host.start_process(process, (warm_up(),))
        assert caught.value.memory == Memory(resident=1 << 30, peak=2 << 30)


@pytest.mark.parametrize("what", ["socketpair", "pipe", "pidfd of the exit", "pidfd of the process", "popen", "guard"])
async def test_what_the_machine_refuses_is_a_failed_start(
    make_host: MakeHost, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A3: whatever a start raises, its owner is told in words that it knows, and nothing leaks."""

    def refuse(*_args: object, **_options: object) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    async with make_host() as place:
        process = place.host.process(KEY)
        with monkeypatch.context() as patch:
            if what == "socketpair":
                patch.setattr(socket, "socketpair", refuse)
            elif what == "pipe":
                patch.setattr(os, "pipe", refuse)
            elif what == "popen":
                patch.setattr(subprocess, "Popen", refuse)
            elif what == "pidfd of the exit":
                patch.setattr(os, "pidfd_open", refuse)
            elif what == "pidfd of the process":
                patch.setattr(process_module.ChildProcess, "_watch_exit", refuse)
            else:
                kill_and_wait(place.host.pids["guard"])
                patch.setattr(place.host._guard, "start", refuse)
            with pytest.raises(ProcessLost) as caught:
                await soon(place.host.start_process(process))
        assert caught.value.reason == ("helper" if what == "guard" else "system")
        assert "Too many open files" in str(caught.value)
        await soon(process.exited())
        await place.ready()


async def test_a_guard_that_was_killed_is_replaced(make_host: MakeHost) -> None:
    async with make_host() as place:
        first = await place.ready()
        guard = place.host.pids["guard"]
        kill_and_wait(guard)
        await place.ready()
        assert place.host.pids["guard"] not in (None, guard)
        assert first.alive


async def test_cancelling_a_start_ends_the_process(
    make_host: MakeHost, starts: Starts, gate: Callable[[], Gate]
) -> None:
    door = gate()
    starts(f"{SHAPE.key}=gate{door.path}")
    async with make_host() as place:
        process = place.host.process(KEY)
        starting = asyncio.create_task(place.host.start_process(process))
        os.close(await door.wait_for_child())
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert not process.alive
        await soon(process.exited())


@pytest.mark.parametrize("verb", ["kill", "stop"])
async def test_a_process_can_be_ended_while_it_starts(
    make_host: MakeHost, starts: Starts, gate: Callable[[], Gate], verb: str
) -> None:
    door = gate()
    starts(f"{SHAPE.key}=gate{door.path}")
    async with make_host() as place:
        process = place.host.process(KEY)
        starting = asyncio.create_task(place.host.start_process(process))
        writer = await door.wait_for_child()
        if verb == "kill":
            process.kill("weights_lost")
        else:
            await soon(process.stop())
        with pytest.raises(ProcessLost) as caught:
            await soon(starting)
        assert caught.value.reason == ("weights_lost" if verb == "kill" else "spawn_eof")
        os.close(writer)


class SlowSpawner:
    """Launches when it is allowed to, as a zygote that still imports."""

    def __init__(self, spawner: Any) -> None:
        self._spawner = spawner
        self.asked, self.allowed = asyncio.Event(), asyncio.Event()

    async def launch(self, *arguments: Any) -> Any:
        self.asked.set()
        await self.allowed.wait()
        return await self._spawner.launch(*arguments)

    async def close(self) -> None:
        await self._spawner.close()


@pytest.mark.parametrize("verb", ["kill", "stop", "cancel"])
async def test_a_process_can_be_ended_while_it_is_launched(make_host: MakeHost, verb: str) -> None:
    spawner = SlowSpawner(imaginary())
    async with make_host(spawner=spawner) as place:
        process = place.host.process(KEY)
        starting = asyncio.create_task(place.host.start_process(process))
        await soon(spawner.asked.wait())
        if verb == "kill":
            process.kill()
        elif verb == "stop":
            await soon(process.stop())
        else:
            starting.cancel()
        with pytest.raises(ProcessLost if verb != "cancel" else asyncio.CancelledError):
            await soon(starting)
        assert process.pid is None
        await soon(process.exited())


async def test_a_launch_that_succeeds_as_it_is_cancelled_leaves_no_process(make_host: MakeHost) -> None:
    spawner = SlowSpawner(imaginary())
    async with make_host(spawner=spawner) as place:
        process = place.host.process(KEY)
        starting = asyncio.create_task(place.host.start_process(process))
        await soon(spawner.asked.wait())
        spawner.allowed.set()
        while process._launching is None or not process._launching.done():  # noqa: ASYNC110
            await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises((asyncio.CancelledError, ProcessLost)):
            await soon(starting)
        assert not process.alive
        await soon(process.exited())


async def test_a_process_that_was_killed_before_its_start_does_not_start(make_host: MakeHost) -> None:
    async with make_host() as place:
        process = place.host.process(KEY)
        process.kill()
        assert not process.alive
        with pytest.raises(ProcessLost):
            await soon(place.host.start_process(process))
        assert process.pid is None


async def test_a_damaged_cache_is_left_alone_and_another_one_used(
    make_host: MakeHost, starts: Starts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A16: nothing is renamed, which a lower layer of an image does not allow."""
    cache = CacheDirs.of(tmp_path / "cache", KEY)
    cache.torchinductor.mkdir(parents=True)
    (cache.torchinductor / "kernel.so").write_text("damaged")
    starts(f"{SHAPE.key}=compile unless empty")
    async with make_host() as place:
        with pytest.raises(ProcessLost) as caught:
            await place.ready(warm=True)
        assert caught.value.reason == "compile"
        process = await place.ready(warm=True)
        await place.make(process)
    assert (cache.torchinductor / "kernel.so").read_text() == "damaged"
    assert f"ltx2-warmup --only {SHAPE.key} --force" in caplog.text


async def test_a_damaged_cache_is_replaced_after_a_job_as_well(make_host: MakeHost) -> None:
    async with make_host() as place:
        process = await place.ready()
        before = place.host._cache_of(KEY)
        with pytest.raises(ProcessLost) as caught:
            await place.make(process, "compile")
        assert caught.value.reason == "compile"
        assert place.host._cache_of(KEY) != before


@pytest.mark.parametrize("why", ["strict", "no space", "a cache of the caller"])
async def test_a_cache_that_is_not_replaced(make_host: MakeHost, starts: Starts, tmp_path: Path, why: str) -> None:
    starts(f"{SHAPE.key}={'no space' if why == 'no space' else 'compile'}")
    async with make_host(replace_damaged_caches=why != "strict") as place:
        process = place.host.process(KEY)
        cache = CacheDirs(tmp_path / "elsewhere") if why.startswith("a cache") else None
        with pytest.raises(ProcessLost):
            await place.host.start_process(process, (warm_up(),), cache)
        assert place.host._cache_of(KEY) == CacheDirs.of(tmp_path / "cache", KEY)


async def test_output_that_somebody_still_holds_does_not_delay_the_end(
    make_host: MakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A30: a holder of the Connection's other end, in a group of its own, has no say."""
    async with make_host() as place:
        kept: list[int] = []
        open_channel = process_module.open_channel

        async def keep() -> Any:
            channel, theirs = await open_channel()
            kept.append(os.dup(theirs.fileno()))
            return channel, theirs

        monkeypatch.setattr(process_module, "open_channel", keep)
        process = await place.ready()
        os.kill(process.pid, signal.SIGKILL)
        await until(lambda: not process.alive)
        with pytest.raises(ProcessLost) as caught:
            await place.make(process)
        assert caught.value.reason == "killed"
        await soon(process.exited())
        os.close(kept[0])


def test_kill_group_needs_no_imports() -> None:
    assert reaping.kill_group.__module__ == "ltx2_pool.processes.guard"
