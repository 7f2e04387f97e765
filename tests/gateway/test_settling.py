"""A job's end, in one process: lost answers, late dispatchers, stores and frontends that hang or talk nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from ltx2_pool.gateway import content as contents
from ltx2_pool.gateway import news, passing
from ltx2_pool.gateway.content import Content, Stored
from ltx2_pool.gateway.dispatcher import Dispatcher
from ltx2_pool.gateway.jobs import Job, new_id
from ltx2_pool.gateway.metrics import GatewayMetrics
from ltx2_pool.gateway.news import News, Reader
from ltx2_pool.gateway.settings import GatewaySettings
from ltx2_pool.gateway.stills import Stills
from ltx2_pool.gateway.store import Refused, Store, StoreError
from ltx2_pool.gateway.tables import videos
from ltx2_pool.gateway.upstream import Away, Busy, Failed, Lost, Upstream
from tests.gateway.made_up import mp4

JOB = Job("", "a", "queued", 0, "m", "p", "64x64", "5", time.time())


class World:
    """A dispatcher, its stores, and a maker that waits for `go` when it is told to."""

    def __init__(self, directory: Any) -> None:
        self.root = directory / "videos"
        self.store = Store(f"sqlite+aiosqlite:///{directory}/jobs")
        self.content = Content(f"file://{self.root}")
        self.go = asyncio.Event()
        self.go.set()
        self.making = 0
        self.error: Exception | None = None
        settings = GatewaySettings(concurrency=4)
        self.dispatcher = Dispatcher(self.store, self.content, self, News(), GatewayMetrics(), settings)

    async def make(self, body: dict[str, Any], on_progress: Callable[[int], None]) -> bytes:
        self.making += 1
        await self.go.wait()
        if self.error is not None:
            raise self.error
        return b"a video"

    async def add(self) -> str:
        job = dataclasses.replace(JOB, id=new_id())
        await self.store.add(job, {"prompt": "p"}, max_queue=100, max_active=100)
        self.dispatcher.wake()
        return job.id

    async def job(self, id: str) -> Job | None:
        return (await self.store.get_many([id])).get(id)

    async def ended(self, id: str) -> Job:
        while (job := await self.job(id)) is None or job.status not in ("completed", "failed"):  # noqa: ASYNC110 (a row)
            await asyncio.sleep(0.01)
        return job

    async def idle(self) -> None:
        await until(lambda: not self.dispatcher._works)

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file())


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.fixture
async def world(tmp_path) -> AsyncIterator[World]:
    made = World(tmp_path)
    await made.store.open()
    made.dispatcher.start()
    yield made
    made.go.set()
    await made.dispatcher.close()
    await made.store.close()


def once(store: Store, method: str, monkeypatch: pytest.MonkeyPatch, error: Exception, *, before: bool = False) -> None:
    """The first call fails, after it has changed the row or before."""
    real, calls = getattr(store, method), []

    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        answer = None if before and len(calls) == 1 else await real(*args, **kwargs)
        if len(calls) == 1:
            raise error
        return answer

    monkeypatch.setattr(store, method, wrapped)


async def test_a_job_that_is_claimed_as_the_gateway_closes_is_made(world, monkeypatch):
    """And not left to a claim that has to run out."""
    claim, asked, go = world.store.claim, asyncio.Event(), asyncio.Event()

    async def slow(*args: Any) -> Any:
        asked.set()
        await go.wait()
        return await claim(*args)

    monkeypatch.setattr(world.store, "claim", slow)
    id = await world.add()
    await asked.wait()
    closing = asyncio.create_task(world.dispatcher.close())
    await asyncio.sleep(0)
    go.set()
    await closing
    job = await world.job(id)
    assert (job.status, world.making) == ("completed", 1)


async def test_a_frontend_that_is_away_is_not_asked_for_every_job_of_the_queue(world):
    world.error = Away("the frontend does not answer")
    for _ in range(60):
        await world.add()
    began = time.monotonic()
    await until(lambda: world.making >= 12)  # the first four, and those after two pauses of half a second or more
    assert time.monotonic() - began > 0.9
    world.error = None
    assert (await world.ended(await world.add())).status == "completed"


async def test_a_shape_that_is_full_holds_no_other_up(world, monkeypatch):
    """Not even behind sixty jobs of it, each of which is put off for half a second or more."""

    async def make(body: dict[str, Any], _on_progress: Callable[[int], None]) -> bytes:
        if body["prompt"] == "p":
            raise Busy("429 too many jobs of this shape wait")
        return b"a video"

    monkeypatch.setattr(world, "make", make)
    for _ in range(60):
        await world.add()
    job = dataclasses.replace(JOB, id=new_id())
    await world.store.add(job, {"prompt": "of another shape"}, max_queue=100, max_active=100)
    async with asyncio.timeout(20):
        assert (await world.ended(job.id)).status == "completed"


async def test_a_completion_whose_answer_is_lost_keeps_its_video(world, monkeypatch):
    once(world.store, "complete", monkeypatch, StoreError("the answer is lost"))
    job = await world.ended(await world.add())
    await world.idle()
    assert (job.status, world.files()) == ("completed", [job.content])


async def test_settling_twice_changes_nothing_more(world):
    world.go.clear()
    await world.dispatcher.close()
    id = await world.add()
    for _ in range(2):
        await world.store.claim("t", 60, 60)
        assert await world.store.release(id, "t", 0, counted=False)
        assert await world.store.release(id, "t", 0, counted=False)
    claimed = await world.store.claim("u", 60, 60)
    assert claimed.attempts == 1
    assert await world.store.release(id, "t", 0, counted=False) is False
    assert await world.store.fail(id, "u", "c", "m", 60)
    assert await world.store.fail(id, "u", "c", "m", 60)
    assert await world.store.complete(id, "u", "x", 1, "e", 60) is False
    assert (await world.job(id)).status == "failed"
    world.dispatcher.start()


async def test_who_takes_over_removes_others_files_only_when_its_own_is_named(world):
    await world.dispatcher.close()
    world.go.clear()
    id = await world.add()
    await world.store.claim("silent", -1, 60)
    await world.content.write(f"{id}/silent.mp4", b"of another")
    world.dispatcher.start()
    await until(lambda: world.making)
    assert world.files() == [f"{id}/silent.mp4"]
    world.go.set()
    job = await world.ended(id)
    await world.idle()
    assert world.files() == [job.content]


@pytest.mark.parametrize("left", [60, -1])
async def test_a_job_that_fails_leaves_no_video_of_an_earlier_dispatcher(world, monkeypatch, left):
    await world.dispatcher.close()
    world.error = Failed("server_error", "no")
    id = await world.add()
    await world.store.claim("silent", -1, 60)
    await world.content.write(f"{id}/silent.mp4", b"of another")
    await world.store._changes(update(videos).where(videos.c.id == id).values(created=time.time() - 7200 + left))
    world.dispatcher.start()
    assert (await world.ended(id)).status == "failed"
    await until(lambda: not world.files())


async def test_a_job_that_is_removed_while_its_video_is_written_leaves_not_even_a_directory(world):
    world.go.clear()
    id = await world.add()
    await until(lambda: world.making)
    await world.store.forget(id)
    world.go.set()
    await world.idle()
    assert list(world.root.iterdir()) == []


async def test_where_the_store_is_is_nobodys_business(world, monkeypatch):
    monkeypatch.setattr(world.dispatcher, "_settings", GatewaySettings(attempts=1))

    def write(path: str, data: bytes) -> None:
        raise OSError(28, "No space left on device", f"/srv/{path}")

    monkeypatch.setattr(world.content, "_write", write)
    assert (await world.ended(await world.add())).error == "the video was lost 1 times: the video cannot be stored"


async def test_a_store_that_fails_for_a_moment_costs_a_write_and_not_a_video(world, monkeypatch):
    write, failures = world.content._write, iter(range(3))

    def sometimes(path: str, data: bytes) -> Stored:
        if next(failures, None) is not None:
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(world.content, "_write", sometimes)
    assert (await world.ended(await world.add())).status == "completed"
    assert world.making == 1


async def test_a_dispatcher_that_takes_over_its_own_job_keeps_track_of_both(world):
    world.go.clear()
    id = await world.add()
    await until(lambda: world.making == 1)
    await world.store._changes(update(videos).where(videos.c.id == id).values(claimed_until=0))
    world.dispatcher.wake()
    await until(lambda: world.making == 2)
    assert len(world.dispatcher._works) == 2
    world.go.set()
    job = await world.ended(id)
    await world.idle()
    assert (job.status, world.files()) == ("completed", [job.content])


async def test_no_text_of_the_frontend_keeps_a_job_from_failing(world):
    world.error = Failed("x" * 100, "bad \0 and \ud800" + "y" * 3000)
    job = await world.ended(await world.add())
    assert job.error.startswith("bad ? and ?yyy")
    assert (len(job.error), len(job.error_code)) == (2000, 64)


async def test_what_the_database_refuses_for_good_fails_the_job(world, monkeypatch):
    once(world.store, "complete", monkeypatch, Refused("22021"), before=True)
    job = await world.ended(await world.add())
    assert (job.status, job.error) == ("failed", "the gateway failed: the database does not take the outcome")


async def test_one_directory_that_cannot_be_removed_stops_no_other(world, monkeypatch):
    ids = sorted([await world.add() for _ in range(3)])
    for id in ids:
        await world.ended(id)
    await world.idle()
    real = world.content._remove

    def remove(path: str) -> None:
        if path == ids[0]:
            raise OSError("busy")
        real(path)

    monkeypatch.setattr(world.content, "_remove", remove)
    for id in ids:
        await world.store.mark_deleted(id)
    world.dispatcher.stop_deleted(ids[0])
    await until(lambda: len(world.files()) == 1)
    assert world.files()[0].startswith(ids[0])


@pytest.mark.parametrize(
    "event",
    [b"[1]", b"null", b'"text"', b'{"progress": 1e400}', b'{"progress": []}', b"[" * 100_000, b'{"data": [3]}', b"{"],
)
async def test_what_is_no_answer_is_a_lost_job(event):
    with pytest.raises(Lost):
        await upstream(lambda _: httpx.Response(200, content=b"data: " + event + b"\n\n")).make({}, lambda _: None)


def upstream(answer: Callable[[httpx.Request], httpx.Response]) -> Upstream:
    made = Upstream("http://frontend")
    made._http = httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://frontend")
    return made


async def test_nonsense_at_every_other_place_is_no_fault_of_the_gateway():
    bad = upstream(lambda _: httpx.Response(503, content=b"[" * 100_000))
    with pytest.raises(Lost):
        await bad.make({}, lambda _: None)
    bad = upstream(lambda _: httpx.Response(200, headers={"content-encoding": "gzip"}, stream=Bytes(b"garbage")))
    with pytest.raises(Lost):
        await bad.make({}, lambda _: None)


async def test_workers_are_asked_all_at_once_and_who_does_not_answer_is_left_out():
    workers, asked = ("http://a", "http://b", "http://c"), set()
    all_asked = asyncio.Event()

    async def answer(request: httpx.Request) -> httpx.Response:
        asked.add(request.url.host)
        if len(asked) == len(workers):
            all_asked.set()
        await all_asked.wait()
        return httpx.Response(200, content=b"[" if request.url.host == "b" else b'{"model": "m"}')

    made = Upstream("http://frontend", workers)
    made._http = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    async with asyncio.timeout(20):
        assert await made.statuses() == [{"model": "m"}] * 2


class Bytes(httpx.AsyncByteStream):
    """One piece, and then perhaps an error."""

    def __init__(self, piece: bytes, error: Exception | None = None) -> None:
        self.piece, self.error = piece, error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self.piece
        if self.error is not None:
            raise self.error


async def test_half_an_answer_passed_on_does_not_look_whole():
    answer = httpx.Response(200, stream=Bytes(b'{"id":', httpx.ReadError("gone")))
    pieces = passing._pieces(answer, contextlib.AsyncExitStack())
    assert await anext(pieces) == b'{"id":'
    with pytest.raises(httpx.ReadError):
        await anext(pieces)


async def test_a_still_is_made_once_and_is_whole_or_not_there(tmp_path, monkeypatch):
    content = Content(f"file://{tmp_path}")
    pictures = Stills(content)
    await content.write("v/t.mp4", mp4())
    (tmp_path / "v" / "thumbnail.webp").touch()  # as an earlier crash left it
    real, made = pictures._make, []
    monkeypatch.setattr(pictures, "_make", lambda *args: made.append(args) or real(*args))
    answers = await asyncio.gather(*(pictures.of("v/t.mp4", "thumbnail") for _ in range(10)))
    assert len(made) == len(set(answers)) == 1
    path, size = answers[0]
    assert (tmp_path / path).stat().st_size == size > 0

    def full(_: int) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            await pictures.of("v/t.mp4", "spritesheet")
    assert sorted(file.name for file in (tmp_path / "v").iterdir()) == ["t.mp4", "thumbnail.webp"]


async def test_a_still_of_a_video_that_is_removed_meanwhile_leaves_no_file(tmp_path, monkeypatch):
    content = Content(f"file://{tmp_path}")
    pictures = Stills(content)
    await content.write("v/t.mp4", mp4())
    real = pictures._make

    def make(*args: Any) -> bytes:
        data = real(*args)
        content._remove("v")
        return data

    monkeypatch.setattr(pictures, "_make", make)
    with pytest.raises(FileNotFoundError):
        await pictures.of("v/t.mp4", "thumbnail")
    assert list(tmp_path.iterdir()) == []


async def test_a_file_that_hangs_is_given_up_and_holds_nobody_else_up(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "READ_TIMEOUT", 0.2)
    content = Content(f"file://{tmp_path}")
    await content.write("b/t.mp4", b"fine")
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / "t.mp4")
    with pytest.raises(TimeoutError, match="no answer"):
        await content.read("a/t.mp4", 0, 1)
    for _ in range(2 * contents.THREADS):
        with pytest.raises(TimeoutError, match="still hangs"):
            await content.read("a/t.mp4", 0, 1)
    monkeypatch.setattr(contents, "READ_TIMEOUT", 20)
    assert [piece async for piece in await content.read("b/t.mp4", 0, 4)] == [b"fine"]
    with (tmp_path / "a" / "t.mp4").open("wb"):  # it answers at last
        await until(lambda: not content._threads._hung)


def test_a_call_that_hangs_does_not_keep_the_process(tmp_path):
    program = (
        "import asyncio, threading\n"
        "from ltx2_pool.gateway.threads import Threads\n"
        "async def main():\n"
        "    await Threads(1).run(0.1, 'x', threading.Event().wait)\n"
        "asyncio.run(main())\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert ended.stderr.splitlines()[-1] == "TimeoutError: x: no answer for 0.1 s"


async def test_a_read_that_hangs_is_an_error_for_those_who_wait_and_no_others(monkeypatch):
    monkeypatch.setattr(news, "READ_TIMEOUT", 0.1)
    hanging = True

    class Hanging:
        async def get_many(self, ids: list[str]) -> dict[str, Job]:
            if hanging:
                await asyncio.Event().wait()
            return {}

    reader = Reader(Hanging())
    with pytest.raises(StoreError):
        await reader.get("a")
    hanging = False
    assert await reader.get("a") is None
