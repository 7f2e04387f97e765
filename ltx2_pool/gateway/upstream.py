"""The Dynamo frontend, and the workers' system ports: what is asked of them, and what their answers mean for a job.

Jobs are asked for as event streams, so that every denoise step is heard of and a client that goes away stops the GPU:
closing the connection reaches the worker through the frontend within a millisecond. In a stream, the frontend (1.6)
answers 200 with the first step, and sends what went wrong after that, or instead of it, as an event with its status
in `code`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import httpx

CONNECT_TIMEOUT = 5
KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)
"""A frontend whose machine is gone is noticed within a minute, though a job may be silent for longer."""


NONSENSE = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
"""What comes of reading an answer that is none."""


class Failed(Exception):
    """The job gets no video, and asking again would not change that."""

    def __init__(self, code: str, message: str) -> None:
        self.code, self.message = code, message
        super().__init__(f"{code}: {message}")


class Busy(Exception):
    """Nobody has begun to make it: those who could are busy or away."""


class Away(Busy):
    """Nor would anybody have begun another: no frontend is there, or no worker at all."""


class Lost(Exception):
    """Whoever was making it is gone."""


class Upstream:
    """One frontend, and the workers behind it as far as their system ports are known."""

    def __init__(self, frontend: str, workers: Sequence[str] = (), connections: int = 100) -> None:
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT, pool=CONNECT_TIMEOUT)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=connections)
        transport = httpx.AsyncHTTPTransport(limits=limits, socket_options=KEEPALIVE)
        self._http = httpx.AsyncClient(base_url=frontend, timeout=timeout, transport=transport, trust_env=False)
        self._workers = tuple(workers)

    async def close(self) -> None:
        await self._http.aclose()

    async def make(self, body: dict[str, Any], on_progress: Callable[[int], None]) -> bytes:
        """The MP4 of a request. Raises Failed, Busy, Lost; when it is cancelled, so is the job."""
        asked = {**body, "stream": True, "response_format": "b64_json"}
        data = b""
        try:
            async with self._http.stream("POST", "/v1/videos", json=asked) as response:
                if response.status_code != 200:
                    raise meaning(response.status_code, await response.aread())
                async for event in _events(response):
                    if not isinstance(answer := json.loads(event), dict):
                        raise ValueError("an event is no object")
                    error = answer.get("error")
                    if isinstance(error, dict):
                        raise meaning(int(error.get("code") or 500), event)
                    if answer.get("status") == "failed":
                        raise Failed("generation_failed", str(error or "the video could not be made"))
                    on_progress(min(99, max(0, int(answer.get("progress") or 0))))
                    for part in answer.get("data") or ():
                        data = base64.b64decode(part["b64_json"], validate=True)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise Away(f"the frontend does not answer: {error}") from error
        except httpx.HTTPError as error:
            raise Lost(f"the frontend broke off: {error or type(error).__name__}") from error
        except NONSENSE as error:
            raise Lost(f"the frontend sent what is no answer: {type(error).__name__}: {error}") from error
        if data[4:8] != b"ftyp":
            raise Lost("the frontend's answer has no MP4")
        return data

    @contextlib.asynccontextmanager
    async def passed_on(self, body: bytes, headers: dict[str, str]) -> AsyncIterator[httpx.Response]:
        """The frontend's own answer to a request, as it comes. Raises Busy."""
        request = self._http.build_request("POST", "/v1/videos", content=body, headers=headers)
        try:
            response = await self._http.send(request, stream=True)
        except httpx.TransportError as error:
            raise Busy(f"the frontend does not answer: {error or type(error).__name__}") from error
        try:
            yield response
        finally:
            await response.aclose()

    async def models(self) -> list[dict[str, Any]]:
        """The models that are served now. Raises Busy."""
        try:
            answer = await self._http.get("/v1/models", timeout=CONNECT_TIMEOUT)
            return [model for model in answer.raise_for_status().json()["data"] if isinstance(model, dict)]
        except (httpx.HTTPError, *NONSENSE) as error:
            raise Busy(f"the frontend does not answer: {error or type(error).__name__}") from error

    async def statuses(self) -> list[dict[str, Any]]:
        """What each worker says of itself, asked all at once; those that do not answer are left out."""
        found = await asyncio.gather(*map(self._status, self._workers))
        return [status for status in found if isinstance(status, dict)]

    async def _status(self, url: str) -> object:
        with contextlib.suppress(httpx.HTTPError, *NONSENSE):
            answer = await self._http.get(f"{url}/engine/video/status", timeout=CONNECT_TIMEOUT)
            return answer.raise_for_status().json()
        return None


async def _events(response: httpx.Response) -> AsyncIterator[bytes]:
    """The payloads of server-sent events. A video's is megabytes long, so pieces are joined once."""
    pieces: list[bytes] = []
    async for piece in response.aiter_bytes():
        while (end := piece.find(b"\n")) >= 0:
            line = b"".join([*pieces, piece[:end]])
            pieces, piece = [], piece[end + 1 :]
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                yield line[6:]
        if piece:
            pieces.append(piece)


def meaning(status: int, body: bytes) -> Exception:
    """What an error of the frontend means for the job."""
    text = message(body)
    if status == 400:
        return Failed("invalid_request", text or "the request was refused")
    if status == 404 and text:
        return Failed("model_not_found", text)
    if status in (413, 415, 422):
        return Failed("invalid_request", text or f"the frontend answered {status}")
    if status == 504:
        return Failed("timeout", text or "the video was not made in time")
    if status == 404:  # without a text: no worker is registered, of whatever model
        return Away("404")
    if status in (429, 529) or "not ready" in text:
        return Busy(f"{status} {text}")
    if status in (499, 502, 503):
        return Lost(f"{status} {text}")
    return Failed("generation_failed", text or "the video could not be made")


def message(body: bytes) -> str:
    """The text of an error of the frontend, in either of its forms."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    error = answer.get("error") if isinstance(answer, dict) else None
    found = error if isinstance(error, dict) else answer
    return str(found.get("message") or "") if isinstance(found, dict) else ""
