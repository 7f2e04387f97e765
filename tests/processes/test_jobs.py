"""One shape process and its jobs: every way a job can end, and what the process is afterwards."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ltx2_pool.processes.spawner import ExecSpawner
from ltx2_pool.words import protocol
from ltx2_pool.words.outcomes import JobFailed, ProcessLost
from ltx2_pool.words.protocol import Memory, Phase
from tests.children import CONFINED, Gate, needs_landlock, until

from .conftest import DEADLINE, KEY, QUICK, SHAPE, Events, job, nothing, soon

MakeHost = Callable[..., Any]


async def test_a_process_makes_one_video_after_the_other(make_host: MakeHost) -> None:
    async with make_host() as place:
        process = await place.ready()
        pid, events = process.pid, Events()
        for _ in range(2):
            output = place.output()
            done = await process.generate(job(), output, events)
            assert output.read_text() == f"{SHAPE.key} by {pid}"
            assert done.memory == process.memory
        assert process.jobs_done == 2
        assert events.phases[:4] == ["text", "denoise", "decode", "encode"]
        assert process.alive
        await process.stop()
        assert not process.alive
        assert await process.exited() == 0


@pytest.mark.parametrize(
    ("prompt", "reason", "began"),
    [
        ("crash", "gen_eof", False),
        ("exit 0", "gen_eof", False),
        ("exit 3", "gen_eof", False),
        ("kill", "killed", False),
        ("die in text", "gen_eof", True),
        ("die in denoise", "gen_eof", True),
        ("die in decode", "gen_eof", True),
        ("die in encode", "gen_eof", True),
        ("kill in encode", "killed", True),
        ("fatal", "cuda_fault", True),
        ("oom", "oom", True),
        ("compile", "compile", True),
        ("compile no space", "system", True),
        ("garbage", "parse_error", False),
        ("truncated", "gen_eof", False),
        ("oversized", "parse_error", False),
        ("wrong id", "desync", False),
        ("desync", "desync", False),
    ],
)
async def test_a_job_that_loses_its_process_is_told_why(
    make_host: MakeHost, prompt: str, reason: str, began: bool
) -> None:
    async with make_host() as place:
        process = await place.ready()
        with pytest.raises(ProcessLost) as caught:
            await soon(place.make(process, prompt))
        lost = caught.value
        assert (lost.reason, lost.began) == (reason, began), lost
        assert lost.jobs_fault == (began and reason in ("gen_eof", "cuda_fault"))
        assert SHAPE.key in str(lost)
        assert "an imaginary child" in str(lost), "the message ends with its last output"
        assert lost.memory is not None
        assert not process.alive
        await soon(process.exited())


@pytest.mark.parametrize("prompt", ["soft", "refused", "no space"])
async def test_a_process_survives_a_job_that_only_fails(make_host: MakeHost, prompt: str) -> None:
    async with make_host() as place:
        process = await place.ready()
        with pytest.raises(JobFailed) as caught:
            await place.make(process, prompt)
        assert caught.value.kind == ("refused" if prompt == "refused" else "soft")
        assert caught.value.memory is not None
        await place.make(process)


async def test_the_child_writes_into_the_file_that_it_was_given_and_leaves_it(make_host: MakeHost) -> None:
    """A1: a second attempt has a file of its own, and nothing is in its way."""
    async with make_host() as place:
        output = place.output()
        process = await place.ready()
        with pytest.raises(ProcessLost):
            await process.generate(job("die in encode"), output, nothing)
        assert output.exists(), "the child removes nothing"
        process = await place.ready()
        await process.generate(job(), output, nothing)
        assert output.read_text() == f"{SHAPE.key} by {process.pid}"


@pytest.mark.parametrize("kind", ["absent", "link", "no directory"])
async def test_a_file_that_is_not_the_given_one_costs_no_device_time(
    make_host: MakeHost, tmp_path: Path, kind: str
) -> None:
    async with make_host() as place:
        process, events = await place.ready(), Events()
        target = tmp_path / "somebody's file"
        target.write_text("precious")
        output = tmp_path / ("nowhere/video.mp4" if kind == "no directory" else "video.mp4")
        if kind == "link":
            output.symlink_to(target)
        with pytest.raises(JobFailed) as caught:
            await process.generate(job(), output, events)
        assert caught.value.kind == "soft"
        assert events.seen == []
        assert target.read_text() == "precious"
        assert not output.exists() or kind == "link"
        await place.make(process)


@needs_landlock
async def test_a_process_that_is_kept_out_of_a_new_directory_ends(make_host: MakeHost, tmp_path: Path) -> None:
    """Landlock holds directories and not their names: it was told of a soft error, and so was every job after it."""
    async with make_host(spawner=ExecSpawner(CONFINED)) as place:
        process, videos = await place.ready(), tmp_path / "videos"
        await place.make(process)
        shutil.rmtree(videos)
        videos.mkdir()
        with pytest.raises(ProcessLost, match=r"may not write the file .*PermissionError") as caught:
            await place.make(process)
        assert (caught.value.reason, caught.value.began, caught.value.jobs_fault) == ("system", False, False)
        assert caught.value.memory is not None
        assert not process.alive
        await soon(process.exited())
        await place.make(await place.ready())


@pytest.mark.parametrize(
    ("error", "kind"),
    [(errno.EACCES, "barred"), (errno.EPERM, "barred"), (errno.EROFS, "soft"), (errno.ENOSPC, "soft")],
)
def test_only_a_file_that_another_process_may_write_ends_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, kind: str
) -> None:
    import ltx2_pool.model
    from ltx2_pool.model import child
    from ltx2_pool.tools import imaginary

    answers: list[protocol.FromChild] = []

    class Connection:
        def send_bytes(self, payload: bytes) -> None:
            answers.append(protocol.decode_from_child(payload))

    def refused(path: str, *_: object) -> int:
        raise OSError(error, os.strerror(error), path)

    for name in ("engine", "mp4"):
        monkeypatch.setitem(sys.modules, f"ltx2_pool.model.{name}", imaginary)
        monkeypatch.setattr(ltx2_pool.model, name, imaginary, raising=False)
    monkeypatch.setattr(child.os, "open", refused)
    server: Any = child.ShapeServer(Connection(), 0, [-1])  # type: ignore[arg-type]
    goes_on = server._serve(imaginary.Generator(), protocol.Generate(job=job(), output=str(tmp_path / "video.mp4")))
    (answer,) = answers
    assert isinstance(answer, protocol.Failed)
    assert (answer.kind, goes_on) == (kind, kind == "soft")
    assert os.strerror(error) in answer.error


@pytest.mark.parametrize(
    ("prompt", "is_kind"),
    [
        ("link /etc/passwd", lambda mode: stat.S_ISLNK(mode)),
        ("directory", lambda mode: stat.S_ISDIR(mode)),
        ("fifo", lambda mode: stat.S_ISFIFO(mode)),
        ("huge", lambda mode: stat.S_ISREG(mode)),
        ("empty", lambda mode: stat.S_ISREG(mode)),
    ],
)
async def test_an_imaginary_child_leaves_what_a_hostile_one_could(
    make_host: MakeHost, prompt: str, is_kind: Callable[[int], bool]
) -> None:
    async with make_host() as place:
        process = await place.ready()
        _, output = await place.make(process, prompt)
        assert is_kind(output.lstat().st_mode)
        assert (output.lstat().st_size == 8 << 30) == (prompt == "huge")


async def test_memory_comes_back_from_every_outcome(make_host: MakeHost) -> None:
    """A7: twice when there is a video, once when there is none."""
    async with make_host() as place:
        process = await place.ready()

        def count() -> int:
            return sum(line == "trimmed" for line in process.tail)

        await until(lambda: count() == 1)
        await process.generate(job(), place.output(), nothing)
        await until(lambda: count() == 3)
        with pytest.raises(JobFailed):
            await place.make(process, "soft")
        await until(lambda: count() == 4)
        events, cancelled = Events(), job("until cancelled")
        running = asyncio.create_task(process.generate(cancelled, place.output(), events))
        await events.phase("denoise")
        process.cancel(cancelled)
        with pytest.raises(JobFailed) as caught:
            await soon(running)
        assert caught.value.kind == "cancelled"
        assert caught.value.memory is not None
        await until(lambda: count() == 5)


def test_memory_is_given_back_before_the_device_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A8: "encode" says that the device is free."""
    import ltx2_pool.model
    from ltx2_pool.model import child
    from ltx2_pool.tools import imaginary

    order: list[str] = []

    class Connection:
        def send_bytes(self, payload: bytes) -> None:
            message = protocol.decode_from_child(payload)
            order.append(message.phase if isinstance(message, Phase) else message.type)

        def poll(self, _timeout: float) -> bool:
            return False

    for name in ("engine", "mp4"):
        monkeypatch.setitem(sys.modules, f"ltx2_pool.model.{name}", imaginary)
        monkeypatch.setattr(ltx2_pool.model, name, imaginary, raising=False)
    monkeypatch.setattr(imaginary, "trim_memory", lambda: order.append("trim"))
    output = tmp_path / "video.mp4"
    output.touch()
    server: Any = child.ShapeServer(Connection(), 0, [-1])  # type: ignore[arg-type]
    assert server._serve(imaginary.Generator(), protocol.Generate(job=job(), output=str(output)))
    assert [what for what in order if what != "step"] == ["text", "denoise", "decode", "trim", "encode", "trim", "done"]


async def test_what_a_failed_job_left_is_known(make_host: MakeHost) -> None:
    async with make_host() as place:
        process = await place.ready()
        done, _ = await place.make(process, "memory 5 7")
        assert done.memory == process.memory == Memory(resident=5, peak=7)
        with pytest.raises(JobFailed) as caught:
            await place.make(process, "soft")
        assert caught.value.memory == process.memory == Memory(resident=5, peak=7)
        with pytest.raises(ProcessLost) as lost:
            await place.make(process, "oom")
        assert lost.value.memory == Memory(resident=5, peak=7)


async def test_a_job_given_to_a_process_that_was_just_killed_is_a_loss(make_host: MakeHost) -> None:
    """A4: an error that its owner knows, whatever came first."""
    async with make_host() as place:
        process = await place.ready()
        process.kill("weights_lost")
        assert not process.alive
        with pytest.raises(ProcessLost) as caught:
            await process.generate(job(), place.output(), nothing)
        assert caught.value.reason == "weights_lost"
        assert not caught.value.jobs_fault


@pytest.mark.parametrize("prompt", ["die when idle", "stop when idle"])
async def test_the_end_of_an_idle_process_is_noticed_and_nobodys_fault(make_host: MakeHost, prompt: str) -> None:
    """A18 and A22."""
    async with make_host(replace(QUICK, silence=4)) as place:
        process = await place.ready()
        await place.make(process, prompt)
        await until(lambda: not process.alive)
        with pytest.raises(ProcessLost) as caught:
            await process.generate(job(), place.output(), nothing)
        assert not caught.value.began
        assert not caught.value.jobs_fault
        assert caught.value.reason == ("gen_eof" if prompt == "die when idle" else "silent")
        await soon(process.exited())


async def test_a_process_is_not_alive_before_it_is_reaped(make_host: MakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """A18: what it had started may take its time to die."""
    from ltx2_pool.processes import process as process_module
    from ltx2_pool.processes import reaping

    reaped = asyncio.Event()

    async def slow(_group: int) -> None:
        await reaped.wait()

    async with make_host() as place:
        process = await place.ready()
        monkeypatch.setattr(reaping, "_reap_group", slow)
        monkeypatch.setattr(process_module, "_LINGERING", 600)
        os.kill(process.pid, signal.SIGKILL)
        await until(lambda: not process.alive)
        ended = asyncio.create_task(process.exited())
        await asyncio.sleep(0)
        assert not ended.done()
        reaped.set()
        assert await soon(ended) == -signal.SIGKILL


async def test_a_stopped_process_with_a_job_is_replaced(make_host: MakeHost) -> None:
    async with make_host(replace(QUICK, silence=4)) as place:
        process = await place.ready()
        with pytest.raises(ProcessLost) as caught:
            await soon(place.make(process, "stop"))
        assert caught.value.reason == "silent"
        assert not caught.value.jobs_fault


async def test_a_worker_that_was_stopped_itself_kills_nobody(make_host: MakeHost) -> None:
    """The watchdog counts its own ticks: half a minute in which the loop did not run is one."""
    import time

    async with make_host(replace(QUICK, silence=4)) as place:
        process = await place.ready()
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(6)  # noqa: ASYNC251 - the loop is what stands still
        os.kill(process.pid, signal.SIGCONT)
        await place.make(process)
        assert process.alive


async def test_a_long_job_pings(make_host: MakeHost, gate: Callable[[], Gate]) -> None:
    async with make_host(replace(QUICK, silence=3)) as place:
        process, door = await place.ready(), gate()
        running = asyncio.create_task(place.make(process, f"gate {door.path}"))
        writer = await door.wait_for_child()
        await asyncio.wait([running], timeout=5)
        os.close(writer)
        await soon(running)


async def test_a_generation_has_a_deadline(make_host: MakeHost, gate: Callable[[], Gate]) -> None:
    async with make_host(replace(QUICK, generation=1)) as place:
        process = await place.ready()
        with pytest.raises(ProcessLost) as caught:
            await soon(place.make(process, f"gate {gate().path}"))
        assert caught.value.reason == "gen_timeout"
        assert caught.value.jobs_fault


async def test_cancel_is_for_its_own_job_only(make_host: MakeHost) -> None:
    """A13: neither the message nor the timer reaches the job after it."""
    async with make_host(replace(QUICK, cancel=0.3)) as place:
        process = await place.ready()
        first = job()
        await process.generate(first, place.output(), nothing)
        process.cancel(first)
        running = asyncio.create_task(place.make(process, "long 100"))
        await asyncio.sleep(0)
        process.cancel(first)
        await soon(running)
        assert process.alive


async def test_the_timer_of_a_cancelled_job_ends_with_it(make_host: MakeHost) -> None:
    async with make_host(replace(QUICK, cancel=1)) as place:
        process, events = await place.ready(), Events()
        cancelled = job("until cancelled")
        running = asyncio.create_task(process.generate(cancelled, place.output(), events))
        await events.phase("denoise")
        process.cancel(cancelled)
        process.cancel(cancelled)
        with pytest.raises(JobFailed):
            await soon(running)
        await soon(place.make(process, "long 150"))
        assert process.alive


async def test_a_job_that_does_not_stop_is_stopped(make_host: MakeHost) -> None:
    async with make_host(replace(QUICK, cancel=0.2)) as place:
        process, events = await place.ready(), Events()
        cancelled = job("deaf to cancel")
        running = asyncio.create_task(process.generate(cancelled, place.output(), events))
        await events.step()
        process.cancel(cancelled)
        with pytest.raises(ProcessLost) as caught:
            await soon(running)
        assert caught.value.reason == "cancel_timeout"
        assert not caught.value.jobs_fault


async def test_cancelling_the_task_of_a_job_ends_the_process(make_host: MakeHost) -> None:
    async with make_host() as place:
        process, events = await place.ready(), Events()
        running = asyncio.create_task(process.generate(job("until cancelled"), place.output(), events))
        await events.phase("denoise")
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert not process.alive
        assert await soon(process.exited()) == -signal.SIGKILL


async def test_a_listener_that_fails_fails_its_job_and_nothing_else(make_host: MakeHost) -> None:
    def fail(_event: object) -> None:
        raise ZeroDivisionError

    async with make_host() as place:
        process = await place.ready()
        with pytest.raises(ZeroDivisionError):
            await process.generate(job(), place.output(), fail)
        assert not process.alive
        await soon(process.exited())


async def test_a_busy_process_finishes_its_job_when_it_is_stopped(
    make_host: MakeHost, gate: Callable[[], Gate]
) -> None:
    async with make_host() as place:
        process, door = await place.ready(), gate()
        running = asyncio.create_task(place.make(process, f"gate {door.path}"))
        writer = await door.wait_for_child()
        stopping = asyncio.create_task(process.stop())
        await until(lambda: not process.alive)
        os.close(writer)
        await soon(running)
        await soon(stopping)
        await soon(process.stop())


async def test_a_process_that_ignores_sigterm_is_killed(make_host: MakeHost) -> None:
    async with make_host(replace(QUICK, term=0.5)) as place:
        process = await place.ready()
        running = asyncio.create_task(place.make(process, "hang"))
        await until(lambda: "ignores SIGTERM" in process.tail)
        await soon(process.stop())
        with pytest.raises(ProcessLost):
            await soon(running)
        assert await process.exited() == -signal.SIGKILL


async def test_an_idle_process_ends_whatever_became_of_sigterm(make_host: MakeHost) -> None:
    async with make_host(replace(QUICK, term=10 * DEADLINE)) as place:
        process = await place.ready()
        await place.make(process, "deaf when idle")
        await soon(process.stop())
        assert await process.exited() == 0


async def test_killed_for_want_of_memory(make_host: MakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    from ltx2_pool.processes import endings

    kills = iter((3, 4))
    monkeypatch.setattr(endings, "oom_kills", lambda: next(kills))
    async with make_host() as place:
        process = await place.ready()
        with pytest.raises(ProcessLost) as caught:
            await place.make(process, "kill in denoise")
        assert caught.value.reason == "oom"


async def test_an_impossible_use_is_an_error_of_its_user(make_host: MakeHost) -> None:
    async with make_host() as place:
        process = place.host.process(KEY)
        with pytest.raises(RuntimeError):
            await process.generate(job(), place.output(), nothing)
        process.kill()
        process.kill()
        await soon(process.exited())
        await soon(process.stop())
