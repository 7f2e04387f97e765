"""A made-up Dynamo frontend: makes real MP4s when it is let, and fails in every way that the real one does."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import threading
from collections.abc import AsyncIterator, Iterator
from functools import cache
from typing import Any

import av
import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ltx2_pool.tools.stack import free_port


@cache
def mp4(frames: int = 9, tone: int = 0) -> bytes:
    """A small video."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            picture = np.full((64, 64, 3), (tone + 10 * number) % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return out.getvalue()


class Frontend:
    """Answers as the real frontend (1.6) does. What happens to a request is in the first word of its prompt:

    ``hold`` waits for :meth:`release` after its first step; ``refuse``, ``busy``, ``lost``, ``break``, ``garbage`` and
    ``fail`` end as their names say; with a number behind, so many times, and then there is a video.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self.requests: list[dict[str, Any]] = []
        self.running = 0
        self.cancelled = 0
        self.models = ["made-up"]
        self.away = False
        self._times: dict[str, int] = {}
        self._released = threading.Event()
        routes = [
            Route("/v1/videos", self._videos, methods=["POST"]),
            Route("/v1/models", self._list),
            Route("/engine/video/status", self._status),
        ]
        config = uvicorn.Config(
            Starlette(routes=routes), port=self.port, log_level="error", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Frontend:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()
        self._server.should_exit = True
        self._thread.join()

    def release(self) -> None:
        """Let what is held go on."""
        self._released.set()

    async def _list(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})

    async def _status(self, _: Request) -> Response:
        return JSONResponse(
            {
                "model": "made-up",
                "health": "able",
                "shapes": ["64x64@9f", "96x64@17f"],
                "processes": [{"shape": "64x64@9f", "state": "ready"}],
                "waiting": 0,
                "waiting_by_shape": {},
                "running": self.running,
                "expected_wait_s": 7.2,
                "max_size": 2,
                "devices": {"cpu": {"budget": 10, "held": 5, "leases": 0, "processes": 1}},
                "unavailable": {},
            }
        )

    async def _videos(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        if self.away:
            return Response(status_code=404)
        if not isinstance(body.get("prompt"), str):  # a synchronous call is judged by the frontend alone
            return JSONResponse({"message": "prompt is missing", "type": "x", "code": 400}, 400)
        verb, _, count = body["prompt"].split(" ")[0].partition(":")
        if count:
            so_far = self._times.get(body["prompt"], 0)
            self._times[body["prompt"]] = so_far + 1
            verb = verb if so_far < int(count) else ""
        if verb == "lost":
            return JSONResponse({"message": "Service temporarily unavailable", "type": "x", "code": 503}, 503)
        if not body.get("stream"):
            if verb == "busy":
                return JSONResponse({"message": "Rate limit exceeded", "type": "x", "code": 429}, 429)
            part = {"output_format": "mp4", "b64_json": base64.b64encode(mp4()).decode()}
            return JSONResponse({"id": "video_x", "status": "completed", "data": [part]})
        return StreamingResponse(self._events(verb), media_type="text/event-stream")

    async def _events(self, verb: str) -> AsyncIterator[str]:
        self.running += 1
        try:
            async for event in self._made(verb):
                yield event if isinstance(event, str) else f"data: {json.dumps(event)}\n\n"
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def _made(self, verb: str) -> AsyncIterator[dict[str, Any] | str]:
        errors = {"refuse": (400, "size is not on the menu"), "busy": (429, "Rate limit exceeded"), "fail": (500, "no")}
        if verb in errors:
            code, text = errors[verb]
            yield {"error": {"message": text, "type": "x", "code": code}}
            return
        yield {"id": "video_x", "status": "in_progress", "progress": 0}
        yield {"id": "video_x", "status": "in_progress", "progress": 50}
        if verb == "hold":
            while not self._released.is_set():  # noqa: ASYNC110 (another thread sets it)
                await asyncio.sleep(0.01)
        if verb == "break":
            raise ConnectionError("as a worker that is killed")
        data = b"no video at all" if verb == "garbage" else mp4()
        part = {"output_format": "mp4", "b64_json": base64.b64encode(data).decode()}
        yield {"id": "video_x", "status": "completed", "progress": 100, "data": [part]}


@contextlib.contextmanager
def frontend() -> Iterator[Frontend]:
    with Frontend() as made_up:
        yield made_up
