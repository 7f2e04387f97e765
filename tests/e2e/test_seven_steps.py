"""The validation steps of the first systems, against the real frontend and the real pipeline, in their order."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import psutil

from ltx2_pool.words.requests import MAX_SEED

from .conftest import A, B, C, ask, check, merge, pids, wait


def test_step_1_smoke(pool):
    info = check(ask(pool, A), A)
    assert info.comment.startswith(f"shape={A.key} seed=42 steps=2 guidance=1 fps=24 prompt=sha256:")


def test_step_2_persistence(pool):
    before = pids(pool)
    first, second = ask(pool, A), ask(pool, A)
    assert pids(pool) == before
    assert first == second


def test_step_3_second_shape_fills_k(pool):
    before = pids(pool)
    check(ask(pool, B), B)
    after = pids(pool)
    assert after.keys() == {A.key, B.key}
    assert after[A.key] == before[A.key]


def test_step_4_third_shape_evicts_the_least_recently_used(pool):
    ask(pool, A)
    before = pids(pool)
    with ThreadPoolExecutor(1) as other:
        cold = other.submit(ask, pool, C)
        # The spawn of C takes seconds; A is hot and served in the meantime.
        wait(lambda: pids(pool).keys() == {A.key, C.key})
        check(ask(pool, A), A)
        assert not cold.done()
        check(cold.result(), C)
    after = pids(pool)
    assert after.keys() == {A.key, C.key}
    assert after[A.key] == before[A.key]
    assert not psutil.pid_exists(before[B.key])


def test_step_5_soft_error_keeps_the_process(pool):
    before = pids(pool)
    answer = pool.create(size=A.size, nvext={"num_frames": A.num_frames, "seed": MAX_SEED})
    assert answer.status_code == 400
    assert "StageVerificationError" in answer.json()["message"]
    assert "Failed fields: seed" in answer.json()["message"]
    check(ask(pool, A), A)
    assert pids(pool) == before


def test_step_6_kill_9_then_respawn(pool):
    before = pids(pool)
    expected = ask(pool, A)
    os.kill(before[A.key], signal.SIGKILL)
    assert ask(pool, A) == expected
    assert pids(pool)[A.key] != before[A.key]
    assert pids(pool)[C.key] == before[C.key]


def test_step_7_pool_mode_unset(make_stack, baked, tmp_path):
    merge(baked, tmp_path / "in-process", A, B)
    plain = make_stack(cache_root=tmp_path)
    data = ask(plain, A)
    check(data, A)
    check(ask(plain, B), B)
    made = {(p["shape"], p["pid"], p["jobs_done"]) for p in plain.status()["processes"]}
    assert made == {(A.key, plain.worker.pid, 1), (B.key, plain.worker.pid, 1)}
    helpers = {plain.status()["helpers"]["pictures"]}
    others = [child for child in psutil.Process(plain.worker.pid).children() if child.pid not in helpers]
    assert len(others) <= 1  # inductor's compile workers, no shape process
