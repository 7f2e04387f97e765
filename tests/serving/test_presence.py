"""A worker that fell out of discovery gets back, or says that it cannot."""

from __future__ import annotations

import asyncio

import pytest

from ltx2_pool.serving import presence as presence_module
from ltx2_pool.serving.presence import Absent, DynamoDirectory, Presence
from tests.serving.made_up import Endpoint, until


class Directory:
    """Discovery with a memory of what was asked of it."""

    def __init__(self, *looks: bool | Exception) -> None:
        self.looks = list(looks)
        self.listing = True
        self.refuses = False
        self.did: list[str] = []

    async def listed(self) -> bool:
        self.did.append("look")
        look = self.looks.pop(0) if self.looks else self.listing
        if isinstance(look, Exception):
            raise look
        return look

    async def enter(self) -> None:
        self.did.append("enter")
        if self.refuses:
            raise OSError("Too many open files")
        self.listing = True

    async def leave(self) -> None:
        self.did.append("leave")
        if self.refuses:
            raise OSError("the store is away")
        self.listing = False


async def kept(directory: Directory, condition, **options) -> None:
    task = asyncio.create_task(Presence(directory, interval=0.001, **options).keep())
    await until(lambda: condition() or task.done())
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.result()


async def test_one_miss_is_not_an_absence():
    directory = Directory(False, True, False, True, OSError("no descriptor"), False, True)
    await kept(directory, lambda: len(directory.did) > 9, misses=2)
    assert "enter" not in directory.did


async def test_misses_in_a_row_are_answered_by_registering_again(caplog):
    directory = Directory(True)
    directory.listing = False
    await kept(directory, lambda: directory.did.count("look") > 5, misses=3)
    assert directory.did[:6] == ["look", "look", "look", "look", "enter", "look"]
    assert directory.did.count("enter") == 1
    assert "not in discovery" in caplog.text
    assert "in discovery again" in caplog.text


async def test_it_tries_on_while_registering_fails():
    directory = Directory()
    directory.listing, directory.refuses = False, True
    task = asyncio.create_task(Presence(directory, interval=0.001, give_up=1).keep())
    await until(lambda: directory.did.count("enter") > 3)
    directory.refuses = False
    await until(lambda: directory.listing)
    assert not task.done()
    task.cancel()
    await asyncio.wait({task})


async def test_it_gives_up_when_registering_does_not_help():
    directory = Directory()
    directory.listing, directory.refuses = False, True
    with pytest.raises(Absent, match="did not help 5 times"):
        await kept(directory, lambda: False, give_up=0.005)
    assert directory.did.count("enter") == 5


async def test_discovery_that_does_not_answer_costs_a_try_and_no_more(monkeypatch):
    monkeypatch.setattr(presence_module, "ANSWER_TIMEOUT", 0.01)

    class Hanging(Directory):
        async def enter(self) -> None:
            self.did.append("enter")
            await asyncio.Event().wait()

    directory = Hanging()
    directory.listing = False
    presence = Presence(directory, interval=0.001, give_up=0.01)
    keeping = asyncio.create_task(presence.keep())
    await until(lambda: directory.did.count("enter") >= 2)
    async with asyncio.timeout(5):
        await presence.want(False)
        assert directory.did.count("leave") == 1
        await presence.want(True)
        with pytest.raises(Absent):
            await keeping


async def test_not_to_be_able_to_look_is_not_an_absence():
    directory = Directory(*[OSError("Too many open files")] * 50)
    await kept(directory, lambda: len(directory.did) > 55)
    assert set(directory.did) == {"look"}


async def test_who_has_left_stays_out_and_is_not_missed():
    directory = Directory()
    presence = Presence(directory, interval=0.001, give_up=0.002)
    task = asyncio.create_task(presence.keep())
    await presence.want(False)
    await until(lambda: directory.did.count("look") > 20)
    assert "enter" not in directory.did
    directory.listing = True  # somebody's late registration
    await until(lambda: not directory.listing)
    directory.refuses, directory.listing = True, True
    await until(lambda: directory.did.count("leave") > 10)
    assert not task.done()  # a worker that cannot leave is no reason to end it
    await presence.want(True)
    task.cancel()
    await asyncio.wait({task})


async def test_the_model_is_registered_along_with_the_instance(monkeypatch):
    monkeypatch.setattr(presence_module, "_LOOK", 0.01)
    endpoint, models = Endpoint(), []

    async def register_model() -> None:
        models.append("card")

    directory = DynamoDirectory(endpoint, register_model)
    assert not await directory.listed()
    await directory.enter()
    assert await directory.listed()
    assert (endpoint.entered, models) == (1, ["card"])
    await directory.leave()
    assert not await directory.listed()


async def test_an_old_watch_serves_when_there_is_no_descriptor_for_another(monkeypatch):
    monkeypatch.setattr(presence_module, "_LOOK", 0.01)
    endpoint = Endpoint()
    directory = DynamoDirectory(endpoint, lambda: asyncio.sleep(0))
    assert not await directory.listed()

    async def refuse() -> None:
        raise OSError("Too many open files")

    endpoint.client = refuse
    assert not await directory.listed()
    endpoint.listed = True
    assert await directory.listed()
    with pytest.raises(OSError, match="Too many"):
        await DynamoDirectory(endpoint, lambda: asyncio.sleep(0)).listed()


async def test_a_pod_that_is_not_ready_is_no_reason_to_end_it():
    directory = Directory()
    directory.listing, directory.refuses = False, True
    await kept(directory, lambda: directory.did.count("enter") > 50, give_up=presence_module.math.inf)
    assert presence_module.presence(directory, "kubernetes")._tries == presence_module.math.inf
    assert presence_module.presence(directory, "etcd")._tries == 24
