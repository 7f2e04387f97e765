"""Dynamo's own synchronous call, passed on unchanged, for those who ask for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ltx2_pool.gateway.errors import ApiError
from ltx2_pool.gateway.gateway import Gateway
from ltx2_pool.gateway.upstream import Busy

PASSED = ("content-type", "cache-control")
WITH_A_WAIT = (429, 503, 529)


async def pass_on(request: Request, gateway: Gateway, fields: dict[str, Any]) -> Response:
    """The frontend's answer. When the client goes away, so does the call. Raises ApiError."""
    headers = {"content-type": "application/json"}
    for name in ("x-request-id", "traceparent"):
        if name in request.headers:
            headers[name] = request.headers[name]
    cleanup = contextlib.AsyncExitStack()
    asking = asyncio.ensure_future(
        cleanup.enter_async_context(gateway.upstream.passed_on(json.dumps(fields).encode(), headers))
    )
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({asking, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not asking.done():
            asking.cancel()
    try:
        answer: httpx.Response = await asking
    except Busy as busy:
        wait = await gateway.expected_wait()
        raise ApiError(503, f"{busy}", code="not_ready", retry_after=wait) from busy
    except asyncio.CancelledError:
        raise ApiError(499, "the client went away") from None
    found = {name: answer.headers[name] for name in PASSED if name in answer.headers}
    if answer.status_code in WITH_A_WAIT:
        found["retry-after"] = str(max(1, round(await gateway.expected_wait())))
    return StreamingResponse(_pieces(answer, cleanup), answer.status_code, found)


async def _pieces(answer: httpx.Response, cleanup: contextlib.AsyncExitStack) -> AsyncIterator[bytes]:
    async with cleanup:
        async for piece in answer.aiter_bytes():  # when it breaks off, so does the answer to the client
            yield piece


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
