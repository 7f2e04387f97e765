"""What children see of the worker's environment, and what the worker denies itself."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from ltx2_pool.processes.environment import inherited
from ltx2_pool.processes.guard import Guard
from ltx2_pool.processes.spawner import ExecSpawner, Spawner
from ltx2_pool.processes.zygote import ZygoteSpawner

ROOT = Path(__file__).parents[2]
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "s3cret",
    "DYN_TOKEN": "s3cret",
    "ETCD_AUTH_PASSWORD": "s3cret",
    "HF_TOKEN": "s3cret",
    "NVIDIA_API_KEY": "s3cret",
    "PYTHON_KEYRING_PASSWORD": "s3cret",
    "HTTPS_PROXY": "http://user:s3cret@proxy",
}


SYSTEM = "PATH HOME LC_ALL TMPDIR LD_LIBRARY_PATH PYTHONPATH XDG_CACHE_HOME CC CXX COVERAGE_PROCESS_START"
MODEL = """
    CUDA_VISIBLE_DEVICES NVIDIA_VISIBLE_DEVICES TORCH_LOGS TORCHINDUCTOR_CACHE_DIR PYTORCH_CUDA_ALLOC_CONF HF_HOME
    TRITON_CACHE_DIR OMP_NUM_THREADS FASTVIDEO_ATTENTION_BACKEND TOKENIZERS_PARALLELISM LTX2_IMAGINARY_DELAY
"""


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_are_not_inherited(name: str) -> None:
    assert inherited({name: "s3cret", "PATH": "/bin"}) == {"PATH": "/bin"}


@pytest.mark.parametrize(
    "name",
    f"{SYSTEM} {MODEL}".split(),
)
def test_what_the_model_needs_is_inherited(name: str) -> None:
    assert inherited({name: "1"}) == {name: "1"}


def environ_of(pid: int) -> str:
    return Path(f"/proc/{pid}/environ").read_text()


@pytest.mark.parametrize("kind", ["exec", "zygote"])
async def test_a_child_cannot_find_the_workers_secrets_in_its_own_environment(kind: str, monkeypatch: Any) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    program = "import sys; from tests.processes.zygote_child import serve; serve(int(sys.argv[1]))"
    guard = Guard()
    spawner: Spawner = (
        ExecSpawner([sys.executable, "-c", program])
        if kind == "exec"
        else ZygoteSpawner({}, guard, program="tests.processes.zygote_child:serve", preload=[])
    )
    mine, theirs = socket.socketpair()
    async with asyncio.timeout(30):
        with mine:
            with theirs:
                launched = await spawner.launch({"OF_THE_RECIPE": "1"}, [theirs.fileno()], 2)
            mine.setblocking(False)
            await asyncio.get_running_loop().sock_sendall(mine, b"environ OF_THE_RECIPE")
            assert await asyncio.get_running_loop().sock_recv(mine, 10) == b"1"
            for name in SECRETS:
                await asyncio.get_running_loop().sock_sendall(mine, f"environ {name}".encode())
                assert await asyncio.get_running_loop().sock_recv(mine, 10) == b"-"
            for pid in {launched.pid, psutil.Process(launched.pid).ppid()} - {os.getpid()}:
                assert "s3cret" not in environ_of(pid)
        await launched.exited
        await spawner.close()


def test_a_hardened_worker_writes_files_for_itself_alone_and_dumps_no_core(tmp_path: Path) -> None:
    program = (
        "import pathlib, resource, sys; from ltx2_pool.processes.environment import harden; harden();"
        "pathlib.Path(sys.argv[1]).touch(); print(*resource.getrlimit(resource.RLIMIT_CORE))"
    )
    made = tmp_path / "made"
    done = subprocess.run(
        [sys.executable, "-c", program, str(made)], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.split() == ["0", "0"]
    assert made.stat().st_mode & 0o777 == 0o600
