"""A Dynamo frontend and a worker on this machine's loopback: for the demo, the tests and the benchmarks."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, get_args

import httpx

from ltx2_pool.processes.guard import Guard
from ltx2_pool.words.checkpoint import Kind, Version
from ltx2_pool.words.menu import Menu

TINY_MENU = Path(__file__).with_name("tiny.yaml")
"""Three shapes that a CPU makes in seconds with the tiny checkpoint."""
WORKER = (sys.executable, "-m", "ltx2_pool.programs.worker")
GATEWAY = (sys.executable, "-m", "ltx2_pool.programs.gateway")
CHECKPOINTS: dict[str, tuple[Kind, Version]] = {
    f"{version}-{kind}": (kind, version) for version in get_args(Version) for kind in ("distilled", "base")
}
"""Every kind of tiny checkpoint that :func:`checkpoint` writes, by a short name."""
_POLL = 0.05


class StackError(Exception):
    """The stack did not come up. The message ends with the log's last lines."""


def checkpoint(work: Path, kind: Kind = "distilled", version: Version = "2.0") -> Path:
    """A tiny checkpoint, written once for this version of :mod:`ltx2_pool.tools.tiny`. Raises CalledProcessError."""
    here = Path(__file__).parent
    parts = ("tiny.py", "components.py", "dimensions.py", "tinyvae.py", "tokenizer.py")
    drawing = ("clips.py", "mosaic.py", "weights.safetensors")
    paths = [*(here / name for name in parts), *(here / "drawing" / name for name in drawing)]
    source = b"".join(path.read_bytes() for path in paths)
    name = "ltx2-tiny" if (kind, version) == ("distilled", "2.0") else f"ltx{version}-{kind}-tiny"
    directory = work / f"{name}-{hashlib.sha256(source).hexdigest()[:8]}"
    if not directory.exists():
        environment = {**os.environ, "FASTVIDEO_LOGGING_LEVEL": "ERROR"}
        work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=work) as unfinished:
            written = Path(unfinished) / "checkpoint"
            subprocess.run(
                [sys.executable, "-m", "ltx2_pool.tools.tiny", str(written), "--kind", kind, "--version", version],
                check=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
            try:
                written.rename(directory)
            except OSError:
                if not directory.exists():  # else somebody was faster
                    raise
    return directory


def free_port() -> int:
    """A TCP port that nobody listens on now.

    Below 32768: Dynamo reads DYN_SYSTEM_PORT into a signed 16-bit number, and no outgoing connection takes it.
    """
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Stack:
    """Frontend and worker with file discovery and TCP: no etcd, no NATS, nothing beyond 127.0.0.1.

    Both die with this process. Their logs are ``frontend.log`` and ``worker.log`` in `directory`.
    """

    def __init__(
        self,
        directory: Path,
        model: Path,
        shapes: Path,
        cache_root: Path,
        *,
        program: Sequence[str] = WORKER,
        **environment: str,
    ) -> None:
        self.directory = directory
        self._program = program
        self.http_port = free_port()
        self.system_port = free_port()
        self.model_name = ""
        self._environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("DYN_", "LTX2_"))},
            "DYN_DISCOVERY_BACKEND": "file",
            "DYN_FILE_KV": str(directory / "discovery"),
            "DYN_REQUEST_PLANE": "tcp",
            "DYN_EVENT_PLANE": "zmq",
            "DYN_TCP_RPC_HOST": "127.0.0.1",
            "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1",
            "LTX2_MODEL": str(model),
            "LTX2_SHAPES": str(shapes),
            "LTX2_CACHE_ROOT": str(cache_root),
            **environment,
        }
        self.frontend: subprocess.Popen[bytes] | None = None
        self.worker: subprocess.Popen[bytes] | None = None
        self.gateways: dict[int, subprocess.Popen[bytes]] = {}
        """By port."""
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.http_port}", timeout=600)
        self._guard = Guard()

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._guard.start()
        try:
            self.start_frontend()
            self.start_worker()
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def start_frontend(self) -> None:
        self.frontend = self._start(
            "frontend",
            [sys.executable, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(self.http_port)],
        )

    def start_worker(self, *arguments: str) -> None:
        self.worker = self._start(
            "worker",
            [*self._program, *arguments],
            {"DYN_SYSTEM_PORT": str(self.system_port), "DYN_SYSTEM_HOST": "127.0.0.1"},
        )

    def start_gateway(self, state: Path, *arguments: str, port: int | None = None) -> str:
        """A gateway that keeps its jobs and videos in a directory; returns its URL, where it answers by now."""
        state.mkdir(parents=True, exist_ok=True)
        port = port or free_port()
        options = {
            "--frontend": f"http://127.0.0.1:{self.http_port}",
            "--workers": f"http://127.0.0.1:{self.system_port}",
            "--port": str(port),
            "--database": f"sqlite+aiosqlite:///{state.resolve()}/jobs.sqlite",
            "--content": f"file://{state.resolve()}/videos",
        }
        command = [*GATEWAY, *(part for option in options.items() for part in option), *arguments]
        self.gateways[port] = self._start("gateway", command)
        url = f"http://127.0.0.1:{port}"
        await_answer(f"{url}/health", self.gateways[port], lambda: self.log_tail("gateway"))
        return url

    def _start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        with (self.directory / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                env={**self._environment, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._guard.watch(process.pid)
        return process

    def wait_ready(self, timeout: float = 180) -> str:
        """Wait until the frontend lists the menu's own model; returns its name. Raises StackError."""
        wanted = Menu.load(Path(self._environment["LTX2_SHAPES"])).model
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for name, process in self._parts().items():
                if process.poll() is not None:
                    raise StackError(f"the {name} ended with status {process.returncode}\n{self.log_tail(name)}")
            with contextlib.suppress(httpx.TransportError):
                listed = [model["id"] for model in self.client.get("/v1/models").json().get("data", [])]
                if wanted in listed:
                    self.model_name = wanted
                    return wanted
            time.sleep(_POLL)
        tails = "\n".join(self.log_tail(name) for name in self._parts() if name != "frontend")
        raise StackError(f"no model was registered within {timeout:g} s\n{tails}")

    def _parts(self) -> dict[str, subprocess.Popen[bytes]]:
        """What must run, by the name of its log."""
        parts = {"frontend": self.frontend, "worker": self.worker}
        return {name: process for name, process in parts.items() if process is not None}

    def create(self, prompt: str = "a red fox in the snow", **fields: Any) -> httpx.Response:
        """POST /v1/videos; `fields` are the request's, nvext's are given as ``nvext={...}``."""
        body = {"model": self.model_name, "prompt": prompt, "response_format": "b64_json", **fields}
        return self.client.post("/v1/videos", json={k: v for k, v in body.items() if v is not None})

    def stream(self, prompt: str = "a red fox in the snow", **fields: Any) -> Iterator[str]:
        """The same with ``stream: true``: the payloads of the server-sent events."""
        body = {"model": self.model_name, "prompt": prompt, "response_format": "b64_json", "stream": True, **fields}
        with self.client.stream("POST", "/v1/videos", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    yield line.removeprefix("data: ")

    def status(self) -> dict[str, Any]:
        """What the worker says of its pool."""
        return status_at(self.system_port)

    def log(self, name: str) -> str:
        """All that the frontend or the worker has printed."""
        path = self.directory / f"{name}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def log_tail(self, name: str, lines: int = 30) -> str:
        return "\n".join(self.log(name).splitlines()[-lines:])

    def stop_worker(self, timeout: float = 60) -> int:
        """SIGTERM, then SIGKILL after the timeout; returns the exit status."""
        return stop(self.worker, timeout)

    def stop_gateways(self, timeout: float = 90) -> list[int]:
        """SIGTERM, then SIGKILL after the timeout; returns the exit statuses."""
        return [stop(gateway, timeout) for gateway in self.gateways.values()]

    def close(self) -> None:
        """Stop everything that was started."""
        self.stop_gateways()
        stop(self.worker, 60)
        stop(self.frontend, 20)
        self.client.close()
        for process in (self.worker, self.frontend, *self.gateways.values()):
            if process is not None:
                self._guard.forget(process.pid)
        self._guard.close()


def status_at(port: int) -> dict[str, Any]:
    """What the worker with that system port says of its pool. Raises HTTPError."""
    answer = httpx.get(f"http://127.0.0.1:{port}/engine/video/status", timeout=10)
    status: dict[str, Any] = answer.raise_for_status().json()
    return status


def await_answer(url: str, process: subprocess.Popen[bytes], log: Callable[[], str], timeout: float = 60) -> None:
    """Wait until a program answers 200 there. Raises StackError."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise StackError(f"the program for {url} ended with status {process.returncode}\n{log()}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=5).status_code == 200:
                return
        time.sleep(_POLL)
    raise StackError(f"{url} did not answer within {timeout:g} s\n{log()}")


def stop(process: subprocess.Popen[bytes] | None, timeout: float) -> int:
    """SIGTERM, then SIGKILL after the timeout; returns the exit status."""
    if process is None:
        return 0
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait(10)
