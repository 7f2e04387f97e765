"""The real stack on the tiny model: one checkpoint and one set of compile caches for all tests."""

from __future__ import annotations

import base64
import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import httpx
import psutil
import pytest
from filelock import FileLock

from ltx2_pool.model import mp4
from ltx2_pool.model.mp4 import VideoInfo
from ltx2_pool.tools import stack
from ltx2_pool.tools.stack import Stack
from ltx2_pool.words.menu import Menu
from ltx2_pool.words.shapes import CacheDirs, Key, Shape
from tests.paths import REPOSITORY
from tests.waiting import in_background as in_background
from tests.waiting import wait as wait

WORK = REPOSITORY / ".work"
MENU = stack.TINY_MENU
A, B, C = Menu.load(MENU).shapes
LENIENT = (sys.executable, str(Path(__file__).with_name("lenient_worker.py")))
WARMUP = (sys.executable, "-m", "ltx2_pool.programs.warmup")
BENCHMARK = (sys.executable, "-m", "ltx2_pool.programs.benchmark")
T = TypeVar("T")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def model() -> Path:
    return stack.checkpoint(WORK)


@pytest.fixture(scope="session")
def baked(model: Path) -> Path:
    """The tiny menu's caches, baked once by ltx2-warmup and kept for the next run."""
    root = WORK / f"baked-{model.name}"
    options = {"--shapes": MENU, "--model": model, "--cache-root": root, "--jobs": 2}
    with FileLock(f"{root}.lock"):  # of the processes of pytest-xdist, one bakes
        subprocess.run([*WARMUP, *(str(part) for option in options.items() for part in option)], check=True)
    return root


def merge(baked: Path, target: Path, *shapes: Shape) -> CacheDirs:
    """The compile caches of several shapes in one directory, as one process that makes them all would have them."""
    merged = CacheDirs(target)
    for shape in shapes:
        source = CacheDirs.of(baked, Key(shape))
        for name in ("torchinductor", "triton"):
            shutil.copytree(source.root / name, target / name, dirs_exist_ok=True)
    return merged


@contextlib.contextmanager
def stacks(model: Path, baked: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Stack]]:
    """Starts stacks, stops them at the end, and sees that nothing of them is left."""
    started: list[Stack] = []

    def make(*, cache_root: Path = baked, **options: str) -> Stack:
        options = {"LTX2_POOL_PREWARM": "none", **options}
        running = Stack(tmp_path_factory.mktemp("stack"), model, MENU, cache_root, **options).__enter__()
        started.append(running)
        return running

    yield make
    for running in started:
        tree = family(running)
        running.close()
        assert alive(tree) == [], running.log_tail("worker")


@pytest.fixture(scope="module")
def make_stack(model: Path, baked: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Stack]]:
    with stacks(model, baked, tmp_path_factory) as make:
        yield make


@pytest.fixture(scope="session")
def pool(model: Path, baked: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A worker in pool mode with K=2, shared by all tests: they may kill what is in it, and must not stop it."""
    with stacks(model, baked, tmp_path_factory) as make:
        yield make(
            program=LENIENT,
            LTX2_POOL_MODE="1",
            LTX2_POOL_MAX_SIZE="2",
            LTX2_MEDIA_OUTPUT_FS_URL=f"file://{tmp_path_factory.mktemp('media')}",
            LTX2_MEDIA_OUTPUT_HTTP_URL="http://media.example/v",
        )


def ask(running: Stack, shape: Shape, **nvext: object) -> bytes:
    """Make a video over HTTP and return the MP4."""
    return video(running.create(size=shape.size, nvext={"num_frames": shape.num_frames, **nvext}))


def video(answer: httpx.Response) -> bytes:
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["status"], body["progress"], len(body["data"])) == ("completed", 100, 1)
    return base64.b64decode(body["data"][0]["b64_json"])


def check(data: bytes, shape: Shape) -> VideoInfo:
    info = mp4.probe(data)
    assert (info.width, info.height, info.num_frames) == (shape.width, shape.height, shape.num_frames)
    assert (info.fps, info.audio_channels, info.audio_sample_rate) == (24, 2, 24000)
    return info


def pids(running: Stack) -> dict[str, int]:
    return {p["shape"]: p["pid"] for p in running.status()["processes"]}


@contextlib.contextmanager
def file_size_limit(pid: int, size: int) -> Iterator[None]:
    """No file of that process may grow over `size` bytes meanwhile, as on a full disk."""
    process = psutil.Process(pid)
    soft, hard = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        process.rlimit(psutil.RLIMIT_FSIZE, (soft, hard))


def family(running: Stack) -> list[psutil.Process]:
    """The worker and everything it has started."""
    assert running.worker is not None
    try:
        worker = psutil.Process(running.worker.pid)
        return [worker, *worker.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def alive(processes: list[psutil.Process], timeout: float = 2) -> list[psutil.Process]:
    """Those that still run after the timeout; zombies are the test's own to reap."""
    _, left = psutil.wait_procs(processes, timeout=timeout)
    return [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
