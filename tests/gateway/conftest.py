"""Gateways as their operators start them, in front of a made-up frontend, on SQLite or PostgreSQL."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from ltx2_pool.gateway import keys
from ltx2_pool.tools import postgres, stack
from tests import waiting
from tests.gateway.made_up import Frontend


class Running:
    """One gateway process, and a client of it."""

    def __init__(self, state: Path, options: Mapping[str, str]) -> None:
        self.state = state
        self.port = stack.free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        defaults = {
            "--port": str(self.port),
            "--database": f"sqlite+aiosqlite:///{state}/jobs.sqlite",
            "--content": f"file://{state}/videos",
        }
        self.options = {**defaults, **options}
        self.log = state / f"gateway-{self.port}.log"
        self.client = httpx.Client(base_url=self.url, timeout=30)
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        command = [*stack.GATEWAY, *(part for option in self.options.items() for part in option)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LTX2_")}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        stack.await_answer(f"{self.url}/health", self.process, self.log.read_text)
        return self.process

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def create(self, prompt: str = "a red fox", **fields: Any) -> str:
        answer = self.client.post("/v1/videos", json={"prompt": prompt, **fields})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def get(self, id: str) -> dict[str, Any]:
        answer = self.client.get(f"/v1/videos/{id}")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def ended(self, id: str) -> dict[str, Any]:
        """The job when it has ended."""
        return wait(lambda: job if (job := self.get(id))["status"] in ("completed", "failed") else None)

    def count(self, series: str) -> float:
        """The value of a series, labels as they are written."""
        for line in self.client.get("/metrics").text.splitlines():
            if line.startswith(f"{series} "):
                return float(line.split()[-1])
        raise AssertionError(f"no {series}")


wait = functools.partial(waiting.wait, timeout=30)


@contextlib.contextmanager
def gateways(directory: Path) -> Iterator[Callable[..., Running]]:
    """Starts gateways, and stops them at the end; what they log is shown when a test fails."""
    started: list[Running] = []

    def make(frontend: Frontend, state: Path = directory, **options: str) -> Running:
        options = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
        started.append(Running(state, {"--frontend": frontend.url, "--workers": frontend.url, **options}))
        return started[-1]

    yield make
    for running in started:
        running.client.close()
        assert running.stop() in (0, -signal.SIGKILL), running.log.read_text()
        assert "Traceback" not in running.log.read_text(), running.log.read_text()


@pytest.fixture(scope="module")
def frontend() -> Iterator[Frontend]:
    with Frontend() as made_up:
        yield made_up


@pytest.fixture
def own_frontend() -> Iterator[Frontend]:
    """A frontend of a test's own."""
    with Frontend() as made_up:
        yield made_up


@pytest.fixture(scope="module")
def gateway(frontend, tmp_path_factory) -> Iterator[Running]:
    """A gateway without keys, for all tests of a module."""
    with gateways(tmp_path_factory.mktemp("gateway")) as make:
        yield make(frontend)


@pytest.fixture
def make_gateway(tmp_path) -> Iterator[Callable[..., Running]]:
    with gateways(tmp_path) as make:
        yield make


@pytest.fixture(scope="module")
def keyed(frontend, tmp_path_factory) -> Iterator[tuple[Running, httpx.Client, httpx.Client]]:
    """A gateway with keys, and the clients of two of them: `b` may have two jobs at once."""
    directory = tmp_path_factory.mktemp("keyed")
    (a, line_a), (b, line_b) = keys.make("a"), keys.make("b")
    file = directory / "keys"
    file.write_text(f"# two\n{line_a}\n{line_b} max_active=2\n")
    with gateways(directory) as make:
        running = make(frontend, api_keys=str(file))
        clients = [httpx.Client(base_url=running.url, headers={"authorization": f"Bearer {key}"}) for key in (a, b)]
        yield running, clients[0], clients[1]
        for client in clients:
            client.close()


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """The URL of its first database."""
    if postgres.binaries() is None:
        missing = "PostgreSQL is not installed (Debian: apt-get install postgresql)"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    with postgres.server() as url:
        yield url


@pytest.fixture
def postgresql(postgresql_server) -> str:
    """The URL of an empty database. It is the test's own: a gateway makes every job that it finds."""
    server, _, _ = postgresql_server.rpartition("/")
    name = f"test{next(_databases)}"
    there = postgres.binaries()
    assert there is not None
    address = httpx.URL(server)
    command = [there / "createdb", f"--host={address.host}", f"--port={address.port}", "--username=ltx2", name]
    subprocess.run(command, check=True, timeout=60)
    return f"{server}/{name}"


_databases = itertools.count()
