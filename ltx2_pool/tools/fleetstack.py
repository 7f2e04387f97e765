"""A frontend, several workers and several routers on this machine's loopback: for the tests and the benchmarks."""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from ltx2_pool.tools.stack import WORKER, Stack, StackError, await_answer, free_port, status_at, stop

ROUTER = (sys.executable, "-m", "ltx2_pool.programs.router")


class FleetStack(Stack):
    """Workers behind routers; without any router they register the model themselves, and Dynamo goes round them.

    Their logs are ``worker0.log``, ``router0.log`` and so on.
    """

    def __init__(
        self,
        directory: Path,
        model: Path,
        shapes: Path,
        cache_root: Path,
        *,
        workers: int,
        routers: int = 0,
        program: Sequence[str] = WORKER,
        **environment: str,
    ) -> None:
        if routers:
            environment = {"LTX2_ROUTER": "1", **environment}
        super().__init__(directory, model, shapes, cache_root, program=program, **environment)
        self.workers: list[subprocess.Popen[bytes]] = []
        self.routers: list[subprocess.Popen[bytes]] = []
        self.worker_ports: list[int] = []
        self.router_ports: list[int] = []
        self._wanted = workers, routers

    def start_worker(self, *arguments: str) -> None:
        """All of them, and the routers."""
        workers, routers = self._wanted
        for _ in range(workers):
            self.add_worker(*arguments)
        for _ in range(routers):
            self.add_router()

    def add_worker(self, *arguments: str) -> None:
        """One more, with a memory of its own of what was asked for."""
        self.worker_ports.append(free_port())
        self.workers.append(self._worker(len(self.workers), *arguments))

    def add_router(self) -> None:
        """One more."""
        self.router_ports.append(free_port())
        self.routers.append(self._router(len(self.routers)))

    def replace_worker(self, number: int) -> None:
        """kill -9, and another one in its place."""
        self._kill(self.workers[number])
        self.workers[number] = self._worker(number)

    def replace_router(self, number: int) -> None:
        """The same of a router."""
        self._kill(self.routers[number])
        self.routers[number] = self._router(number)

    def _worker(self, number: int, *arguments: str) -> subprocess.Popen[bytes]:
        name = f"worker{number}"
        own = {"LTX2_TRAFFIC_FILE": str(self.directory / f"{name}-traffic.json"), **self.of_worker(number)}
        return self._start(name, [*self._program, *arguments], {**own, **_system(self.worker_ports[number])})

    def _router(self, number: int) -> subprocess.Popen[bytes]:
        return self._start(f"router{number}", ROUTER, _system(self.router_ports[number]))

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        self._guard.forget(process.pid)

    def of_worker(self, number: int) -> Mapping[str, str]:
        """Environment variables for one worker only."""
        return {}

    def wait_ready(self, timeout: float = 180) -> str:
        """Wait until the frontend lists the model, every worker is ready and every router has heard each of them."""
        name = super().wait_ready(timeout)
        ports = (*self.worker_ports, *self.router_ports)
        parts = [(name, process) for name, process in self._parts().items() if name != "frontend"]
        for port, (name, process) in zip(ports, parts, strict=True):
            await_answer(f"http://127.0.0.1:{port}/health", process, functools.partial(self.log_tail, name), timeout)
        deadline = time.monotonic() + timeout
        for router in range(len(self.routers)):
            while self.metric("ltx2_router_workers{", router, state="heard") < len(self.workers):
                if time.monotonic() > deadline:
                    raise StackError(f"router{router} has not heard every worker\n{self.log_tail(f'router{router}')}")
                time.sleep(0.05)
        return name

    def _parts(self) -> dict[str, subprocess.Popen[bytes]]:
        parts = super()._parts()
        parts |= {f"worker{number}": process for number, process in enumerate(self.workers)}
        return parts | {f"router{number}": process for number, process in enumerate(self.routers)}

    def status_of(self, number: int) -> dict[str, Any]:
        """What a worker says of its pool."""
        return status_at(self.worker_ports[number])

    def metric(self, beginning: str, number: int = -1, **labels: str) -> float:
        """Of a router: the sum of all series that begin so and have these labels."""
        return _sum(self.router_ports[number], beginning, labels)

    def close(self) -> None:
        processes = (*self.routers, *self.workers)
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            stop(process, 60)
            self._guard.forget(process.pid)
        super().close()


def _system(port: int) -> dict[str, str]:
    return {"DYN_SYSTEM_PORT": str(port), "DYN_SYSTEM_HOST": "127.0.0.1"}


def _sum(port: int, beginning: str, labels: Mapping[str, str]) -> float:
    page = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=10).raise_for_status().text
    wanted = [f'{name}="{value}"' for name, value in labels.items()]
    lines = [line for line in page.splitlines() if line.startswith(beginning) and all(one in line for one in wanted)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)
