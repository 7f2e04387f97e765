"""Zygote and lent weights: every shape hot, and nothing lost when one of the helpers is killed."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import uvloop

from ltx2_pool.caches import manifest
from ltx2_pool.processes import weights
from ltx2_pool.processes.process import Timeouts
from ltx2_pool.processes.shape import ShapeProcess
from ltx2_pool.processes.subprocesses import ProcessHost
from ltx2_pool.tools.stack import Stack
from ltx2_pool.words import lending, requests
from ltx2_pool.words.menu import Menu
from ltx2_pool.words.outcomes import ProcessLost
from ltx2_pool.words.protocol import Compiled, Ready
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import CacheDirs, Key, Shape

from .conftest import LENIENT, MENU, A, B, C, ask, check, family, pids, wait

QUICK = Timeouts(spawn=120, weights=120, generation=120, cancel=10, term=10)
OFFERS = Menu.load(MENU).offers
_ids = itertools.count()


def job(shape: Shape, steps: int = 2) -> Job:
    return Job(f"job{next(_ids)}", shape, "a fox", 42, steps, 1.0, 24)


@contextlib.asynccontextmanager
async def processes(
    host: ProcessHost, *shapes: Shape, warm: bool = False
) -> AsyncIterator[list[tuple[ShapeProcess, Ready]]]:
    """READY shape processes that are ended, with everything they needed, afterwards."""
    before = psutil.Process().children()
    await host.start()
    started = []
    try:
        for shape in shapes:
            process = host.process(Key(shape))
            menu = Menu.load(MENU)
            warm_up = requests.warm_up(menu, menu.offer(Key(shape))) if warm else ()
            started.append((process, await host.start_process(process, warm_up)))
        yield started
    finally:
        for process, _ in started:
            process.kill()
            await process.exited()
        await host.close()
        assert [child for child in psutil.Process().children() if child not in before] == []


async def make(process: ShapeProcess, video: Job, output_dir: Path) -> tuple[bytes, Compiled]:
    output = output_dir / f"{video.id}.mp4"
    output.touch()
    done = await process.generate(video, output, lambda _: None)
    return output.read_bytes(), done.compiled


def bakes_job(baked: Path, shape: Shape) -> tuple[Job, str]:
    """What the bake made, by forks that borrowed their weights, and the digest of what came out."""
    found = manifest.read(CacheDirs.of(baked, Key(shape)))
    return Job(f"job{next(_ids)}", shape, **found.job), found.video_sha256


def test_an_interpreter_with_its_own_weights_hits_the_same_keys_and_makes_the_same_bytes(model, baked, tmp_path):
    video, digest = bakes_job(baked, A)

    async def body() -> None:
        recipe = Recipe(model_path=str(model))
        host = ProcessHost(recipe, baked, tmp_path / "scratch", QUICK, spawn="exec", weights="private", offers=OFFERS)
        async with processes(host, A) as ((process, _),):
            data, compiled = await make(process, video, tmp_path)
            assert compiled == Compiled(graph_hits=1, autograd_hits=1)
            assert hashlib.sha256(data).hexdigest() == digest
            assert process.memory.weights > 0

    uvloop.run(body())


def test_ready_means_hot(model, baked, tmp_path):
    """Here in forks that load their own weights: those that borrow are in every other test."""
    video, digest = bakes_job(baked, A)

    async def body() -> None:
        host = ProcessHost(
            Recipe(model_path=str(model)), baked, tmp_path / "scratch", QUICK, weights="private", offers=OFFERS
        )
        async with processes(host, A, warm=True) as ((process, ready),):
            assert ready.trace_s > 0
            data, compiled = await make(process, video, tmp_path)
            assert compiled == Compiled()
            assert hashlib.sha256(data).hexdigest() == digest

    uvloop.run(body())


def test_weights_are_held_once_and_nobody_changes_them(model, baked, tmp_path):
    async def body() -> None:
        host = ProcessHost(Recipe(model_path=str(model)), baked, tmp_path / "scratch", QUICK, offers=OFFERS)
        async with processes(host, A, B, C) as pairs:
            started = [process for process, _ in pairs]
            before = await host.weights["cpu"].checksum()
            with pytest.raises(PermissionError):  # it is sealed: nobody can write, whatever it does
                os.pwrite(lent_file(host.weights["cpu"].pid), b"x", 0)
            lent = host.lending("cpu").bytes
            checkpoint = sum(path.stat().st_size for path in model.rglob("*.safetensors"))
            assert lent == pytest.approx(checkpoint, rel=0.1)
            for number in range(12):
                for process in started:
                    await make(process, job(process.key.shape), tmp_path)
                if number == 0:
                    everybody = [host.weights["cpu"].pid, *(process.pid for process in started)]
                    held = sum(pss_of_weights(pid) for pid in everybody)
                    assert 0.8 * checkpoint < held < 1.1 * checkpoint  # what no video reads is in nobody's memory
                    assert all(process.memory.weights == 0 for process in started)
            assert await host.weights["cpu"].checksum() == before

    uvloop.run(body())


def test_what_is_lent_outlives_its_lender(model, baked, tmp_path):
    video, digest = bakes_job(baked, A)

    async def body() -> None:
        host = ProcessHost(Recipe(model_path=str(model)), baked, tmp_path / "scratch", QUICK, offers=OFFERS)
        async with processes(host, A) as ((process, _),):
            before, lent = await host.weights["cpu"].checksum(), host.lending("cpu")
            for _ in range(2):
                killed = host.weights["cpu"].pid
                os.kill(killed, signal.SIGKILL)
                while host.weights["cpu"].pid in (killed, None):
                    assert process.alive
                    assert host.lending("cpu") == lent
                    await asyncio.sleep(0.01)
                assert await host.weights["cpu"].checksum() == before
            other = host.process(Key(B))
            await host.start_process(other)
            for one in (process, other):
                assert one.memory.weights == 0
            data, _ = await make(process, video, tmp_path)
            assert hashlib.sha256(data).hexdigest() == digest
            await make(other, job(B), tmp_path)
            other.kill()
            # And a death of its own is not put down to a lender that died before.
            os.kill(process.pid, signal.SIGKILL)
            assert (await process.loss()).reason == "killed"

    uvloop.run(body())


def test_a_loan_that_nobody_can_take_over_is_given_up(model, baked, tmp_path, monkeypatch):
    async def body() -> None:
        host = ProcessHost(Recipe(model_path=str(model)), baked, tmp_path / "scratch", QUICK, offers=OFFERS)
        async with processes(host, A) as ((process, _),):
            before = await host.weights["cpu"].checksum()
            failures = iter(range(weights.SUCCESSORS))

            def refused(*_: object) -> None:
                next(failures)
                raise OSError(24, "too many open files")

            with monkeypatch.context() as short:
                short.setattr(lending, "hand_over", refused)
                os.kill(host.weights["cpu"].pid, signal.SIGKILL)
                while process.alive:
                    with contextlib.suppress(ProcessLost):
                        await host.prepare()
                    await asyncio.sleep(0.01)
            assert next(failures, None) is None
            assert (await process.loss()).reason == "weights_lost"
            host.weights["cpu"].pause.succeeded()
            await host.prepare()
            assert await host.weights["cpu"].checksum() == before

    uvloop.run(body())


def lent_file(pid: int) -> int:
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if "memfd:ltx2-weights" in str(link.readlink()):
            return os.open(link, os.O_RDWR)
    raise AssertionError("nothing is lent")


def pss_of_weights(pid: int) -> int:
    """Bytes of the lent memory file that count for this process, shared pages in proportion."""
    total, inside = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = "memfd:ltx2-weights" in line
        elif inside and line.startswith("Pss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.fixture(scope="module")
def hot(make_stack) -> Stack:
    """A worker as it comes: zygote, shared weights, every shape of the menu started ahead."""
    running = make_stack(program=LENIENT, LTX2_POOL_MODE="1", LTX2_POOL_PREWARM="all", LTX2_POOL_READY_MIN="3")
    assert {p["state"] for p in running.status()["processes"]} == {"ready"}
    return running


def test_the_whole_menu_is_hot_when_the_model_is_registered(hot):
    before = pids(hot)
    assert before.keys() == {A.key, B.key, C.key}
    for shape in (A, B, C):
        check(ask(hot, shape), shape)
    assert pids(hot) == before
    assert hot.status()["max_size"] == "auto"


def kill_during(hot: Stack, shape: Shape, pid: int) -> bytes:
    """Ask for a video of many steps, SIGKILL a process after the first, and return the video."""
    data, killed = b"", False
    for item in hot.stream(size=shape.size, nvext={"num_frames": shape.num_frames, "num_inference_steps": 40}):
        if item == "[DONE]":
            break
        body = json.loads(item)
        if body["status"] == "in_progress" and not killed:
            os.kill(pid, signal.SIGKILL)
            killed = True
        if body["status"] == "completed":
            data = base64.b64decode(body["data"][0]["b64_json"])
    assert killed
    return data


@pytest.mark.parametrize("victim", ["zygote", "weights", "child"])
def test_a_request_survives_kill_9_of_anything_below_the_worker(hot, victim):
    expected = ask(hot, A, num_inference_steps=40)
    before = pids(hot)
    pid = before[A.key] if victim == "child" else hot.status()["helpers"][victim]
    assert kill_during(hot, A, pid) == expected
    for shape in (B, C):
        check(ask(hot, shape), shape)  # replaced, or never touched
    assert (pids(hot)[A.key] == before[A.key]) == (victim != "child")
    assert not psutil.pid_exists(pid)
    # Nothing is left of those that died, and the dead helper has a successor.
    helpers = wait_for_helpers(hot)
    groups = {*pids(hot).values(), *helpers.values(), os.getpgid(hot.worker.pid)}
    strays = [p for p in family(hot) if os.getpgid(p.pid) not in groups and "guard.py" not in " ".join(p.cmdline())]
    assert strays == []


def wait_for_helpers(hot: Stack) -> dict[str, int]:
    def all_there() -> dict[str, int]:
        helpers = hot.status()["helpers"]
        return helpers if all(helpers.values()) else {}

    return wait(all_there)


def test_kernels_that_ask_the_driver_at_import_are_left_alone(tmp_path):
    """fastvideo-kernel 0.3.5 does: no zygote could fork any more, and without a GPU FastVideo did not import."""
    package = tmp_path / "fastvideo_kernel"
    package.mkdir()
    (package / "__init__.py").write_text('raise RuntimeError("0 active drivers ([]). There should only be one.")\n')
    for backend, works in (("TORCH_SDPA", True), ("VIDEO_SPARSE_ATTN", False)):
        done = subprocess.run(
            [sys.executable, "-c", "import ltx2_pool.model.engine"],
            env={**os.environ, "PYTHONPATH": str(tmp_path), "FASTVIDEO_ATTENTION_BACKEND": backend},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert (done.returncode == 0) is works, done.stderr
        assert works or "0 active drivers" in done.stderr
