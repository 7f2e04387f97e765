"""Faults of the surroundings, injected for real: checkpoint, caches, output directory, frontend, signals, GPU."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import uuid

import pytest
import uvloop

from ltx2_pool.caches import manifest
from ltx2_pool.processes import lock
from ltx2_pool.processes.subprocesses import ProcessHost
from ltx2_pool.serving.book import Book
from ltx2_pool.serving.breaker import Pauses
from ltx2_pool.serving.ledger import Ledger
from ltx2_pool.serving.pool import Pool
from ltx2_pool.tools.bench import fuzz
from ltx2_pool.words.device import Device
from ltx2_pool.words.menu import Menu
from ltx2_pool.words.outcomes import JobFailed, NoRoom, Unavailable
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.shapes import CacheDirs, Key, Shape
from tests.paths import REPOSITORY

from .conftest import MENU, A, B, alive, ask, check, family, file_size_limit, in_background, pids, wait
from .test_hot_pool import QUICK, job


def test_checkpoint_caches_and_output_directory_may_go_and_come_back(model, baked, tmp_path):
    checkpoint, caches, run_dir, scratch = (tmp_path / name for name in ("model", "cache", "run/videos", "scratch"))
    run_dir.parent.mkdir()
    checkpoint.symlink_to(model)
    ledger = Ledger({"cpu": sys.maxsize}, max_processes=2)
    for shape in (A, B):
        ledger.observe(Key(shape), manifest.read(CacheDirs.of(baked, Key(shape))).memory)
        shutil.copytree(baked / "per-shape" / shape.key, CacheDirs.of(caches, Key(shape)).root)

    async def body() -> None:
        host = ProcessHost(Recipe(model_path=str(checkpoint)), caches, scratch, QUICK, weights="private")
        book = Book(ledger, keys=[Key(A), Key(B)], pauses=Pauses(first=0.5, longest=0.5))
        pool = Pool(host, book, run_dir)
        await pool.start()

        async def video(shape: Shape) -> bytes:
            path = (await pool.generate(job(shape), lambda _: None)).path
            try:
                return path.read_bytes()
            finally:
                path.unlink()

        try:
            checkpoint.unlink()
            with pytest.raises(Unavailable, match=r"3 failed starts in a row.*it has no model_index.json"):
                await video(A)
            with pytest.raises(Unavailable, match="the next try is in"):
                await video(A)
            checkpoint.symlink_to(model)
            async with asyncio.timeout(10):
                while pool.status()["unavailable"]:  # noqa: ASYNC110 - it passes with the time
                    await asyncio.sleep(0.05)
            expected = await video(A)
            assert oct(run_dir.stat().st_mode & 0o777) == "0o700"

            # A file where the directory should be: the video cannot be written, and the process serves on.
            before = {p["shape"]: p["pid"] for p in pool.status()["processes"]}

            def block(_event: object = None) -> None:
                if run_dir.is_dir():
                    shutil.rmtree(run_dir)
                    run_dir.touch()

            block()
            with pytest.raises(NoRoom, match=r"cannot be made: .*(File exists|Not a directory)"):
                await video(A)
            run_dir.unlink()

            # The directory goes in the middle: the child holds the file open, and the answer has no file any more.
            lost = await pool.generate(job(A), block)
            assert not lost.path.exists()
            run_dir.unlink()
            assert await video(A) == expected
            assert {p["shape"]: p["pid"] for p in pool.status()["processes"]} == before

            # No room for the file: the same, and the process serves on when there is room again.
            with file_size_limit(before[A.key], 1000), pytest.raises(JobFailed, match="File too large"):
                await pool.generate(job(A), lambda _: None)
            assert list(run_dir.iterdir()) == []
            assert await video(A) == expected
            assert {p["shape"]: p["pid"] for p in pool.status()["processes"]} == before

            # A hot process does not need its cache any more; the next one finds rubbish, or nothing, and compiles.
            shutil.rmtree(CacheDirs.of(caches, Key(A)).root)
            assert await video(A) == expected
            for path in CacheDirs.of(caches, Key(B)).root.rglob("*"):
                if path.is_file():
                    path.write_bytes(b"rubbish")
            assert await video(B)
            assert any((scratch / "caches" / f"{B.key}-1").rglob("*.so"))
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


def test_a_second_sigterm_does_not_wait_for_a_job_that_hangs(make_stack):
    worker = make_stack(LTX2_POOL_MODE="1")
    ask(worker, A)
    tree = family(worker)
    os.kill(pids(worker)[A.key], signal.SIGSTOP)
    answer = in_background(lambda: worker.create(size=A.size))
    wait(lambda: worker.status()["running"])
    worker.worker.send_signal(signal.SIGTERM)
    wait(lambda: "draining 1 jobs" in worker.log("worker"))
    assert worker.stop_worker() == 0
    assert answer.result(60).status_code == 503
    assert alive(tree) == []


ON_A_GPU = """
import sys
from ltx2_pool.programs import worker
from tests.unit.fake_pynvml import Gpu, Nvml

sys.modules["pynvml"] = Nvml([Gpu(sys.argv[1])])
sys.exit(worker.main(sys.argv[2:]))
"""


def test_two_workers_cannot_share_a_gpu(model, tmp_path):
    """The driver is made up, and the lock is the worker's own."""
    gpu = Device(f"GPU-{uuid.uuid4()}", "NVIDIA H100", "9.0")
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("CUDA_", "LTX2_"))}
    held = lock.hold(gpu)
    try:
        second = subprocess.run(
            [sys.executable, "-c", ON_A_GPU, gpu.id, "--model", str(model), "--shapes", str(MENU)],
            env={**environment, "PYTHONPATH": str(REPOSITORY), "LTX2_RUN_DIR": str(tmp_path / "run")},
            capture_output=True,
            text=True,
            timeout=60,
        )
    finally:
        os.close(held)
    assert second.returncode == 2
    assert f"another worker (pid {os.getpid()}, user {os.geteuid()}) serves NVIDIA H100 ({gpu.id})" in second.stderr
    assert "LTX2_DEVICES" in second.stderr
    assert not (tmp_path / "run").exists()
