"""The ASGI application: routes, and what all answers have in common."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

import yaml
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ltx2_pool import __version__
from ltx2_pool.gateway import videos
from ltx2_pool.gateway.errors import ApiError
from ltx2_pool.gateway.gateway import Gateway
from ltx2_pool.gateway.settings import is_loopback
from ltx2_pool.gateway.store import StoreError

logger = logging.getLogger(__name__)

PAGE = {
    "": ("index.html", "text/html; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
}
BODIES_HELD = 4
"""So many of the largest requests may be under way at once; the memory that one takes is a few times its size."""
SMALL = 1000
"""Of the largest request, the part that is always let in: those who upload, or stall, keep nobody else out."""
UPLOAD_TIMEOUT = 120.0
"""Seconds that a request has to come in."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:; "
    "media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def application(gateway: Gateway) -> ASGIApp:
    """What a server serves; it opens the gateway, and closes it."""

    @contextlib.asynccontextmanager
    async def life(_: Starlette) -> AsyncIterator[None]:
        await gateway.open()
        try:
            yield
        finally:
            await gateway.close()

    app = Starlette(
        routes=ROUTES,
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, StoreError: _store_error},
        lifespan=life,
        middleware=[Middleware(_Edge, gateway=gateway)],
    )
    app.state.gateway = gateway
    return app


class _Edge:
    """Around everything: who may call, how much may come in, what is counted, and an answer whatever fails inside."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app, self._gateway = app, gateway
        self._held = 0
        """Bytes of the bodies of all requests under way."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        gateway, began = self._gateway, False
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}

        async def sending(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                gateway.metrics.statuses.labels(f"{message['status'] // 100}xx").inc()
                if 400 <= message["status"] < 500 and message["status"] not in (401, 404, 413, 416, 429):
                    gateway.metrics.rejections.labels("invalid").inc()
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        received, whole, until = 0, False, asyncio.get_running_loop().time() + UPLOAD_TIMEOUT

        async def receiving() -> Message:
            nonlocal received, whole
            try:
                async with asyncio.timeout_at(None if whole else until):
                    message = await receive()
            except TimeoutError:
                text = f"the request did not come in within {UPLOAD_TIMEOUT:g} s"
                raise ApiError(408, text, headers={"connection": "close"}) from None
            whole = not message.get("more_body", False)
            received += len(message.get("body", b""))
            self._held += len(message.get("body", b""))
            if received > gateway.max_body:
                raise self._too_large()
            if self._held > BODIES_HELD * gateway.max_body and received > gateway.max_body / SMALL:
                raise ApiError(
                    503,
                    "too many large requests come in at once; try again later",
                    code="too_many_uploads",
                    retry_after=2,
                )
            return message

        try:
            if gateway.keys.are_open:
                _from_here(headers)
            length = headers.get("content-length", "")
            if length.isdigit() and int(length) > gateway.max_body:
                raise self._too_large()
            await self._app(scope, receiving, sending)
        except ApiError as error:
            if began:
                raise
            await error.response(scope, receive, sending)
        except Exception as error:
            if began:  # too late for a status: the connection is closed, and the client sees that something is missing
                logger.error("%s %s broke off: %s: %s", scope["method"], scope["path"], type(error).__name__, error)
                raise
            logger.exception("%s %s", scope["method"], scope["path"])
            await ApiError(500, "the gateway failed").response(scope, receive, sending)
        finally:
            self._held -= received

    def _too_large(self) -> ApiError:
        self._gateway.metrics.rejections.labels("too_large").inc()
        return ApiError(413, f"at most {self._gateway.max_body} bytes are accepted", headers={"connection": "close"})


def _from_here(headers: dict[str, str]) -> None:
    """Without keys, whoever reaches this port is trusted: no other site's page may use its visitor's browser for it."""
    host = headers.get("host", "")
    try:
        name = urlsplit(f"//{host}").hostname if host else None
    except ValueError:
        raise ApiError(400, f"the Host header is no host: {host[:80]!a}") from None
    if name is not None and not is_loopback(name):
        raise ApiError(403, f"without API keys this gateway serves localhost only, not {host[:80]!a}")
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != host:
        raise ApiError(403, f"pages of {origin[:80]!a} may not use this gateway")


async def _models(request: Request) -> Response:
    gateway, _ = videos.enter(request)
    return JSONResponse({"object": "list", "data": await gateway.outlook.models()})


async def _pool(request: Request) -> Response:
    """What the page shows of the pool: queue, shapes, workers."""
    gateway, owner = videos.enter(request)
    counts = await gateway.counts()
    queue = {
        **counts,
        "limit": gateway.settings.max_queue,
        "key_limit": owner.max_active,
        "typical_seconds": round(gateway.dispatcher.typical, 3),
        "expected_wait_seconds": round(await gateway.expected_wait(), 3),
    }
    return JSONResponse({"version": __version__, "queue": queue, **await gateway.outlook.pool()})


async def _health(request: Request) -> Response:
    """200 while jobs are accepted, whether or not somebody makes them now."""
    gateway: Gateway = request.app.state.gateway
    counts = await gateway.counts()
    models = [model["id"] for model in await gateway.outlook.models()]
    return JSONResponse({"status": "healthy", "models": models, "queued": counts["queued"]})


async def _metrics(request: Request) -> Response:
    gateway: Gateway = request.app.state.gateway
    try:
        for status, number in (await gateway.counts()).items():
            gateway.metrics.jobs.labels(status).set(number)
        gateway.metrics.store.set(1)
    except StoreError:
        gateway.metrics.store.set(0)
    gateway.metrics.frontend.set(bool(await gateway.outlook.models()))
    return Response(generate_latest(gateway.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def document() -> dict[str, Any]:
    """The OpenAPI document."""
    text = resources.files("ltx2_pool.gateway").joinpath("openapi.yaml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.safe_load(text)
    loaded["info"]["version"] = __version__
    return loaded


async def _document(_: Request) -> Response:
    return JSONResponse(document())


async def _page(request: Request) -> Response:
    name, media_type = PAGE[request.url.path.removeprefix("/")]
    text = resources.files("ltx2_pool.gateway").joinpath("page", name).read_text(encoding="utf-8")
    headers = {"content-security-policy": POLICY, "referrer-policy": "no-referrer", "cache-control": "no-cache"}
    return Response(text, headers=headers, media_type=media_type)


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, error.detail, headers=error.headers).response


async def _store_error(request: Request, error: Exception) -> Response:
    logger.error("%s %s: the database: %s", request.method, request.url.path, error)
    return ApiError(503, "the jobs cannot be read or written now", code="store_unavailable", retry_after=5).response


_VIDEO = "/v1/videos/{id}"
ROUTES = [
    Route("/v1/videos/events", videos.events_of_many, methods=["GET"]),
    Route(_VIDEO, videos.retrieve, methods=["GET"]),
    Route("/v1/videos", videos.create, methods=["POST"]),
    Route("/v1/videos", videos.listing, methods=["GET"]),
    Route(_VIDEO, videos.remove, methods=["DELETE"]),
    Route(f"{_VIDEO}/content", videos.content, methods=["GET"]),
    Route(f"{_VIDEO}/events", videos.events, methods=["GET"]),
    Route(f"{_VIDEO}/remix", videos.remix, methods=["POST"]),
    Route("/v1/models", _models),
    Route("/v1/pool", _pool),
    Route("/health", _health),
    Route("/metrics", _metrics),
    Route("/openapi.json", _document),
    *(Route(f"/{name}", _page) for name in PAGE),
]
"""The API is also described in openapi.yaml; a test compares the two."""
