"""Real pictures, real processes and real signals: what a picture can cost, and what it leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import psutil
import pytest
from PIL import Image

from ltx2_pool.processes import pictures as module
from ltx2_pool.processes.guard import Guard
from ltx2_pool.processes.pictures import DecoderLost, PictureReader, PicturesBusy
from ltx2_pool.tools.bench.pictures import run
from ltx2_pool.words.pictures import PictureError, PictureLimits, pixel_bytes
from tests.children import DEADLINE, needs_landlock, open_files, until
from tests.paths import REPOSITORY
from tests.processes.conftest import soon

SIZES = ((96, 64), (48, 32))


def saved(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


RED = saved(Image.new("RGB", (320, 200), (200, 30, 30)))
LONG = saved(Image.new("RGB", (5000, 5000)), "JPEG")
"""It keeps a child busy for seconds."""


@pytest.fixture
async def make_reader() -> Callable[..., Any]:
    """A reader; afterwards it must have left no descriptor and no process."""

    @contextlib.asynccontextmanager
    async def make(guard: Guard | None = None, **limits: Any) -> AsyncIterator[PictureReader]:
        files, children = open_files(), psutil.Process().children()
        reader = PictureReader(PictureLimits(**limits), guard)
        try:
            yield reader
        finally:
            await soon(reader.close())
        await until(lambda: [file for fd, file in open_files().items() if files.get(fd) != file] == [], 5)
        assert [child for child in psutil.Process().children() if child not in children] == []

    first = PictureReader(PictureLimits())  # libuv keeps descriptors from its first stream on
    await soon(first.start())
    await soon(first.close())
    return make


async def red(reader: PictureReader) -> None:
    """Read a red picture, and see that it is one."""
    descriptor = await soon(reader.read(RED, SIZES))
    try:
        content = os.pread(descriptor, 1 << 20, 0)
        assert len(content) == pixel_bytes(SIZES)
        for colour, level in enumerate((200, 30, 30)):
            assert all(abs(value - level) < 6 for value in content[colour::3])
    finally:
        os.close(descriptor)


def ended(process: psutil.Process) -> bool:
    """Whether it has; whose orphan it became may not have reaped it yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # between the two
        return True


async def child_of(reader: PictureReader) -> psutil.Process:
    """Of the process that decodes, once it has one."""
    server = psutil.Process(reader.pid)
    await until(server.children)
    return server.children()[0]


async def test_pixels_are_sealed(make_reader):
    async with make_reader() as reader:
        await red(reader)
        descriptor = await soon(reader.read(RED, SIZES))
        for attempt in (
            lambda: os.pwrite(descriptor, b"x", 0),
            lambda: os.ftruncate(descriptor, 1),
            lambda: os.ftruncate(descriptor, 1 << 20),
        ):
            with pytest.raises(PermissionError):
                attempt()
        os.close(descriptor)


async def test_errors_of_the_decoder_come_through(make_reader):
    async with make_reader(max_bytes=2000, max_pixels=1000) as reader:
        with pytest.raises(PictureError, match="320x200 pixels: at most 1000 in all are accepted"):
            await soon(reader.read(RED, SIZES))
        with pytest.raises(PictureError, match="no PNG, JPEG or WebP"):
            await soon(reader.read(b"GIF89a", SIZES))
        with pytest.raises(PictureError, match="has 2001 bytes: at most 2000"):
            await soon(reader.read(b"x" * 2001, SIZES))


async def test_a_child_that_dies_costs_its_picture_alone(make_reader):
    async with make_reader() as reader:
        await soon(reader.start())
        server = reader.pid
        for number, text in ((signal.SIGKILL, "was killed"), (signal.SIGSEGV, "crashed"), (signal.SIGALRM, "too long")):
            reading = asyncio.create_task(reader.read(LONG, SIZES))
            (await child_of(reader)).send_signal(number)
            await red(reader)
            with pytest.raises(PictureError, match=text):
                await soon(reading)
        assert reader.pid == server


async def test_a_picture_has_its_time(make_reader):
    async with make_reader(timeout=0.3) as reader:
        with pytest.raises(PictureError, match="took too long"):
            await soon(reader.read(LONG, SIZES))
        await red(reader)


async def test_the_decoders_death_costs_nothing(make_reader):
    async with make_reader() as reader:
        await red(reader)
        first = reader.pid
        os.kill(first, signal.SIGKILL)
        await red(reader)
        assert reader.pid != first
        reading = asyncio.create_task(reader.read(LONG, SIZES))
        child = await child_of(reader)
        os.kill(reader.pid, signal.SIGKILL)
        os.close(await soon(reading))
        await until(lambda: ended(child))


async def test_a_decoder_that_is_stopped_is_replaced(make_reader, monkeypatch):
    monkeypatch.setattr(module, "_GRACE", 0.1)
    async with make_reader(timeout=2) as reader:
        await red(reader)
        os.kill(reader.pid, signal.SIGSTOP)
        await red(reader)


async def test_a_decoder_that_always_dies(make_reader, monkeypatch):
    async with make_reader() as reader:
        await soon(reader.start())
        reading = asyncio.create_task(reader.read(LONG, SIZES))
        for _ in range(2):
            await child_of(reader)
            server = reader.pid
            os.kill(server, signal.SIGKILL)
            await until(lambda server=server: reading.done() or reader.pid not in (server, None))
        with pytest.raises(DecoderLost, match="twice"):
            await soon(reading)
        monkeypatch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(DecoderLost, match="ended before it was ready"):
            await soon(reader.read(RED, SIZES))
        monkeypatch.setattr(sys, "executable", "/nowhere")
        with pytest.raises(FileNotFoundError):
            await soon(reader.read(RED, SIZES))
        monkeypatch.undo()
        await red(reader)


async def test_who_gives_up_leaves_nothing(make_reader):
    async with make_reader() as reader:
        await soon(reader.start())
        files = open_files()
        reading = asyncio.create_task(reader.read(LONG, SIZES))
        child = await child_of(reader)
        reading.cancel()
        await asyncio.wait([reading])
        assert open_files() == files
        await until(lambda: ended(child))
        await red(reader)


async def test_who_gives_up_before_it_is_ready(make_reader):
    async with make_reader() as reader:
        reading = asyncio.create_task(reader.read(RED, SIZES))
        await until(lambda: psutil.Process().children())
        reading.cancel()
        await asyncio.wait([reading])
        await red(reader)


async def test_the_line_ends_somewhere(make_reader, monkeypatch):
    monkeypatch.setattr(module, "IN_LINE", 3)
    async with make_reader() as reader:
        reading = [asyncio.create_task(reader.read(LONG, SIZES)) for _ in range(5)]
        await two_children_of(reader)
        with pytest.raises(PicturesBusy, match="3 pictures wait"):
            await reader.read(RED, SIZES)
        for task in reading:
            task.cancel()
        await asyncio.wait(reading)
        await until(lambda: psutil.Process(reader.pid).children() == [])
        monkeypatch.setattr(module, "_PATIENCE", 0.01)
        reading = [asyncio.create_task(reader.read(LONG, SIZES)) for _ in range(2)]
        await two_children_of(reader)
        with pytest.raises(PicturesBusy, match="waited"):
            await soon(reader.read(RED, SIZES))
        for task in reading:
            task.cancel()
        await asyncio.wait(reading)


async def two_children_of(reader: PictureReader) -> None:
    await until(lambda: reader.pid and len(psutil.Process(reader.pid).children()) == 2)


async def test_closed_while_it_reads(make_reader):
    async with make_reader() as reader:
        reading = asyncio.create_task(reader.read(LONG, SIZES))
        await until(lambda: reader.pid)
        await child_of(reader)
        await soon(reader.close())
        with pytest.raises(DecoderLost):
            await soon(reading)
        with pytest.raises(DecoderLost, match="closed"):
            await reader.read(RED, SIZES)


async def test_nothing_grows(make_reader):
    async with make_reader() as reader:
        await red(reader)
        server = psutil.Process(reader.pid)
        files, memory = open_files(), server.memory_info().rss
        for _ in range(50):
            await red(reader)
        assert open_files() == files
        assert server.num_fds() <= 6
        assert server.num_threads() == 1
        assert server.memory_info().rss - memory < 1 << 20


WORKER = """
import asyncio, sys
from ltx2_pool.processes.guard import Guard
from ltx2_pool.processes.pictures import PictureReader
from ltx2_pool.words.pictures import PictureLimits
async def main():
    guard = Guard()
    guard.start()
    reader = PictureReader(PictureLimits(), guard)
    await reader.start()
    print(reader.pid, flush=True)
    await reader.read(sys.stdin.buffer.read(), ((64, 64),))
asyncio.run(main())
"""


async def test_all_ends_with_the_worker():
    with subprocess.Popen(  # noqa: ASYNC220 - returns when the program is loaded
        [sys.executable, "-c", WORKER], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        server = psutil.Process(int(worker.stdout.readline()))
        worker.stdin.write(LONG)
        worker.stdin.close()
        await until(server.children)
        (child,) = server.children()
        worker.kill()
    await until(lambda: gone(server) and gone(child))


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def test_hostile_pictures():
    result = await asyncio.wait_for(run(330, seed=7), DEADLINE)
    assert result["unexpected"] == []
    assert result["decoder restarts"] == 0
    assert result["growth"]["decoder descriptors"] == result["growth"]["worker descriptors"] == 0
    assert result["growth"]["decoder bytes"] < 1 << 20
    assert result["accepted"] + sum(result["refused"].values()) == 330


SANDBOX = """
import json, os, socket, sys
from ltx2_pool.model import sandbox
memfd = os.memfd_create("pixels")
confined = sandbox.give_up(memory=2 << 30, written=10, seconds=60)
def attempt(what):
    try:
        what()
    except BaseException as error:
        return type(error).__name__
    return "done"
kept = os.pwrite(memfd, b"0123456789", 0)
answers = {
    "open": attempt(lambda: open("/etc/passwd")),
    "socket": attempt(socket.socket),
    "memory": attempt(lambda: bytearray(3 << 30)),
    "unlink": attempt(lambda: os.unlink(sys.argv[1])),
    "mkdir": attempt(lambda: os.mkdir(sys.argv[1] + ".d")),
    "exec": attempt(lambda: os.execv("/bin/true", ["true"])),
    "kill": attempt(lambda: os.kill(os.getppid(), 0)),
}
print(json.dumps([confined, kept, answers]), flush=True)
os.pwrite(memfd, b"x", 10)
"""


@needs_landlock
def test_what_is_given_up(tmp_path):
    path = tmp_path / "precious"
    path.touch()
    done = subprocess.run(
        [sys.executable, "-c", SANDBOX, str(path)], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    confined, kept, answers = json.loads(done.stdout)
    assert confined
    assert kept == 10
    kill = answers.pop("kill")
    assert kill in ("PermissionError", "done")  # Landlock knows signals since its sixth version
    assert answers == {
        "open": "OSError",
        "socket": "OSError",
        "memory": "MemoryError",
        "unlink": "PermissionError",
        "mkdir": "PermissionError",
        "exec": "PermissionError",
    }
    assert done.returncode == -signal.SIGXFSZ
