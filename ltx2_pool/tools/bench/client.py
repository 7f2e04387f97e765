"""A client of ``POST /v1/videos`` that measures what a customer sees, and looks at every video it gets."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from dataclasses import dataclass
from typing import Any

import httpx

from ltx2_pool.words.menu import Menu
from ltx2_pool.words.shapes import Shape

PROMPTS = (
    "a red fox trots through fresh snow at dawn",
    "steam rises from a cup of tea beside a rainy window",
    "a paper boat drifts down a gutter after a storm",
    "two cyclists cross a long bridge in thick fog",
    "a lighthouse beam sweeps over a calm sea at night",
    "a market stall of oranges, people walk past",
    "a kite climbs over a wheat field in strong wind",
    "an old tram turns a corner, sparks on the wire",
)


@dataclass(frozen=True)
class Answer:
    """What came back for one request."""

    status: int
    """HTTP; 0 when none came."""
    seconds: float
    """From sending to the last byte."""
    wait_s: float | None
    """The part of it that was not the making: the worker's queue, and the way there and back."""
    data: bytes
    """The MP4, empty without one."""
    problem: str
    """Empty when it is the video that was asked for."""


class Client:
    """Asks one frontend. Use as ``async with``."""

    def __init__(self, url: str, menu: Menu, *, timeout: float = 3600) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._http = httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits)
        self._menu = menu
        self.model = ""

    async def __aenter__(self) -> Client:
        try:
            models = (await self._http.get("/v1/models")).raise_for_status().json()["data"]
        except BaseException:
            await self._http.aclose()
            raise
        self.model = models[0]["id"] if models else ""
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._http.aclose()

    async def ask(self, shape: Shape, number: int) -> Answer:
        """Ask for video `number` of a shape: the same number gives the same prompt and seed, and so the same bytes."""
        body = {
            "model": self.model,
            "prompt": PROMPTS[number % len(PROMPTS)],
            "size": shape.size,
            "response_format": "b64_json",
            "nvext": {"num_frames": shape.num_frames, "seed": number},
        }
        began = time.monotonic()
        try:
            response = await self._http.post("/v1/videos", json=body)
        except httpx.HTTPError as error:
            return Answer(0, time.monotonic() - began, None, b"", f"{type(error).__name__}: {error}")
        seconds = time.monotonic() - began
        if response.status_code != 200:
            return Answer(response.status_code, seconds, None, b"", response.text[:200] or "no text")
        answer = response.json()
        made = answer.get("inference_time_s")
        wait = max(0.0, seconds - made) if made is not None else None
        try:
            data = base64.b64decode(answer["data"][0]["b64_json"])
            problem = await asyncio.to_thread(self._problem, data, shape)
        except (LookupError, TypeError, ValueError) as error:
            return Answer(200, seconds, wait, b"", f"not a video: {error}")
        return Answer(200, seconds, wait, data, problem)

    def _problem(self, data: bytes, shape: Shape) -> str:
        from ltx2_pool.model import mp4

        info = mp4.probe(data)
        found = (info.width, info.height, info.num_frames, info.fps)
        wanted = (shape.width, shape.height, shape.num_frames, self._menu.fps)
        return "" if found == wanted else f"(width, height, frames, fps) is {found}, not {wanted}"


class JobsClient(Client):
    """Asks one gateway: creates a job, polls it as the gateway says, and fetches the video."""

    async def ask(self, shape: Shape, number: int) -> Answer:
        body = {
            "model": self.model,
            "prompt": PROMPTS[number % len(PROMPTS)],
            "size": shape.size,
            "nvext": {"num_frames": shape.num_frames, "seed": number},
        }
        began = time.monotonic()
        try:
            response = await self._http.post("/v1/videos", json=body)
            while response.status_code == 200 and response.json()["status"] in ("queued", "in_progress"):
                await asyncio.sleep(int(response.headers["openai-poll-after-ms"]) / 1000)
                response = await self._http.get(f"/v1/videos/{response.json()['id']}")
            if response.status_code == 200 and response.json()["status"] == "completed":
                response = await self._http.get(f"/v1/videos/{response.json()['id']}/content")
        except httpx.HTTPError as error:
            return Answer(0, time.monotonic() - began, None, b"", f"{type(error).__name__}: {error}")
        seconds = time.monotonic() - began
        if response.headers.get("content-type") != "video/mp4":
            return Answer(response.status_code, seconds, None, b"", response.text[:200] or "no text")
        problem = await asyncio.to_thread(self._problem, response.content, shape)
        return Answer(200, seconds, None, response.content, problem)


@dataclass(frozen=True)
class Sample:
    """The worker's status at one moment."""

    at: float
    """time.monotonic()"""
    states: dict[str, str]
    """Of shape processes, by shape key."""
    waiting: int
    running: int


class Watch:
    """Asks the worker for its status all the time, until it is left. Use as ``async with``."""

    def __init__(self, url: str | None, every: float = 0.1) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=10) if url is not None else None
        self._every = every
        self._task: asyncio.Task[None] | None = None
        self.samples: list[Sample] = []
        self.status: dict[str, Any] = {}
        """The last answer, as the worker gave it."""

    async def __aenter__(self) -> Watch:
        if self._http is not None:
            await self._look(self._http)
            self._task = asyncio.create_task(self._run(self._http))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._http is not None:
            await self._http.aclose()

    async def _run(self, http: httpx.AsyncClient) -> None:
        while True:
            await asyncio.sleep(self._every)
            with contextlib.suppress(httpx.HTTPError):  # a worker that restarts leaves a gap
                await self._look(http)

    async def _look(self, http: httpx.AsyncClient) -> None:
        self.status = (await http.get("/engine/video/status")).raise_for_status().json()
        states = {process["shape"]: process["state"] for process in self.status["processes"]}
        self.samples.append(Sample(time.monotonic(), states, self.status["waiting"], self.status["running"]))

    def state(self, shape: Shape) -> str:
        """`hot` when the shape has a process that is READY or generates, `cold` when not, empty when nobody knows."""
        if not self.samples:
            return ""
        return "hot" if self.samples[-1].states.get(shape.key) in ("ready", "generating", "encoding") else "cold"
