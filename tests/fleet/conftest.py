"""A real frontend, real routers, and workers with a made-up pool behind them."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ltx2_pool.tools.stack import TINY_MENU, Stack, _stop, free_port
from tests import waiting
from tests.paths import REPOSITORY

WORKER = (sys.executable, "-m", "tests.serving.made_up_worker")
ROUTER = (sys.executable, "-m", "ltx2_pool.programs.router")


class FleetStack(Stack):
    """Each worker is steered through a directory of its own, as tests/serving/made_up_worker.py says."""

    def __init__(self, directory: Path, workers: int, routers: int = 1, **environment: str) -> None:
        super().__init__(
            directory,
            directory,
            TINY_MENU,
            directory,
            LTX2_ROUTER="1",
            PYTHONPATH=str(REPOSITORY),
            LTX2_ROUTER_INTERVAL="0.1",
            **environment,
        )
        self.workers: list[subprocess.Popen[bytes]] = []
        self.routers: list[subprocess.Popen[bytes]] = []
        self.ports: list[int] = []
        self._wanted = workers, routers

    def start_worker(self, *arguments: str) -> None:
        workers, routers = self._wanted
        for _ in range(workers):
            self.add_worker()
        for _ in range(routers):
            self.add_router()

    def add_worker(self) -> None:
        steered = self.steered(len(self.workers))
        steered.mkdir(parents=True)
        self.ports.append(free_port())
        system = {"DYN_SYSTEM_PORT": str(self.ports[-1]), "DYN_SYSTEM_HOST": "127.0.0.1"}
        self.workers.append(self._start("worker", WORKER, {**system, "MADE_UP_DIR": str(steered)}))

    def add_router(self) -> None:
        system = {"DYN_SYSTEM_PORT": str(free_port()), "DYN_SYSTEM_HOST": "127.0.0.1"}
        self.router_port = int(system["DYN_SYSTEM_PORT"])
        self.routers.append(self._start("router", ROUTER, system))

    def steered(self, number: int) -> Path:
        return self.directory / f"worker{number}"

    def of(self, number: int) -> dict[str, Any]:
        """The status of a worker."""
        answer = httpx.get(f"http://127.0.0.1:{self.ports[number]}/engine/video/status", timeout=10)
        status: dict[str, Any] = answer.raise_for_status().json()
        return status

    def metric(self, name: str) -> float:
        """Of the last router: the sum over all labels that the name's rest begins with."""
        page = httpx.get(f"http://127.0.0.1:{self.router_port}/metrics", timeout=10).text
        lines = [line for line in page.splitlines() if line.startswith(name)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def close(self) -> None:
        for process in (*self.routers, *self.workers):
            _stop(process, 30)
            self._guard.forget(process.pid)
        super().close()


wait = functools.partial(waiting.wait, timeout=60)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetStack]:
    with FleetStack(tmp_path_factory.mktemp("fleet") / "stack", 3, 2, MADE_UP_PLACES="1") as running:
        wait(lambda: running.metric("ltx2_router_workers{") == 3)
        yield running
