"""Faults of the surroundings, injected for real: checkpoint, caches, output directory, frontend, signals, GPU."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import psutil
import pytest
import uvloop

from ltx2_pool.processes.host import ProcessHost
from ltx2_pool.processes.process import JobFailed, ProcessLost
from ltx2_pool.serving.breaker import Breaker
from ltx2_pool.serving.capacity import FixedCapacity
from ltx2_pool.serving.pool import SubprocessPool, Unavailable
from ltx2_pool.tools.bench import fuzz
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.shapes import CacheDirs, Menu
from tests.paths import REPOSITORY

from .conftest import MENU, A, B, alive, ask, check, family, pids
from .test_hot_pool import QUICK, job


def test_checkpoint_caches_and_output_directory_may_go_and_come_back(model, baked, tmp_path):
    checkpoint, caches, run_dir = tmp_path / "model", tmp_path / "cache", tmp_path / "run"
    checkpoint.symlink_to(model)
    for shape in (A, B):
        shutil.copytree(baked / "per-shape" / shape.key, CacheDirs.of(caches, shape).root)

    async def body() -> None:
        host = ProcessHost(Recipe(model_path=str(checkpoint)), QUICK)
        now = 0.0
        pool = SubprocessPool(
            host, caches, run_dir, capacity=FixedCapacity(2), make_breaker=lambda: Breaker(clock=lambda: now)
        )
        await pool.start()

        async def video(shape) -> bytes:
            path = (await pool.generate(job(shape), lambda _: None)).path
            try:
                return path.read_bytes()
            finally:
                path.unlink()

        try:
            checkpoint.unlink()
            with pytest.raises(ProcessLost, match="is not a checkpoint: it has no model_index"):
                await video(A)
            checkpoint.symlink_to(model)
            with pytest.raises(Unavailable, match="left alone for 30 s"):
                await video(A)
            now += 31
            expected = await video(A)
            assert oct(run_dir.stat().st_mode & 0o777) == "0o700"

            # A file where the directory should be: the video can not be written, and the process serves on.
            before = {p["shape"]: p["pid"] for p in pool.status()["processes"]}

            def block(_event: object) -> None:
                if run_dir.is_dir():
                    shutil.rmtree(run_dir)
                    run_dir.touch()

            with pytest.raises(JobFailed, match="NotADirectoryError"):
                await pool.generate(job(A), block)
            run_dir.unlink()
            assert await video(A) == expected
            assert {p["shape"]: p["pid"] for p in pool.status()["processes"]} == before

            # No room for the file: the same, and the process serves on when there is room again.
            child = psutil.Process(before[A.key])
            unlimited = child.rlimit(psutil.RLIMIT_FSIZE)
            child.rlimit(psutil.RLIMIT_FSIZE, (1000, unlimited[1]))
            with pytest.raises(JobFailed, match="File too large"):
                await pool.generate(job(A), lambda _: None)
            child.rlimit(psutil.RLIMIT_FSIZE, unlimited)
            assert list(run_dir.iterdir()) == []
            assert await video(A) == expected

            # A hot process does not need its cache any more; the next one finds rubbish, or nothing, and compiles.
            shutil.rmtree(CacheDirs.of(caches, A).root)
            assert await video(A) == expected
            for path in CacheDirs.of(caches, B).root.rglob("*"):
                if path.is_file():
                    path.write_bytes(b"rubbish")
            assert await video(B)
            assert CacheDirs.of(caches, B).root.with_name(f"{B.key}.damaged").is_dir()
        finally:
            await pool.close()

    uvloop.run(body())


def test_random_requests_cost_no_process(pool):
    ask(pool, A)
    statuses = fuzz.run(pool, Menu.load(MENU), 250, 7, lambda: None)
    assert statuses[400] > 150
    check(ask(pool, A), A)


def test_the_frontend_may_go_and_come_back(pool):
    expected = ask(pool, A)
    before = pids(pool)
    pool.frontend.kill()
    pool.frontend.wait()
    pool.start_frontend()
    pool.wait_ready()
    assert ask(pool, A) == expected
    assert pids(pool) == before


def test_a_second_sigterm_does_not_wait_for_a_job_that_hangs(pool, make_stack):
    worker = make_stack(LTX2_POOL_MODE="1")
    ask(worker, A)
    tree = family(worker)
    answers: list[httpx.Response] = []
    os.kill(pids(worker)[A.key], signal.SIGSTOP)
    request = threading.Thread(target=lambda: answers.append(worker.create(size=A.size)))
    request.start()
    while not worker.status()["running"]:
        pass
    worker.worker.send_signal(signal.SIGTERM)
    while "draining 1 jobs" not in worker.log("worker"):
        assert worker.worker.poll() is None
    assert worker.stop_worker() == 0
    request.join()
    assert answers[0].status_code == 503
    assert alive(tree) == []


def test_two_workers_can_not_share_a_gpu(model, tmp_path):
    """The driver's tool is imitated: the lock is the worker's own."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA Imaginary, 9.0, 1000, GPU-imaginary'\n")
    tool.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(REPOSITORY / "worker.py"), "--model", str(model), "--shapes", str(MENU)]
    with Path(tmp_path / "ltx2-pool-GPU-imaginary.lock").open("w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        first.write("4711")
        first.flush()
        second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert second.returncode == 2
    assert "another worker (pid 4711) serves this GPU (GPU-imaginary)" in second.stderr
    assert "CUDA_VISIBLE_DEVICES" in second.stderr
