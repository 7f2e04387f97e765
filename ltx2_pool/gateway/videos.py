"""The jobs API: create, remix, look, list, watch, fetch, delete."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ltx2_pool.gateway import delivery, intake, stills
from ltx2_pool.gateway.errors import ApiError, not_found
from ltx2_pool.gateway.gateway import Gateway
from ltx2_pool.gateway.intake import Create
from ltx2_pool.gateway.jobs import ENDED, Job, new_id
from ltx2_pool.gateway.keys import Owner
from ltx2_pool.gateway.passing import pass_on
from ltx2_pool.gateway.store import Conflict, Full
from ltx2_pool.words.shapes import Shape

logger = logging.getLogger(__name__)

SYNCHRONOUS = "x-ltx2-synchronous"
"""The header that asks for Dynamo's own call, whose answer is the video."""
LOOK_EVERY = 1.0
"""Seconds between two looks of an event stream for what other gateways did."""
KEEP_ALIVE = 15.0
WATCHED = 100
"""How many jobs one event stream may be of."""
WATCHED_IN_ALL = 1000
"""How many jobs all event streams of one key may be of: each is looked at every second."""
_ID = re.compile(r"video_[0-9a-f]{32}")


async def create(request: Request) -> Response:
    """POST /v1/videos."""
    gateway, owner = enter(request)
    fields = await intake.read(request, gateway.max_body)
    if request.headers.get(SYNCHRONOUS, "") in ("1", "true") or fields.get("stream") is True:
        return await pass_on(request, gateway, _by(owner, fields))
    return await _accept(gateway, owner, request, fields)


async def remix(request: Request) -> Response:
    """POST /v1/videos/{id}/remix: the same shape, seed and pictures with another prompt."""
    gateway, owner = enter(request)
    job = await find(gateway, owner, request)
    fields = await intake.read(request, gateway.max_body)
    if set(fields) - {"prompt", "stream"}:
        raise ApiError(400, "a remix has a prompt, and everything else of the video that it is of")
    body = await gateway.store.body(job.id)
    if body is None:
        raise not_found(job.id)
    body = {name: value for name, value in body.items() if name not in ("user", "prompt", "stream")}
    return await _accept(gateway, owner, request, {**body, **fields}, job)


async def _accept(
    gateway: Gateway, owner: Owner, request: Request, fields: dict[str, Any], remixed: Job | None = None
) -> Response:
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= 255:
        raise ApiError(400, "an Idempotency-Key has 1 to 255 characters")
    limit, menu = gateway.settings.max_prompt_chars, gateway.menu
    large = intake.extent(fields)
    asked = await intake.heavy(large, intake.create, fields, limit)
    said = {**asked.body, "model": asked.model, "remix": remixed.id if remixed else None}
    _, fingerprint = await intake.heavy(large, intake.measure, said)
    if key is not None:  # first, for whatever else has changed meanwhile, it was accepted
        with _conflicts():
            if (known := await gateway.store.known(owner.name, key, fingerprint)) is not None:
                return _answer(gateway, known)
    shape = await intake.heavy(large, intake.check, asked, menu, limit) if menu is not None else None
    model = await gateway.outlook.model(asked.model)
    if model is None:
        raise ApiError(404, f"there is no model {(asked.model or '')[:80]!a}", code="model_not_found", param="model")
    if not model:
        raise ApiError(503, "no model is served yet", code="not_ready", retry_after=5)
    body = _by(owner, {**asked.body, "model": model})
    size, _ = await intake.heavy(large, intake.measure, body)
    if size > gateway.max_body:
        raise ApiError(413, f"the request is too large with its pictures: at most {gateway.max_body} bytes")
    job = Job(
        id=new_id(),
        owner=owner.name,
        status="queued",
        progress=0,
        model=model,
        prompt=asked.prompt,
        size=shape.size if shape else asked.size or "",
        seconds=_seconds(gateway, asked, shape),
        created=time.time(),
        remixed_from=remixed.id if remixed else None,
    )
    try:
        with _conflicts():
            stored, new = await gateway.store.add(
                job,
                body,
                max_queue=gateway.settings.max_queue,
                max_active=owner.max_active,
                idempotency_key=key,
                fingerprint=fingerprint,
            )
    except Full as full:
        gateway.metrics.rejections.labels(full.reason).inc()
        mine = full.reason == "key_queue_full"
        text = f"{owner.max_active} jobs of this key wait or are made already" if mine else "too many jobs wait already"
        wait = await gateway.expected_wait()
        raise ApiError(429, f"{text}; try again later", code=full.reason, retry_after=wait) from None
    if new:
        gateway.metrics.accepted.inc()
        logger.info("job %s accepted owner=%s size=%s seconds=%s", job.id, owner.name or "-", job.size, job.seconds)
        gateway.dispatcher.wake()
    return _answer(gateway, stored)


def _by(owner: Owner, body: dict[str, Any]) -> dict[str, Any]:
    """The request as its key's: the workers let users take turns, and no key may pass for another's."""
    if not owner.name:
        return body
    user = body.get("user")
    return {**body, "user": f"{owner.name}/{user}" if user else owner.name}


@contextlib.contextmanager
def _conflicts() -> Iterator[None]:
    try:
        yield
    except Conflict:
        raise ApiError(
            422, "this Idempotency-Key was used with another request", code="idempotency_key_reused"
        ) from None


def _seconds(gateway: Gateway, asked: Create, shape: Shape | None) -> str:
    if asked.seconds is not None:
        return str(asked.seconds)
    if shape is None or gateway.menu is None:
        return ""
    return f"{round((shape.num_frames - 1) / gateway.menu.fps, 2):g}"


async def retrieve(request: Request) -> Response:
    """GET /v1/videos/{id}."""
    gateway, owner = enter(request)
    return _answer(gateway, await find(gateway, owner, request))


def _answer(gateway: Gateway, job: Job) -> Response:
    """A job; OpenAI's client waits between two looks for as long as the header says."""
    headers = {"cache-control": "no-store"}
    if job.status not in ENDED:
        headers["openai-poll-after-ms"] = str(int(1000 * gateway.outlook.poll_after(gateway.dispatcher.typical)))
    return JSONResponse(job.view, headers=headers)


async def listing(request: Request) -> Response:
    """GET /v1/videos."""
    gateway, owner = enter(request)
    query = request.query_params
    limit, order, after = query.get("limit", "20"), query.get("order", "desc"), query.get("after")
    if not re.fullmatch(r"[1-9][0-9]?|100", limit):
        raise ApiError(400, "limit must be from 1 to 100", param="limit")
    if order not in ("asc", "desc"):
        raise ApiError(400, "order must be asc or desc", param="order")
    if after is not None and not _ID.fullmatch(after):
        raise ApiError(400, "after must be the id of a video", param="after")
    found = await gateway.store.listed(owner.name, after=after, limit=int(limit) + 1, newest_first=order == "desc")
    shown = [job.view for job in found[: int(limit)]]
    return JSONResponse(
        {
            "object": "list",
            "data": shown,
            "has_more": len(found) > len(shown),
            "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None,
        },
        headers={"cache-control": "no-store"},
    )


async def remove(request: Request) -> Response:
    """DELETE /v1/videos/{id}: gone for its client at once; if it is being made, the GPU stops at the next step."""
    gateway, owner = enter(request)
    job = await find(gateway, owner, request)
    if not await gateway.store.mark_deleted(job.id):
        raise not_found(job.id)
    gateway.dispatcher.stop_deleted(job.id)
    gateway.news.tell(job.id)
    return JSONResponse({"id": job.id, "object": "video.deleted", "deleted": True})


async def content(request: Request) -> Response:
    """GET /v1/videos/{id}/content."""
    gateway, owner = enter(request)
    variant = request.query_params.get("variant", "video")
    if variant not in ("video", *stills.NAMES):
        raise ApiError(400, "variant must be video, thumbnail or spritesheet", param="variant")
    job = await find(gateway, owner, request)
    if job.status == "failed":
        raise ApiError(409, f"there is no video: {job.error}", code="video_failed")
    if job.status != "completed" or job.content is None:
        raise ApiError(409, f"the video is not ready: it is {job.status}", code="video_not_ready", retry_after=1)
    if variant == "video":
        return await delivery.respond(request, gateway.content, job.content, job.bytes, job.etag, "video/mp4")
    still: stills.Variant = "thumbnail" if variant == "thumbnail" else "spritesheet"
    with delivery.reading(job.content):
        path, size = await gateway.stills.of(job.content, still)
    return await delivery.respond(request, gateway.content, path, size, f"{job.etag[:32]}-{still}", stills.TYPES[still])


async def events(request: Request) -> Response:
    """GET /v1/videos/{id}/events: the job at each change, until it has ended."""
    gateway, owner = enter(request)
    job = await find(gateway, owner, request)
    return _stream(request, gateway, owner, [job.id])


async def events_of_many(request: Request) -> Response:
    """GET /v1/videos/events: several jobs in one stream, until all have ended; browsers allow few streams at once."""
    gateway, owner = enter(request)
    ids = list(dict.fromkeys(request.query_params.get("ids", "").split(",")))
    if len(ids) > WATCHED or not all(_ID.fullmatch(id) for id in ids):
        raise ApiError(400, f"ids must be 1 to {WATCHED} ids of videos, with commas between", param="ids")
    return _stream(request, gateway, owner, ids)


def _stream(request: Request, gateway: Gateway, owner: Owner, ids: Sequence[str]) -> Response:
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    if request.method == "HEAD":  # a stream without a body would hold the connection up until the jobs have ended
        return Response(headers=headers, media_type="text/event-stream")
    if gateway.watched[owner.name] + len(ids) > WATCHED_IN_ALL:
        text = f"the open event streams of this key may be of {WATCHED_IN_ALL} videos in all: close some, or poll"
        raise ApiError(429, text, code="too_many_events", retry_after=5)
    gateway.watched[owner.name] += len(ids)

    def close() -> None:
        gateway.watched[owner.name] -= len(ids)

    return _Events(_watch(gateway, owner, ids), close, headers)


class _Events(StreamingResponse):
    """A stream that says when it is over, also when it has not begun."""

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None], headers: Mapping[str, str]) -> None:
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """To its client."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _watch(gateway: Gateway, owner: Owner, ids: Sequence[str]) -> AsyncIterator[str]:
    told: dict[str, Any] = dict.fromkeys(ids)
    said = time.monotonic()
    while True:
        for job, id in zip(await asyncio.gather(*map(gateway.reader.get, told)), list(told), strict=True):
            if job is None or job.owner != owner.name:
                del told[id]
                yield f"event: deleted\ndata: {json.dumps({'id': id, 'object': 'video.deleted', 'deleted': True})}\n\n"
                continue
            if job.view != told[id]:
                told[id], said = job.view, time.monotonic()
                yield f"event: video\ndata: {json.dumps(job.view)}\n\n"
            if job.status in ENDED:
                del told[id]
        if not told:
            return
        if time.monotonic() - said > KEEP_ALIVE:
            said = time.monotonic()
            yield ": still here\n\n"
        await _change(gateway, list(told))


async def _change(gateway: Gateway, ids: Sequence[str]) -> None:
    """Return when one of the jobs has changed, or may have in another gateway."""
    waiting = [asyncio.ensure_future(gateway.news.wait(id, LOOK_EVERY)) for id in ids]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in waiting:
            each.cancel()


def enter(request: Request) -> tuple[Gateway, Owner]:
    """The gateway, and whose request this is. Raises ApiError."""
    gateway: Gateway = request.app.state.gateway
    owner = gateway.keys.owner(request.headers.get("authorization"))
    if owner is None:
        gateway.metrics.rejections.labels("unauthorized").inc()
        raise ApiError(
            401,
            "send your API key: Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
    return gateway, owner


async def find(gateway: Gateway, owner: Owner, request: Request) -> Job:
    """The job of the path, if it is this owner's. Raises ApiError."""
    id = str(request.path_params["id"])
    job = await gateway.reader.get(id) if len(id) <= 64 and "\0" not in id else None
    if job is None or job.owner != owner.name:
        raise not_found(id)
    return job
