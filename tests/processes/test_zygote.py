"""The zygote and its worker's end, with a zygote that imports nothing and children that obey words."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import logging
import os
import random
import resource
import signal
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from ltx2_pool.processes import zygote as module
from ltx2_pool.processes.guard import Guard, kill_group
from ltx2_pool.processes.spawner import Launched
from ltx2_pool.processes.subreaper import subreaper
from ltx2_pool.processes.zygote import ZygoteLost, ZygoteSpawner

HERE = "tests.processes.zygote_child"
ROOT = Path(__file__).parents[2]


@dataclass
class Child:
    pid: int
    exited: asyncio.Future[int]
    connection: socket.socket

    async def ask(self, command: str) -> str:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self.connection, command.encode())
        return (await loop.sock_recv(self.connection, 100)).decode()

    async def end(self) -> int:
        self.connection.close()
        return await self.exited


Start = Callable[..., contextlib.AbstractAsyncContextManager[ZygoteSpawner]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts a spawner; afterwards nothing may be left of it: no descriptor, process, task or subreaper."""
    before, flag, children = _kinds(), _is_subreaper(), psutil.Process().children()

    @contextlib.asynccontextmanager
    async def spawner(*preload: str, timeout: float = 20, **environment: str) -> AsyncIterator[ZygoteSpawner]:
        guard = Guard()
        guard.start()
        made = ZygoteSpawner(
            {"PYTHONPATH": str(ROOT), **environment}, guard, timeout, program=f"{HERE}:serve", preload=[HERE, *preload]
        )
        try:
            async with asyncio.timeout(60):
                yield made
        finally:
            await made.close()
            guard.close()

    yield spawner
    with contextlib.suppress(TimeoutError):
        await until(lambda: psutil.Process().children() == children and _kinds() == before, 2)
    assert psutil.Process().children() == children
    assert _kinds() == before
    assert _is_subreaper() == flag
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not [task for task in left if "pytest" not in repr(task)]


def _descriptors(process: int | str = "self") -> dict[str, str]:
    found = {}
    for entry in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[entry.name] = str(entry.readlink())
    return found


def _kinds() -> dict[str, int]:
    """How many of each kind; libuv opens /dev/null once, whenever it likes."""
    kinds = collections.Counter(link.partition(":")[0] for link in _descriptors().values())
    del kinds["/dev/null"]
    return kinds


def _is_subreaper() -> bool:
    import ctypes

    value = ctypes.c_int()
    ctypes.CDLL(None).prctl(37, ctypes.byref(value), 0, 0, 0)
    return bool(value.value)


async def launch(spawner: ZygoteSpawner, **environment: str) -> Child:
    mine, theirs = socket.socketpair()
    mine.setblocking(False)
    sink = os.open("/dev/null", os.O_WRONLY)
    try:
        with theirs:
            launched = await spawner.launch(environment, [theirs.fileno()], sink)
    except BaseException:
        mine.close()
        raise
    finally:
        os.close(sink)
    return Child(launched.pid, launched.exited, mine)


async def until(condition: Callable[[], object], within: float = 20) -> None:
    async with asyncio.timeout(within):
        while not condition():  # noqa: ASYNC110 - any condition, of any object
            await asyncio.sleep(0.002)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


async def test_a_fork_serves_with_its_environment_and_its_end_is_told(start: Start) -> None:
    async with start() as spawner:
        child = await launch(spawner, COLOUR="green")
        assert spawner.pid == psutil.Process(child.pid).ppid()
        assert await child.ask("environ COLOUR") == "green"
        child.connection.send(b"exit 7")
        assert await child.exited == 7
        child.connection.close()
        other = await launch(spawner)
        assert await other.ask("environ COLOUR") == "-"
        assert await other.end() == 0


async def test_what_a_child_started_ends_with_it(start: Start) -> None:
    async with start() as spawner:
        child = await launch(spawner)
        grandchild = int(await child.ask("child"))
        child.connection.send(b"die")
        assert await child.exited == -signal.SIGKILL
        assert not psutil.pid_exists(grandchild)
        child.connection.close()


async def test_a_kill_right_after_the_fork_always_hits(start: Start) -> None:
    async with start() as spawner:
        for _ in range(100):
            child = await launch(spawner)
            os.killpg(child.pid, signal.SIGKILL)
            async with asyncio.timeout(5):
                assert await child.exited == -signal.SIGKILL
            child.connection.close()


async def test_a_child_has_no_descriptor_of_its_siblings_or_of_the_zygote(start: Start) -> None:
    async with start() as spawner:
        children = [await launch(spawner) for _ in range(3)]
        for child in children:
            assert await child.ask("ping") == "pong"
            opened = sorted(_descriptors(child.pid).values())
            assert opened[:3] == ["/dev/null"] * 3
            assert len(opened) == 4
            assert opened[3].startswith("socket:")
        for child in children:
            await child.end()


async def test_many_forks_at_once_get_each_its_own_answer(start: Start) -> None:
    async with start() as spawner:
        children = await asyncio.gather(*(launch(spawner, NUMBER=f"{n}") for n in range(20)))
        assert len({child.pid for child in children}) == 20
        for n, child in enumerate(children):
            assert await child.ask("environ NUMBER") == f"{n}"
            assert await child.end() == 0


async def test_a_zygote_with_a_thread_refuses_and_lives(start: Start) -> None:
    async with start(f"{HERE}:threaded") as spawner:
        for _ in range(2):
            with pytest.raises(ZygoteLost, match="cannot fork: Python threads run in it: stray"):
                await launch(spawner)
        assert spawner.pid is not None


async def test_a_module_that_cannot_be_imported_is_skipped_with_a_warning(start: Start, caplog: Any) -> None:
    async with start("renamed.upstream", f"{HERE}:gone") as spawner:
        assert await (await launch(spawner)).end() == 0
    assert "could not preload renamed.upstream: ModuleNotFoundError" in caplog.text
    assert f"could not preload {HERE}:gone: AttributeError" in caplog.text


async def test_imports_that_take_too_long_end_the_zygote(start: Start) -> None:
    async with start(f"{HERE}:never", timeout=0.5) as spawner:
        with pytest.raises(ZygoteLost, match=r"not ready within 0\.5 s"):
            await launch(spawner)
        assert spawner.pid is None


async def test_a_caller_that_gives_up_leaves_the_next_one_to_wait_for_the_same_zygote(start: Start) -> None:
    async with start(f"{HERE}:never") as spawner:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await launch(spawner)
        pid = spawner.pid
        assert pid is not None
        waiting = asyncio.create_task(launch(spawner))
        await asyncio.sleep(0)
        assert not waiting.done()
        assert spawner.pid == pid
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await spawner.ensure()
        assert spawner.pid == pid
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ZygoteLost, match="before it was ready"):
            await waiting


async def test_a_zygote_that_cannot_start_says_why(start: Start) -> None:
    async with start(PYTHONHOME="/nowhere") as spawner:
        with pytest.raises(ZygoteLost, match=r"(?s)before it was ready.*\n  \| .*encodings"):
            await launch(spawner)


async def test_children_serve_on_without_their_zygote_and_a_new_one_comes(start: Start) -> None:
    async with start() as spawner:
        children = [await launch(spawner) for _ in range(3)]
        first = spawner.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: spawner.pid not in (None, first))
        for child in children:
            assert await child.ask("ping") == "pong"
            assert psutil.Process(child.pid).ppid() == os.getpid()
        children.append(await launch(spawner))
        children[0].connection.send(b"exit 5")
        os.killpg(children[1].pid, signal.SIGTERM)
        assert await children[0].exited == 5
        assert await children[1].exited == -signal.SIGTERM
        for child in children:
            await child.end()


async def test_an_end_that_the_zygote_had_told_before_it_died_is_read(start: Start) -> None:
    async with start() as spawner:
        children = [await launch(spawner) for _ in range(3)]
        zygote = psutil.Process(spawner.pid)
        children[1].connection.send(b"exit 3")
        while psutil.pid_exists(children[1].pid):  # reaped and told, and this loop has not run since
            pass
        while zygote.status() != psutil.STATUS_SLEEPING:
            pass
        zygote.kill()
        assert await children[1].exited == 3
        assert await children[0].ask("ping") == "pong"
        assert await children[2].ask("ping") == "pong"
        for child in children:
            await child.end()


async def test_a_child_that_is_gone_without_a_status_costs_no_other_its_adoption(start: Start) -> None:
    async with start() as spawner:
        children = [await launch(spawner) for _ in range(4)]
        zygote = psutil.Process(spawner.pid)
        zygote.suspend()
        # Its status socket says nothing, as if the zygote had died between waitpid and send.
        real = next(fork for fork in spawner._zygote.forks if fork.pid == children[1].pid)  # type: ignore[union-attr]
        zygote.resume()
        children[1].connection.send(b"exit 3")
        while psutil.pid_exists(children[1].pid):
            pass
        while zygote.status() != psutil.STATUS_SLEEPING:
            pass
        real._status.recv(100)
        zygote.kill()
        assert await children[1].exited == -signal.SIGKILL
        for child in (children[0], *children[2:]):
            assert await child.ask("ping") == "pong"
            child.connection.send(b"exit 4")
            assert await child.exited == 4
        for child in children:
            child.connection.close()


@pytest.mark.parametrize("seed", range(20))
async def test_a_zygote_killed_at_any_moment_leaves_no_child_unnoticed(start: Start, seed: int) -> None:
    chance = random.Random(seed)
    async with start() as spawner:
        await spawner.ensure()
        tasks = [asyncio.create_task(launch(spawner)) for _ in range(6)]
        turns = chance.randrange(60)
        for _ in range(turns):
            await asyncio.sleep(0)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(tasks[chance.randrange(6)]), chance.random() * 0.01)
        if spawner.pid is not None:
            os.kill(spawner.pid, signal.SIGKILL)
        made = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(one, Child | ZygoteLost) for one in made), made
        for child in made:
            if isinstance(child, Child):
                assert await child.ask("ping") == "pong"
                child.connection.send(b"exit 9")
                assert await child.exited == 9
                child.connection.close()


async def test_a_fork_that_nobody_waits_for_any_more_is_killed(start: Start) -> None:
    async with start() as spawner:
        await spawner.ensure()
        zygote = psutil.Process(spawner.pid)
        zygote.suspend()
        mine, theirs = socket.socketpair()  # `theirs` stays open: the child would serve for ever
        with mine, theirs:
            task = asyncio.create_task(spawner.launch({}, [theirs.fileno()], 2))
            for _ in range(10):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            zygote.resume()
            child = await launch(spawner)  # in its turn, so the first has been forked
            await until(lambda: [one.pid for one in zygote.children()] == [child.pid])
            await child.end()


async def test_requests_that_do_not_fit_in_the_socket_wait(start: Start) -> None:
    async with start() as spawner:
        zygote = await spawner.ensure()
        process = psutil.Process(zygote.pid)
        zygote._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        process.suspend()
        tasks = [asyncio.create_task(launch(spawner, PADDING="x" * 3000)) for _ in range(12)]
        await until(lambda: zygote._sending.locked())
        tasks.pop().cancel()
        process.resume()
        children = await asyncio.gather(*tasks)
        assert spawner.pid == zygote.pid
        for child in children:
            assert await child.end() == 0


async def test_requests_that_wait_for_a_zygote_that_dies_fail(start: Start) -> None:
    async with start() as spawner:
        zygote = await spawner.ensure()
        process = psutil.Process(zygote.pid)
        zygote._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        process.suspend()
        tasks = [asyncio.create_task(launch(spawner, PADDING="x" * 3000)) for _ in range(12)]
        await until(lambda: zygote._sending.locked())
        process.kill()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(end) for end in ends} == {ZygoteLost}


async def test_a_zygote_that_does_not_answer_is_replaced(start: Start, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_FORK_TIMEOUT", 0.2)
    async with start() as spawner:
        child = await launch(spawner)
        first = spawner.pid
        psutil.Process(first).suspend()
        with pytest.raises(ZygoteLost, match=r"did not fork within 0\.2 s"):
            await launch(spawner)
        assert await child.ask("ping") == "pong"
        monkeypatch.undo()
        other = await launch(spawner)
        assert spawner.pid != first
        await child.end()
        await other.end()


@pytest.mark.parametrize("said", ["not JSON", "[]", '{"ready": 1}', '{"pid": 5}', '{"ready": {}, "pid": 5}'])
async def test_garbage_instead_of_ready_is_an_error_of_its_own(start: Start, said: str) -> None:
    async with start(f"{HERE}:confuse", f"{HERE}:never", SAY=said) as spawner:
        with pytest.raises(ZygoteLost, match="broke the protocol"):
            await launch(spawner)


@pytest.mark.parametrize(
    "said", ["not JSON", '{"exited": 0}', '{"pid": true}', '{"pid": 0}', '{"pid": -1}', '{"ready": {}}']
)
async def test_garbage_instead_of_a_pid_ends_the_zygote_and_its_unknown_child(start: Start, said: str) -> None:
    async with start(f"{HERE}:lie", LIE=f"pid {said}") as spawner:
        first = (await spawner.ensure()).pid
        with pytest.raises(ZygoteLost):
            await launch(spawner)
        await until(lambda: spawner.pid not in (None, first))


async def test_garbage_instead_of_a_status_ends_the_zygote_and_nothing_else(start: Start, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    async with start(f"{HERE}:lie", LIE='exited {"exited": "well"}') as spawner:
        child, other = await launch(spawner), await launch(spawner)
        child.connection.send(b"exit 3")
        assert await child.exited == -signal.SIGKILL  # reaped by the zygote, and the status is not known
        assert await other.ask("ping") == "pong"
        other.connection.send(b"exit 4")
        assert await other.exited == 4
        child.connection.close()
        other.connection.close()
    assert 'broke the protocol: expected exited: b\'{"exited": "well"}\'' in caplog.text


@pytest.mark.parametrize("room", range(12))
async def test_without_descriptors_a_start_is_an_error_of_the_system(start: Start, room: int) -> None:
    async with start() as spawner:
        sink, (mine, theirs) = os.open("/dev/null", os.O_WRONLY), socket.socketpair()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = max(map(int, _descriptors()))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1 + room, hard))
        try:
            [launched] = await asyncio.gather(spawner.launch({}, [theirs.fileno()], sink), return_exceptions=True)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            os.close(sink)
        theirs.close()
        mine.close()
        if isinstance(launched, Launched):
            await launched.exited
        else:
            assert isinstance(launched, ZygoteLost) or launched.errno == errno.EMFILE, launched  # type: ignore[attr-defined]
        assert await (await launch(spawner)).end() == 0


async def test_a_guard_that_cannot_be_told_is_an_error_and_leaves_no_zygote(start: Start, monkeypatch: Any) -> None:
    def watch(_group: int) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    async with start() as spawner:
        monkeypatch.setattr(spawner._guard, "watch", watch)
        with pytest.raises(OSError, match="Too many"):
            await launch(spawner)
        monkeypatch.undo()
        assert await (await launch(spawner)).end() == 0


async def test_an_environment_that_is_too_long_is_refused_here(start: Start) -> None:
    async with start() as spawner:
        with pytest.raises(OSError, match="too long"):
            await launch(spawner, LONG="x" * 70_000)
        assert await (await launch(spawner)).end() == 0


async def test_a_zygote_ends_its_children_when_the_worker_closes_it_in_good_order(start: Start) -> None:
    async with start() as spawner:
        await spawner.ensure()
    assert spawner.pid is None
    with pytest.raises(ZygoteLost, match="closed"):
        await spawner.ensure()


async def test_two_spawners_keep_the_subreaper_flag_until_the_last_is_closed(start: Start) -> None:
    async with start() as outer:
        assert not _is_subreaper(), "nothing was started yet"
        child = await launch(outer)
        async with start() as inner:
            await inner.ensure()
            assert _is_subreaper()
        assert _is_subreaper()
        os.kill(outer.pid or 0, signal.SIGKILL)
        await child.end()
    assert not _is_subreaper()


def test_a_flag_that_was_set_before_stays_set() -> None:
    with subreaper():
        pass
    assert not _is_subreaper()


async def test_a_stopped_child_can_be_killed(start: Start) -> None:
    async with start() as spawner:
        child = await launch(spawner)
        os.kill(child.pid, signal.SIGSTOP)
        await until(lambda: state(child.pid) == "T")
        kill_group(child.pid)
        assert await child.exited == -signal.SIGKILL
        child.connection.close()
