"""The jobs in both databases: claims, turns, limits, and what a dispatcher may not do any more."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import time
import traceback
import uuid
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import text

from ltx2_pool.gateway import store as stores
from ltx2_pool.gateway.jobs import Job, new_id
from ltx2_pool.gateway.store import Conflict, Full, Store, StoreError

JOB = Job("", "a", "queued", 0, "m", "p", "64x64", "5", time.time())


@pytest.fixture(params=["sqlite", "postgresql"])
async def store(request, tmp_path) -> AsyncIterator[Store]:
    url = f"sqlite+aiosqlite:///{tmp_path}/jobs"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgresql")
    opened = Store(url)
    await opened.open()
    yield opened
    await opened.close()


async def add(store: Store, owner: str = "a", **options: object) -> str:
    job = dataclasses.replace(JOB, id=new_id(), owner=owner)
    limits = {"max_queue": 1000, "max_active": 1000, **options}
    stored, _ = await store.add(job, {"prompt": "p"}, **limits)
    return stored.id


async def test_each_job_is_claimed_once_however_many_ask(store):
    ids = {await add(store) for _ in range(20)}

    async def claim() -> list[str]:
        found = []
        while job := await store.claim(uuid.uuid4().hex, 60, 60):
            found.append(job.id)
        return found

    claimed = [id for found in await asyncio.gather(*(claim() for _ in range(6))) for id in found]
    assert sorted(claimed) == sorted(ids)


async def test_whoever_is_cancelled_in_the_middle_of_a_change_locks_nobody_out(store):
    """SQLite is locked until the rows of a change are read."""
    for number in range(60):
        await add(store)
        for change in (store.claim("t", 60, 60), add(store), store.overdue(0, 60)):
            cancelled = asyncio.create_task(change)
            await asyncio.sleep(number * 0.00005)
            cancelled.cancel()
            await asyncio.wait({cancelled})
    assert await store.mark_deleted(await add(store))


async def test_what_fails_after_its_caller_is_gone_says_nothing_and_nothing_says_a_prompt(store, caplog):
    fails = text("SELECT :prompt FROM nowhere").bindparams(prompt=" ".join(("a", "secret", "fox")))
    gone = asyncio.create_task(store._rows(fails))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.wait({gone})
    while store._begun:
        await asyncio.wait(store._begun)
    gc.collect()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    with pytest.raises(StoreError) as failed:
        await store._rows(fails)
    assert "nowhere" in str(failed.value)
    assert "secret fox" not in "".join(traceback.format_exception(failed.value))


async def test_progress_does_not_go_back_when_a_slow_beat_comes_late(store):
    id = await add(store)
    await store.claim("t", 60, 60)
    for progress, told in ((40, 40), (90, 90), (40, 90)):
        assert await store.beat(id, "t", 60, progress)
        assert (await store.get_many([id]))[id].progress == told


async def test_as_many_jobs_are_read_at_once_as_clients_ask_for(store):
    id = await add(store)
    assert set(await store.get_many([*map(str, range(40_000)), id])) == {id}


async def test_owners_take_turns(store):
    a = [await add(store, "a") for _ in range(3)]
    b = [await add(store, "b") for _ in range(2)]
    order = [(await store.claim("t", 60, 60)).id for _ in range(5)]
    assert order == [a[0], b[0], a[1], b[1], a[2]]


async def test_a_claim_that_ran_out_is_taken_over_and_its_holder_changes_nothing(store):
    id = await add(store)
    await store.claim("first", -1, 60)
    again = await store.claim("second", 60, 60)
    assert (again.id, again.attempts, again.taken_over) == (id, 2, True)
    for late in (
        store.beat(id, "first", 60, 50),
        store.complete(id, "first", "x", 1, "e", 60),
        store.fail(id, "first", "c", "m", 60),
        store.release(id, "first", 0, counted=True),
    ):
        assert await late is False
    assert await store.complete(id, "second", "x", 1, "e", 60)
    assert (await store.get_many([id]))[id].content == "x"
    assert await store.complete(id, "second", "y", 1, "e", 60) is False  # once


async def test_a_release_that_is_not_counted_gives_the_attempt_back(store):
    id = await add(store)
    for counted, attempts in ((False, 1), (True, 1), (True, 2), (False, 3), (True, 3)):
        claimed = await store.claim("t", 60, 60)
        assert claimed.attempts == attempts
        assert await store.release(id, "t", 0, counted=counted)
    await store.claim("t", 60, 60)
    await store.release(id, "t", 60, counted=True)
    assert await store.claim("t", 60, 60) is None  # not before a minute has passed


async def test_limits_and_idempotency_in_one_statement(store):
    await add(store, max_active=1)
    with pytest.raises(Full, match="key_queue_full"):
        await add(store, max_active=1)
    await add(store, "b", max_active=1)
    with pytest.raises(Full, match=r"^queue_full"):
        await add(store, "c", max_queue=2)
    ids = await asyncio.gather(*(add(store, idempotency_key="k", fingerprint="f") for _ in range(5)))
    assert len(set(ids)) == 1
    assert await add(store, max_queue=1, idempotency_key="k", fingerprint="f") == ids[0]  # full, and known all the same
    with pytest.raises(Conflict):
        await add(store, idempotency_key="k", fingerprint="other")
    assert await store.mark_deleted(ids[0])
    assert await add(store, idempotency_key="k", fingerprint="f") != ids[0]


async def test_a_deleted_job_is_hidden_at_once_and_forgotten_when_nobody_works_on_it(store):
    id = await add(store)
    await store.claim("t", 60, 60)
    assert await store.mark_deleted(id)
    assert await store.mark_deleted(id) is False
    assert await store.get_many([id]) == {}
    assert await store.listed("a", after=None, limit=9, newest_first=True) == []
    assert await store.remains() == []  # it is in work
    assert await store.beat(id, "t", 60, 1) is False
    assert await store.complete(id, "t", "x", 1, "e", 60) is False
    await store.give_back(id, "t")
    assert await store.remains() == [(id, False)]
    assert await store.claim("t", 60, 60) is None
    assert await store.forget(id)
    assert await store.remains() == []


async def test_what_is_late_fails_and_what_is_old_goes(store):
    works = await add(store)
    await store.claim("t", 60, 60)
    silent = await add(store)
    await store.claim("t", -1, 60)
    waits = await add(store)
    assert set(await store.overdue(-1, -1)) == {silent, waits}
    assert sorted(await store.remains()) == sorted([(silent, True), (waits, True)])
    assert (await store.get_many([works]))[works].status == "in_progress"
    assert await store.counts() == {"in_progress": 1, "failed": 2}


async def test_a_statement_that_hangs_is_a_store_error_and_the_next_one_works(postgresql, monkeypatch):
    store = Store(postgresql)
    await store.open()
    with monkeypatch.context() as patch:
        patch.setattr(stores, "TIMEOUT", 0.3)
        for _ in range(5):  # more than there are connections
            with pytest.raises(StoreError):
                await store._rows(text("SELECT pg_sleep(30)"))
    assert await store._rows(text("SELECT 1")) == [(1,)]
    await store.close()


async def test_values_that_a_database_never_takes_are_told_from_a_database_that_fails(store):
    await add(store)
    with pytest.raises(stores.Refused):
        await add(store, "\ud800" if store._sqlite else "nul \0")


async def test_a_database_that_is_gone_is_a_store_error(tmp_path):
    broken = Store(f"sqlite+aiosqlite:///{tmp_path}/no/such/directory")
    with pytest.raises(StoreError):
        await broken.open()
    await broken.close()
