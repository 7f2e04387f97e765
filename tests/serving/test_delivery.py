"""From the file that a child left to what the client gets; and what a child may not leave."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import threading

import pytest

from ltx2_pool.serving import delivery
from ltx2_pool.serving.delivery import Deliverer, DeliveryTimeout, MediaStore, discard, take
from ltx2_pool.serving.threads import Lane
from tests.serving.made_up import CONTENT, HangingFileSystem, until


@pytest.fixture
def left(tmp_path):
    path = tmp_path / "job.mp4"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def hanging():
    HangingFileSystem.start_again()
    yield HangingFileSystem
    HangingFileSystem.let_go.set()


def test_a_plain_file_is_read_and_gone(left):
    assert take(left) == CONTENT
    assert not left.exists()


def _link(path):
    secret = path.with_name("secret")
    secret.write_text("of the worker")
    path.symlink_to(secret)


def _hard_link(path):
    _link(path)
    path.unlink()
    path.hardlink_to(path.with_name("secret"))


def _sparse(path):
    with path.open("wb") as file:
        file.truncate(delivery.MAX_BYTES + 1)


@pytest.mark.parametrize(
    ("leave", "words"),
    [
        (_link, "symbolic links"),
        (_hard_link, "has 2 links"),
        (os.mkfifo, "is not a regular file"),
        (lambda path: path.touch(), "is empty"),
        (_sparse, "more than 2147483648"),
        (lambda path: None, "No such file"),
    ],
)
def test_what_is_no_video_of_ours_is_not_delivered_and_not_left(tmp_path, leave, words):
    path = tmp_path / "job.mp4"
    leave(path)
    with pytest.raises(OSError, match=words):
        take(path)
    assert not os.path.lexists(path)


def test_a_file_of_another_user_is_not_delivered(left, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: left.stat().st_uid + 1)
    with pytest.raises(OSError, match="belongs to uid"):
        take(left)
    assert not left.exists()


def test_a_directory_is_said_to_be_left(tmp_path, caplog):
    path = tmp_path / "job.mp4"
    path.mkdir()
    with pytest.raises(OSError, match="not a regular file"):
        take(path)
    assert "left behind" in caplog.text
    discard(path.with_name("nothing"))


async def test_base64(left):
    where, size = await Deliverer(None, 10).deliver(left, "name", as_url=False)
    assert (base64.b64decode(where["b64_json"]), size) == (CONTENT, len(CONTENT))
    assert not left.exists()


async def test_a_url_and_a_file_that_others_may_read(left, tmp_path):
    left.chmod(0o600)
    store = MediaStore(f"file://{tmp_path}/media", "http://media.example/v/")
    umask = os.umask(0o077)  # as the worker's
    try:
        where, _ = await Deliverer(store, 10).deliver(left, "name", as_url=True)
    finally:
        os.umask(umask)
    assert where == {"url": "http://media.example/v/videos/name.mp4"}
    stored = tmp_path / "media/videos/name.mp4"
    assert stored.read_bytes() == CONTENT
    assert (stored.stat().st_mode & 0o777, stored.parent.stat().st_mode & 0o777) == (0o644, 0o755)
    assert not left.exists()


async def test_a_store_that_hangs_delays_nobody_else(tmp_path, hanging, monkeypatch):
    monkeypatch.setattr(delivery, "UPLOADS", 2)
    deliverer = Deliverer(MediaStore("hanging://media", None), 0.3)
    paths = [tmp_path / str(number) for number in range(4)]
    for path in paths:
        path.write_bytes(CONTENT)
    uploads = [asyncio.create_task(deliverer.deliver(path, path.name, as_url=True)) for path in paths[:3]]
    await until(lambda: hanging.waiting == 2)
    where, _ = await deliverer.deliver(paths[3], "b64", as_url=False)
    assert where["b64_json"]
    for upload in uploads:  # two that hang, and one that got no place
        with pytest.raises(DeliveryTimeout, match=r"in 0\.3 s"):
            await upload
    assert not any(path.exists() for path in paths)
    assert hanging.waiting == 2
    hanging.let_go.set()
    await until(lambda: not any(thread.name == "upload-video" for thread in threading.enumerate()))
    assert hanging.stored == {}  # the clients were told that it failed


async def test_a_hanging_call_keeps_its_place_when_nobody_waits_for_it():
    lane, gate = Lane("test", 1), threading.Event()
    first = asyncio.create_task(lane.run(gate.wait))
    await until(lambda: any(thread.name == "test" for thread in threading.enumerate()))
    first.cancel()
    await asyncio.wait({first})
    second = asyncio.create_task(lane.run(lambda: "in"))
    done, _ = await asyncio.wait({second}, timeout=0.05)
    assert not done
    gate.set()
    assert await second == "in"


async def test_a_thread_that_cannot_be_started_is_an_error_and_takes_no_place(monkeypatch):
    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    lane = Lane("test", 1)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(OSError, match="no thread"):
            await lane.run(lambda: None)
    assert await lane.run(lambda: 3) == 3


async def test_the_file_is_gone_when_the_delivery_is_cancelled(left, hanging):
    task = asyncio.create_task(Deliverer(MediaStore("hanging://media", None), 10).deliver(left, "x", as_url=True))
    await until(lambda: hanging.waiting)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert not left.exists()
