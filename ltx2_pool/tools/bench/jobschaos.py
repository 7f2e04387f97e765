"""``benchmark.py chaos --gateway``: jobs while gateways, frontend, routers and workers are killed, and their fates.

Every accepted job must end exactly once, in its own video or in an error that is true; none may be forgotten, none be
there twice, and the content store must have the videos of the completed jobs and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from ltx2_pool.tools import postgres
from ltx2_pool.tools.bench import fakeworker
from ltx2_pool.tools.fleetstack import FleetStack
from ltx2_pool.tools.stack import TINY_MENU, free_port

IN_FLIGHT = 24
KILL_EVERY = 2.0
"""Seconds, on average."""
TRUE_FAILURES = ("server_error", "timeout")
"""What a job may end with when everything around it is killed, again and again."""


@dataclass
class Record:
    """What became of the jobs."""

    accepted: list[str] = field(default_factory=list)
    ended: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0


class JobsChaos:
    """One run over one stack and its gateways; the seed decides who is killed when."""

    def __init__(
        self, running: FleetStack, gateways: Sequence[Gateway], content: Path, every: float, seed: int
    ) -> None:
        """Somebody is killed every so many seconds, on average."""
        self._running, self._gateways, self._content = running, gateways, content
        self._every, self._random = every, random.Random(seed)
        self._record = Record()

    async def run(self, jobs: int, on_end: Callable[[], None]) -> Record:
        """Push the jobs through, and look at everything that is left."""
        began = time.monotonic()
        free = asyncio.Semaphore(IN_FLIGHT)
        async with httpx.AsyncClient(timeout=10) as http:
            killing = asyncio.create_task(self._kill())

            async def one(number: int) -> None:
                async with free:
                    await self._one(http, number)
                    on_end()

            async with asyncio.TaskGroup() as group:
                for number in range(jobs):
                    group.create_task(one(number))
            killing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await killing
            await self._look(http, jobs)
        self._record.seconds = time.monotonic() - began
        return self._record

    async def _one(self, http: httpx.AsyncClient, number: int) -> None:
        """As a client that takes care does it: an Idempotency-Key, and again when nobody answers."""
        record, prompt = self._record, _prompt(number)
        key = {"idempotency-key": f"job {number}"}
        answer = await self._ask(http, "POST", "/v1/videos", json={"prompt": prompt}, headers=key)
        if answer.status_code != 200:
            record.problems.append(f"job {number} is not accepted: {answer.status_code} {answer.text[:200]}")
            return
        id = answer.json()["id"]
        record.accepted.append(id)
        while True:
            job = (await self._ask(http, "GET", f"/v1/videos/{id}")).json()
            if job.get("status") not in ("queued", "in_progress"):
                break
            await asyncio.sleep(0.2)
        if job.get("status") == "completed":
            data = (await self._ask(http, "GET", f"/v1/videos/{id}/content")).content
            right = data == fakeworker.video(prompt)
            record.ended["its video" if right else "a wrong video"] += 1
            if not right:
                record.problems.append(f"job {number} has a wrong video of {len(data)} bytes")
            return
        code = (job.get("error") or {}).get("code")
        record.ended[f"failed: {code}"] += 1
        if code not in TRUE_FAILURES:
            record.problems.append(f"job {number} ended as {job}")

    async def _ask(self, http: httpx.AsyncClient, method: str, path: str, **options: Any) -> httpx.Response:
        """Of any gateway that answers."""
        while True:
            with contextlib.suppress(httpx.TransportError):
                answer = await http.request(method, self._random.choice(self._gateways).url + path, **options)
                if answer.status_code not in (429, 503):
                    return answer
            await asyncio.sleep(0.2)

    async def _kill(self) -> None:
        running = self._running
        victims = ["gateway", "frontend", "worker", *(["router"] if running.routers else [])]
        while True:
            await asyncio.sleep(self._random.expovariate(1 / self._every))
            victim = self._random.choice(victims)
            self._record.kills[victim] += 1
            if victim == "gateway":
                await asyncio.to_thread(self._random.choice(self._gateways).kill_and_start)
            elif victim == "frontend" and running.frontend is not None:
                running.frontend.kill()
                running.frontend.wait()
                running.start_frontend()
            elif victim == "worker":
                running.replace_worker(self._random.randrange(len(running.workers)))
            elif victim == "router":
                running.replace_router(self._random.randrange(len(running.routers)))

    async def _look(self, http: httpx.AsyncClient, jobs: int) -> None:
        """Whether store and content have what they must have, and nothing else."""
        record = self._record
        listed: list[dict[str, Any]] = []
        after: dict[str, str] = {}
        while True:
            page = (await self._ask(http, "GET", "/v1/videos", params={"limit": "100", **after})).json()
            listed += page["data"]
            if not page["has_more"]:
                break
            after = {"after": page["last_id"]}
        there = Counter(job["id"] for job in listed)
        record.problems += [f"{id} is there {there[id]} times" for id in record.accepted if there[id] != 1]
        record.problems += [f"{id} was never accepted" for id in there if id not in set(record.accepted)]
        if len(set(record.accepted)) != jobs:
            record.problems.append(f"{len(set(record.accepted))} jobs were accepted, not {jobs}")
        completed = Counter(job["id"] for job in listed if job["status"] == "completed")
        videos = Counter(path.parent.name for path in self._content.rglob("*.mp4"))
        record.problems += [f"{id} has {videos[id]} videos in the store" for id in completed if videos[id] != 1]
        record.problems += [f"{id} has a video in the store and is not completed" for id in videos - completed]


class Gateway:
    """One gateway of the run."""

    def __init__(self, running: FleetStack, state: Path, *arguments: str) -> None:
        self._running, self._state, self._arguments, self._port = running, state, arguments, free_port()
        self.url = self._start()

    def kill_and_start(self) -> None:
        """kill -9, and another one at the same place."""
        process = self._running.gateways[self._port]
        process.kill()
        process.wait()
        self._start()

    def _start(self) -> str:
        return self._running.start_gateway(self._state, *self._arguments, port=self._port)


def _prompt(number: int) -> str:
    return f"job {number}"


def show(record: Record, console: Console) -> None:
    """Print the ledger."""
    table = Table(
        "ledger", "", title=f"{len(record.accepted)} jobs, {record.kills.total()} kills, {record.seconds:.0f} s"
    )
    for how, number in record.ended.most_common():
        table.add_row(f"ended in: {how}", str(number))
    table.add_section()
    for whom, number in record.kills.most_common():
        table.add_row(f"kill -9 of a {whom}", str(number))
    table.add_section()
    table.add_row("wrong, forgotten, twice, inconsistent", "\n".join(record.problems[:20]) or "0")
    console.print(table)


def run(work: Path, jobs: int, seed: int, on_postgresql: bool, routers: int, on_end: Callable[[], None]) -> Record:
    """One gateway on SQLite, or two on PostgreSQL, before a real frontend and a worker without a model; with routers
    there are two workers behind them.

    Raises StackError.
    """
    program = (sys.executable, "-m", "ltx2_pool.tools.bench.fakeworker")
    with contextlib.ExitStack() as cleanup:
        database = ("--database", cleanup.enter_context(postgres.server())) if on_postgresql else ()
        running = FleetStack(
            work / "logs", work, TINY_MENU, work, workers=2 if routers else 1, routers=routers, program=program
        )
        cleanup.enter_context(running)
        arguments = ("--claim-timeout", "3", *database)
        gateways = [Gateway(running, work / "state", *arguments) for _ in range(2 if on_postgresql else 1)]
        chaos = JobsChaos(running, gateways, work / "state/videos", KILL_EVERY, seed)
        return asyncio.run(chaos.run(jobs, on_end))
