"""The jobs, in SQLite or PostgreSQL: every change is one statement that holds by itself, whoever dies around it.

A job is *claimed* by one dispatcher, with a token and until a moment that its heartbeat moves on. Whatever a dispatcher
does to a job names the token: one who was silent for too long, and has lost its job to another, changes nothing.
The moments are those of the database's clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    ColumnElement,
    CursorResult,
    Double,
    ScalarSelect,
    and_,
    case,
    delete,
    event,
    func,
    literal,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from ltx2_pool.gateway.jobs import Claimed, Job, storable
from ltx2_pool.gateway.tables import metadata, videos

T = TypeVar("T")

_SEEN = [videos.c[field.name] for field in fields(Job)]
_ACTIVE = ("queued", "in_progress")
CONNECT_TIMEOUT = 5.0
TIMEOUT = 12.0
"""Seconds for one statement; longer than SQLite waits for another's lock. A connection that is silent is dropped."""
IDS_AT_ONCE = 10_000
"""In one statement: PostgreSQL takes 32767 values, and many clients with many jobs each ask at once."""


class StoreError(Exception):
    """The database does not answer, or not as it should."""


class Refused(StoreError):
    """The database does not take these values, and never will."""


class Conflict(Exception):
    """The Idempotency-Key was used before, with another request."""


class Full(Exception):
    """No more jobs may wait: in all (``queue_full``), or of this owner (``key_queue_full``)."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class Store:
    """All jobs. Every method raises StoreError when the database fails."""

    def __init__(self, url: str) -> None:
        self._sqlite = url.startswith("sqlite")
        self._engine: AsyncEngine = create_async_engine(
            url,
            isolation_level="AUTOCOMMIT",
            pool_size=4,
            max_overflow=0,
            pool_pre_ping=not self._sqlite,
            hide_parameters=True,  # prompts are nothing for a log
            connect_args={} if self._sqlite else {"timeout": CONNECT_TIMEOUT},
        )
        self._begun: set[asyncio.Task[Any]] = set()
        if self._sqlite:
            event.listen(self._engine.sync_engine, "connect", _durable)
        self._now: ColumnElement[float] = literal_column(
            "(julianday('now') - 2440587.5) * 86400.0"
            if self._sqlite
            else "extract(epoch from clock_timestamp())::float8",
            Double,
        )

    async def open(self) -> None:
        """Make the tables that are not there."""
        if self._sqlite and not (file := Path(self._engine.url.database or "")).parent.is_dir():
            raise StoreError(f"{file} cannot be made: {file.parent} is no directory")
        with _failing():
            async with self._engine.begin() as connection:
                if not self._sqlite:  # two gateways that start at once
                    await connection.exec_driver_sql("SELECT pg_advisory_lock(4207843)")
                try:
                    await connection.run_sync(metadata.create_all)
                finally:
                    if not self._sqlite:
                        await connection.exec_driver_sql("SELECT pg_advisory_unlock(4207843)")

    async def close(self) -> None:
        while self._begun:
            await asyncio.wait(self._begun)
        await self._engine.dispose()

    async def add(
        self,
        job: Job,
        body: dict[str, Any],
        *,
        max_queue: int,
        max_active: int,
        idempotency_key: str | None = None,
        fingerprint: str = "",
    ) -> tuple[Job, bool]:
        """Accept a job: what is stored, and whether it is new.

        Raises Conflict, Full. Jobs that come in at one moment through several gateways may pass a limit by as many.
        """
        insert = sqlite.insert if self._sqlite else postgresql.insert
        row: dict[str, Any] = {
            **{column.name: getattr(job, column.name) for column in _SEEN},
            "created": self._now,
            "body": json.dumps(body),
            "attempts": 0,
            "not_before": self._now,
            "deleted": False,
            "idempotency_key": idempotency_key,
            "fingerprint": fingerprint,
        }
        columns = [videos.c[name] for name in row]
        values = [v if isinstance(v, ColumnElement) else literal(v, videos.c[n].type) for n, v in row.items()]
        room = and_(_count(videos.c.status == "queued") < max_queue, _count(_active_of(job.owner)) < max_active)
        statement = insert(videos).from_select(columns, select(*values).where(room)).on_conflict_do_nothing()
        (new,) = await self._rows(statement.returning(*_SEEN)) or [None]
        if new is not None:
            return _job(new), True
        if idempotency_key and (found := await self.known(job.owner, idempotency_key, fingerprint)):
            return found, False
        mine = await self._rows(select(_count(_active_of(job.owner))))
        raise Full("key_queue_full" if mine[0][0] >= max_active else "queue_full")

    async def known(self, owner: str, idempotency_key: str, fingerprint: str) -> Job | None:
        """The job that this key was used for. Raises Conflict."""
        same = and_(videos.c.owner == owner, videos.c.idempotency_key == idempotency_key)
        for found in await self._rows(select(*_SEEN, videos.c.fingerprint).where(same)):
            if found.fingerprint != fingerprint:
                raise Conflict
            return _job(found)
        return None

    async def get_many(self, ids: Sequence[str]) -> dict[str, Job]:
        """Those that exist, by id."""
        found: dict[str, Job] = {}
        for start in range(0, len(ids), IDS_AT_ONCE):
            some = ids[start : start + IDS_AT_ONCE]
            rows = await self._rows(select(*_SEEN).where(videos.c.id.in_(some), ~videos.c.deleted))
            found |= {row.id: _job(row) for row in rows}
        return found

    async def body(self, id: str) -> dict[str, Any] | None:
        """The request of a job."""
        for row in await self._rows(select(videos.c.body).where(videos.c.id == id, ~videos.c.deleted)):
            body: dict[str, Any] = json.loads(row.body)
            return body
        return None

    async def listed(self, owner: str, *, after: str | None, limit: int, newest_first: bool) -> list[Job]:
        """An owner's jobs by id, which is by age: those after an id, whether or not that job is there still."""
        query = select(*_SEEN).where(videos.c.owner == owner, ~videos.c.deleted).limit(limit)
        if after is not None:
            query = query.where(videos.c.id < after if newest_first else videos.c.id > after)
        rows = await self._rows(query.order_by(videos.c.id.desc() if newest_first else videos.c.id.asc()))
        return [_job(row) for row in rows]

    async def counts(self) -> dict[str, int]:
        """How many jobs there are, by status."""
        query = select(videos.c.status, func.count()).where(~videos.c.deleted).group_by(videos.c.status)
        return {row[0]: row[1] for row in await self._rows(query)}

    async def claim(self, token: str, seconds: float, job_timeout: float) -> Claimed | None:
        """Take the job whose turn it is; None when none is to be had.

        Owners take turns: the owner with the fewest jobs in work comes first, then the oldest job.
        """
        other = videos.alias("other")
        in_work = (
            select(func.count())
            .where(other.c.owner == videos.c.owner, other.c.status == "in_progress")
            .correlate(videos)
            .scalar_subquery()
        )
        due = and_(videos.c.status == "queued", videos.c.not_before <= self._now)
        silent = and_(videos.c.status == "in_progress", videos.c.claimed_until < self._now)
        next_one = (
            select(videos.c.id)
            .where(or_(due, silent), ~videos.c.deleted)
            .order_by(in_work, videos.c.created, videos.c.id)
            .limit(1)
        )
        if not self._sqlite:
            next_one = next_one.with_for_update(skip_locked=True, of=videos)
        statement = (
            update(videos)
            .where(videos.c.id == next_one.scalar_subquery())
            .values(
                status="in_progress",
                progress=0,
                attempts=videos.c.attempts + 1,
                claim=token,
                claimed_until=self._now + seconds,
                started=func.coalesce(videos.c.started, self._now),
            )
            .returning(
                videos.c.id,
                videos.c.owner,
                videos.c.body,
                videos.c.created,
                videos.c.attempts,
                (videos.c.created + job_timeout - self._now).label("left"),
            )
        )
        for row in await self._rows(statement):
            return Claimed(
                row.id, row.owner, json.loads(row.body), row.created, row.attempts, row.attempts > 1, float(row.left)
            )
        return None

    async def beat(self, id: str, token: str, seconds: float, progress: int) -> bool:
        """Renew a claim; False when the job is no longer ours to make: another has it, or its client deleted it.

        One that was slow may come after a later one: progress does not go back.
        """
        furthest = case((videos.c.progress > progress, videos.c.progress), else_=progress)
        return await self._own(id, token, claimed_until=self._now + seconds, progress=furthest)

    async def complete(self, id: str, token: str, content: str, size: int, etag: str, retention: float) -> bool:
        """The video is in the content store; False when the job was no longer ours.

        This, :meth:`fail` and :meth:`release` may be called again when the answer to a first call was lost: the row
        keeps the token until another dispatcher claims it.
        """
        made = {"status": "completed", "progress": 100, "content": content, "bytes": size, "etag": etag}
        return await self._own(id, token, videos.c.content == content, **made, **self._end(retention))

    async def fail(self, id: str, token: str, code: str, message: str, retention: float) -> bool:
        """The job ends without a video; False when it was no longer ours."""
        failed = {"status": "failed", "error_code": storable(code, 64), "error": storable(message, 2000)}
        return await self._own(id, token, videos.c.status == "failed", **failed, **self._end(retention))

    async def release(self, id: str, token: str, after: float, counted: bool) -> bool:
        """Put a job back into the queue, to be claimed again `after` seconds; False when it was no longer ours."""
        in_work = videos.c.status == "in_progress"
        attempts = videos.c.attempts if counted else videos.c.attempts - case((in_work, 1), else_=0)
        back = {"status": "queued", "progress": 0, "not_before": self._now + after, "attempts": attempts}
        return await self._own(id, token, videos.c.status == "queued", **back, claimed_until=None)

    async def give_back(self, id: str, token: str) -> None:
        """Let go of a job that was deleted meanwhile."""
        mine = and_(videos.c.id == id, videos.c.claim == token, videos.c.status == "in_progress")
        await self._changes(update(videos).where(mine).values(claimed_until=self._now - 1))

    async def mark_deleted(self, id: str) -> bool:
        """Hide a job at once; False when there is none. What is left of it is for :meth:`remains`."""
        statement = update(videos).where(videos.c.id == id, ~videos.c.deleted)
        return await self._changes(statement.values(deleted=True, idempotency_key=None))

    async def overdue(self, job_timeout: float, retention: float) -> list[str]:
        """Fail the jobs that waited past their deadline, and those in work whose dispatcher has fallen silent too."""
        queued = videos.c.status == "queued"
        silent = and_(videos.c.status == "in_progress", videos.c.claimed_until < self._now)
        late = and_(or_(queued, silent), videos.c.created + job_timeout < self._now, ~videos.c.deleted)
        failed = {"status": "failed", "error_code": "timeout", "error": "the video was not made in time"}
        statement = (
            update(videos).where(late).values(**failed, **self._end(retention), claim=None).returning(videos.c.id)
        )
        return [row.id for row in await self._rows(statement)]

    async def remains(self, limit: int = 100, skip: Sequence[str] = ()) -> list[tuple[str, bool]]:
        """Jobs whose content and row are to be removed: deleted or expired (True), and nobody works on them."""
        expired = and_(videos.c.expires < self._now, ~videos.c.deleted)
        idle = or_(videos.c.status != "in_progress", videos.c.claimed_until < self._now)
        query = select(videos.c.id, videos.c.deleted).where(or_(videos.c.deleted, expired), idle)
        rows = await self._rows(query.where(videos.c.id.not_in(skip)).limit(limit))
        return [(row.id, not row.deleted) for row in rows]

    async def forget(self, id: str) -> bool:
        """Remove a row whose content is gone."""
        return await self._changes(delete(videos).where(videos.c.id == id))

    def _end(self, retention: float) -> dict[str, Any]:
        return {"ended": self._now, "expires": self._now + retention, "claimed_until": None}

    async def _own(self, id: str, token: str, *already: ColumnElement[bool], **values: Any) -> bool:
        """Change a job under its claim: one in work, or one that `already` is so."""
        allowed = or_(videos.c.status == "in_progress", *already)
        mine = and_(videos.c.id == id, videos.c.claim == token, allowed, ~videos.c.deleted)
        return await self._changes(update(videos).where(mine).values(**values))

    async def _rows(self, statement: Any) -> list[Any]:
        return await self._carried_through(statement, lambda result: list(result.fetchall()))

    async def _changes(self, statement: Any) -> bool:
        return await self._carried_through(statement, lambda result: bool(result.rowcount))

    async def _carried_through(self, statement: Any, read: Callable[[CursorResult[Any]], T]) -> T:
        """Also when the caller is cancelled: a change whose rows nobody reads keeps SQLite locked for everybody."""

        async def run() -> T:
            with _failing():
                async with asyncio.timeout(TIMEOUT), self._engine.connect() as connection:
                    return read(await connection.execute(statement))

        def end(task: asyncio.Task[T]) -> None:
            self._begun.discard(task)
            if not task.cancelled():
                task.exception()  # its caller may be gone, and then nobody is to hear of it

        task = asyncio.create_task(run())
        self._begun.add(task)
        task.add_done_callback(end)
        return await asyncio.shield(task)


@contextlib.contextmanager
def _failing() -> Iterator[None]:
    """Turns what a database throws into StoreError."""
    try:
        yield
    except (SQLAlchemyError, OSError, TimeoutError, UnicodeError, OverflowError) as error:
        kind = Refused if _is_final(error) else StoreError
        raise kind((str(error).splitlines() or [type(error).__name__])[0]) from error


def _is_final(error: BaseException) -> bool:
    """Whether the fault is in the values, so that the same statement fails whenever it is tried."""
    if isinstance(error, DataError | IntegrityError | UnicodeError | OverflowError):
        return True
    # SQLSTATE classes 22 and 23: data exceptions, violated constraints
    return str(getattr(getattr(error, "orig", None), "sqlstate", "")).startswith(("22", "23"))


def _durable(connection: Any, _record: object) -> None:
    """Accepted is never lost: a commit is on the disk before a client hears of it, and readers do not wait for it."""
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _active_of(owner: str) -> ColumnElement[bool]:
    return and_(videos.c.owner == owner, videos.c.status.in_(_ACTIVE))


def _count(condition: ColumnElement[bool]) -> ScalarSelect[int]:
    return select(func.count()).select_from(videos).where(condition).scalar_subquery()


def _job(row: Any) -> Job:
    return Job(*row[: len(_SEEN)])
