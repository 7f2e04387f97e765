"""``benchmark.py polling``: what a status call of the gateway takes when thousands of clients poll, as a ratio."""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from ltx2_pool.tools.stack import TINY_MENU, Stack, free_port

ALONE = 300
"""Calls of the one client that is measured first."""


@dataclass
class Result:
    """Seconds of single calls, and what it took to answer them."""

    alone: list[float] = field(default_factory=list)
    together: list[float] = field(default_factory=list)
    wrong: int = 0
    clients: int = 0
    seconds: float = 0
    rss_mb: tuple[float, float] = (0, 0)
    """Of the gateway, after a quarter of the time and at the end."""

    @property
    def ratio(self) -> float:
        """p99 of many over p50 of one."""
        return float(np.percentile(self.together, 99) / np.percentile(self.alone, 50))


def run(clients: int, seconds: float) -> Result:
    """A gateway with a job for each client, none of which is ever made: no frontend is there. Raises StackError."""
    with tempfile.TemporaryDirectory(prefix="ltx2-polling-") as directory:
        work = Path(directory)
        stack = Stack(work / "logs", work, TINY_MENU, work)
        options = ("--frontend", f"http://127.0.0.1:{free_port()}", "--shapes", str(TINY_MENU))
        limits = ("--max-queue", str(clients + 1), "--max-active-per-key", str(clients + 1))
        stack.directory.mkdir()
        try:
            url = stack.start_gateway(work / "state", *options, *limits)
            (gateway,) = stack.gateways.values()
            return asyncio.run(_poll(url, gateway.pid, clients, seconds))
        finally:
            stack.close()


async def _poll(url: str, pid: int, clients: int, seconds: float) -> Result:
    result, process = Result(clients=clients, seconds=seconds), psutil.Process(pid)
    ids = []
    async with httpx.AsyncClient(base_url=url) as http:
        for number in range(clients):
            answer = await http.post("/v1/videos", json={"prompt": f"job {number}"})
            ids.append(answer.raise_for_status().json()["id"])
    one = await _Client.connect(url, ids[0])
    for _ in range(ALONE):
        result.alone.append((await one.ask())[0])
    one.close()
    until = time.monotonic() + seconds

    async def client(id: str) -> None:
        """As OpenAI's: it asks again when the gateway says."""
        await asyncio.sleep(random.uniform(0, min(5, seconds / 4)))
        mine = await _Client.connect(url, id)
        try:
            while time.monotonic() < until:
                took, right, again = await mine.ask()
                result.together.append(took)
                result.wrong += not right
                await asyncio.sleep(again)
        finally:
            mine.close()

    async def weigh() -> None:
        await asyncio.sleep(seconds / 4)
        early = process.memory_info().rss / 1e6
        await asyncio.sleep(seconds * 3 / 4)
        result.rss_mb = (early, process.memory_info().rss / 1e6)

    async with asyncio.TaskGroup() as group:
        group.create_task(weigh())
        for id in ids:
            group.create_task(client(id))
    return result


class _Client:
    """One connection and one job. A client library would measure itself, with two thousand of them on a few cores."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, id: str) -> None:
        self._reader, self._writer, self._id = reader, writer, id
        self._request = f"GET /v1/videos/{id} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()

    @classmethod
    async def connect(cls, url: str, id: str) -> _Client:
        host, port = url.removeprefix("http://").split(":")
        return cls(*await asyncio.open_connection(host, int(port)), id)

    def close(self) -> None:
        self._writer.close()

    async def ask(self) -> tuple[float, bool, float]:
        """Seconds that the answer took, whether it is right, and seconds until the gateway wants to be asked again."""
        began = time.monotonic()
        self._writer.write(self._request)
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:] if line)
        body = await self._reader.readexactly(int(headers["content-length"]))
        took = time.monotonic() - began
        right = lines[0].startswith("HTTP/1.1 200") and json.loads(body)["id"] == self._id
        return took, right, int(headers.get("openai-poll-after-ms", 1000)) / 1000


def show(result: Result, console: Console) -> None:
    """Print the ratio, and what it consists of."""
    table = Table("", "one client", f"{result.clients} clients", title=f"status calls for {result.seconds:g} s")
    for percent in (50, 99):
        values = [f"{1000 * float(np.percentile(of, percent)):.1f} ms" for of in (result.alone, result.together)]
        table.add_row(f"p{percent}", *values)
    table.add_row("calls", str(len(result.alone)), str(len(result.together)))
    table.add_row("wrong answers", "", str(result.wrong))
    table.add_row("gateway's memory, MB", "", "{:.0f} -> {:.0f}".format(*result.rss_mb))
    console.print(table)
    console.print(f"p99 of {result.clients} clients over p50 of one: {result.ratio:.1f}")
