"""What all starts need: the weights process, its end, and the pause when something of it keeps failing."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ltx2_pool.processes import endings
from ltx2_pool.processes import process as child
from ltx2_pool.processes.guard import Guard
from ltx2_pool.processes.pause import HelpersPause
from ltx2_pool.processes.zygote import ZygoteLost, ZygoteSpawner
from ltx2_pool.words.outcomes import SHAPES_OWN_FAULT, ProcessLost
from ltx2_pool.words.shapes import Key, Shape
from tests.children import Gate, until

from .conftest import KEY, QUICK, imaginary, soon

MakeHost = Callable[..., Any]
Starts = Callable[[str], None]
KEYS = [Key(Shape(64 * n, 64, 9)) for n in range(1, 6)]


class Counting:
    """A spawner that counts."""

    def __init__(self, fail: Exception | None = None) -> None:
        self._spawner = imaginary()
        self.fail = fail
        self.launches = 0

    async def launch(self, *arguments: Any) -> Any:
        self.launches += 1
        if self.fail is not None:
            raise self.fail
        return await self._spawner.launch(*arguments)

    async def close(self) -> None:
        await self._spawner.close()


async def fail_all(place: Any, keys: list[Key] = KEYS) -> list[ProcessLost]:
    starting = [place.host.start_process(place.host.process(key)) for key in keys]
    return await soon(asyncio.gather(*starting, return_exceptions=True))


async def test_weights_that_do_not_load_are_tried_once_for_all_who_wait(make_host: MakeHost, starts: Starts) -> None:
    """A9: not once for each shape."""
    starts("weights=broken")
    spawner = Counting()
    async with make_host(weights="shared", spawner=spawner) as place:
        for attempt in range(1, 4):
            lost = await fail_all(place)
            assert {one.reason for one in lost} == {"helper"}
            assert not {one.reason for one in lost} & SHAPES_OWN_FAULT
            assert "no checkpoint" in str(lost[0])
            assert spawner.launches == attempt
        assert 0 < place.host.helpers_pause("cpu") <= 5
        assert {one.reason for one in await fail_all(place)} == {"helper"}
        assert spawner.launches == 3, "it was tried in the pause"


async def test_zygotes_that_do_not_fork_count_once_for_all_who_wait(make_host: MakeHost) -> None:
    spawner = Counting(ZygoteLost("the zygote ended"))
    async with make_host(spawner=spawner) as place:
        for _ in range(2):
            assert {one.reason for one in await fail_all(place)} == {"helper"}
            assert not place.host.helpers_pause("cpu")
        await fail_all(place)
        assert place.host.helpers_pause("cpu")
        launches = spawner.launches
        await fail_all(place)
        assert spawner.launches == launches


async def test_a_start_that_works_ends_the_count(make_host: MakeHost) -> None:
    spawner = Counting()
    async with make_host(spawner=spawner) as place:
        for _ in range(3):
            spawner.fail = ZygoteLost("the zygote ended")
            await fail_all(place)
            await fail_all(place)
            spawner.fail = None
            await place.ready()
        assert not place.host.helpers_pause("cpu")


def test_pauses_grow_to_five_minutes() -> None:
    now = 0.0
    pause = HelpersPause(lambda: now)
    pauses = []
    for _ in range(12):
        turn = pause.turn
        pause.failed(turn, "an error\nwith a tail")
        pause.failed(turn, "the same one, met by somebody else")
        pauses.append(pause.remaining)
        now += pause.remaining
    assert pauses == [0, 0, 5, 10, 20, 40, 80, 160, 300, 300, 300, 300]
    assert pause.error == "an error"
    pause.succeeded()
    assert not pause.remaining
    assert not pause.failures


async def test_borrowers_end_with_the_weights_process(make_host: MakeHost) -> None:
    told = []
    async with make_host(weights="shared") as place:
        place.host.on_weights_lost(lambda device: told.append(place.host.lending(device)))
        first, second = await place.ready(), await place.ready(KEYS[1])
        assert place.host.lending("cpu") is not None
        os.kill(place.host.pids["weights"], signal.SIGKILL)
        await until(lambda: told)
        assert told == [None]
        assert not first.alive
        assert not second.alive
        with pytest.raises(ProcessLost) as caught:
            await place.make(first)
        assert caught.value.reason == "weights_lost"
        third = await place.ready()
        assert third.alive
        assert await place.host.weights["cpu"].checksum() == "imaginary"


async def test_a_stopped_weights_process_is_replaced(make_host: MakeHost) -> None:
    async with make_host(replace(QUICK, silence=4), weights="shared") as place:
        process = await place.ready()
        os.kill(place.host.pids["weights"], signal.SIGSTOP)
        await until(lambda: not process.alive)
        await place.ready()


async def test_a_start_whose_lender_dies_is_not_the_shapes_fault(
    make_host: MakeHost, starts: Starts, gate: Callable[[], Gate]
) -> None:
    door = gate()
    starts(f"{KEY.shape.key}=gate{door.path}")
    async with make_host(weights="shared") as place:
        starting = asyncio.create_task(place.ready())
        writer = await door.wait_for_child()
        os.kill(place.host.pids["weights"], signal.SIGKILL)
        with pytest.raises(ProcessLost) as caught:
            await soon(starting)
        assert caught.value.reason == "weights_lost"
        os.close(writer)


@pytest.mark.parametrize("verb", ["kill", "cancel"])
async def test_whoever_waits_for_the_weights_can_be_ended(
    make_host: MakeHost, starts: Starts, gate: Callable[[], Gate], verb: str
) -> None:
    door = gate()
    starts(f"weights=gate{door.path}")
    async with make_host(weights="shared") as place:
        process = place.host.process(KEY)
        starting = asyncio.create_task(place.host.start_process(process))
        other = asyncio.create_task(place.ready(KEYS[1]))
        writer = await door.wait_for_child()
        if verb == "kill":
            process.kill()
        else:
            starting.cancel()
        with pytest.raises(ProcessLost if verb == "kill" else asyncio.CancelledError):
            await soon(starting)
        await soon(process.exited())
        os.close(writer)
        assert (await soon(other)).alive, "the others go on waiting"


async def test_a_host_can_be_closed_while_the_weights_load(
    make_host: MakeHost, starts: Starts, gate: Callable[[], Gate]
) -> None:
    door = gate()
    starts(f"weights=gate{door.path}")
    async with make_host(weights="shared") as place:
        process = place.host.process(KEY)
        starting = asyncio.create_task(place.host.start_process(process))
        writer = await door.wait_for_child()
        await soon(place.host.close())
        with pytest.raises(ProcessLost):
            await soon(starting)
        os.close(writer)


async def test_weights_that_take_too_long(make_host: MakeHost, starts: Starts) -> None:
    starts("weights=hang")
    async with make_host(replace(QUICK, weights=2), weights="shared") as place:
        with pytest.raises(ProcessLost) as caught:
            await place.host.prepare()
        assert caught.value.reason == "helper"
        assert "LTX2_POOL_WEIGHTS_TIMEOUT" in str(caught.value)


@pytest.mark.parametrize("serving", [False, True])
async def test_a_weights_process_that_cannot_be_killed_gets_no_second_one_beside_it(
    make_host: MakeHost, starts: Starts, gate: Callable[[], Gate], monkeypatch: pytest.MonkeyPatch, serving: bool
) -> None:
    """Not even SIGKILL ends one whose driver is in the middle of something."""
    monkeypatch.setattr(child, "_LINGERING", 0.01)
    spawner = Counting()
    async with make_host(replace(QUICK, term=0.05), weights="shared", spawner=spawner) as place:
        with monkeypatch.context() as undead:
            undead.setattr(child, "kill_group", lambda _: None)
            door = gate()
            if not serving:
                starts(f"weights=gate{door.path}")
            preparing = asyncio.create_task(place.host.prepare())
            if serving:
                await soon(preparing)
            else:
                os.close(await door.wait_for_child())
            pid = place.host.pids["weights"]
            place.host.weights["cpu"]._process.kill()
            await soon(asyncio.wait([preparing]))
            for _ in range(2):
                assert not place.host.helpers_pause("cpu")
                lost = await fail_all(place)
                assert {one.reason for one in lost} == {"helper"}
                assert "does not end, although it was killed" in str(lost[0])
            assert place.host.helpers_pause("cpu")
            assert spawner.launches == 1
        os.kill(pid, signal.SIGKILL)
        place.host.weights["cpu"].pause.succeeded()
        starts("")
        assert (await place.ready()).alive


def test_the_kernels_counters(tmp_path: Path) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (cgroups / "pod").mkdir(parents=True)
    assert endings.oom_kills(proc, cgroups) == 0
    (proc / "vmstat").write_text("oom_kill_disable 0\noom_kill 3\n")
    (proc / "self/cgroup").write_text("0::/pod\n")
    (cgroups / "pod/memory.events").write_text("oom 9\noom_kill 2\noom_group_kill 0\n")
    assert endings.oom_kills(proc, cgroups) == 5


@pytest.mark.parametrize(
    ("error", "machines"),
    [
        ("BackendCompilerFailed: backend='inductor' raised:\nOSError: [Errno 28] No space left on device: 'x'", True),
        ("BackendCompilerFailed: backend='inductor' raised:\nPermissionError: [Errno 13] Permission denied: 'l'", True),
        ("InductorError: InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx", True),
        ("InductorError: RuntimeError: Failed to find C compiler. Please specify via CC environment variable", True),
        ("InductorError: OSError: x.so: file too short", False),
        ("BackendCompilerFailed: backend='inductor' raised:\nEOFError: Ran out of input", False),
        ("InductorError: FileNotFoundError: [Errno 2] No such file or directory: '/cache/a.so'", False),
    ],
)
def test_a_compile_failure_is_the_caches_or_the_machines(error: str, machines: bool) -> None:
    assert endings.is_machines_fault(error) == machines


async def test_a_guard_that_is_stopped_blocks_nobody(make_host: MakeHost) -> None:
    async with make_host() as place:
        guard, pid = place.host._guard, place.host.pids["guard"]
        process = await place.ready()
        os.kill(pid, signal.SIGSTOP)
        group = 2**22 + 1  # above any pid
        for _ in range(1 << 16):
            if place.host.pids["guard"] != pid:
                break
            guard.watch(group)
            guard.forget(group)
        assert place.host.pids["guard"] != pid
        assert process.alive, "what the old one knew was nobody's order"


class ImaginaryZygotes(ZygoteSpawner):
    """With a guard of its own."""

    def __init__(self) -> None:
        self.guard = Guard()
        this = "ltx2_pool.tools.imaginary"
        super().__init__({}, self.guard, program=f"{this}:serve", preload=[this])

    async def close(self) -> None:
        await super().close()
        self.guard.close()


async def test_a_host_over_a_zygote(make_host: MakeHost) -> None:
    """The forks ping, borrow and end as fresh interpreters do; and outlive their zygote."""
    spawner = ImaginaryZygotes()
    async with make_host(replace(QUICK, silence=4), weights="shared", spawner=spawner) as place:
        process, other = await place.ready(), await place.ready(KEYS[1])
        await place.make(process)
        zygote = place.host.pids["zygote"]
        os.kill(zygote, signal.SIGKILL)
        await until(lambda: place.host.pids["zygote"] not in (None, zygote))
        await place.make(process)
        os.kill(other.pid, signal.SIGKILL)
        await until(lambda: not other.alive)
        assert await soon(other.exited()) == -signal.SIGKILL
        with pytest.raises(ProcessLost) as caught:
            await soon(place.make(process, "stop"))
        assert caught.value.reason == "silent"
        with pytest.raises(ProcessLost) as caught:
            await soon(place.make(await place.ready(), "die in decode"))
        assert (caught.value.reason, caught.value.began) == ("gen_eof", True)
