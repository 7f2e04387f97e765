"""Landlock keeps a real process out of its siblings' caches, and leaves it everything that it needs."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ltx2_pool.model import confine as module

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, pathlib, subprocess, sys, tempfile
from ltx2_pool.model.confine import confine_to_cache
own, sibling = map(pathlib.Path, sys.argv[1:3])
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(own / "torchinductor")
tempfile.gettempdir()  # remembered, as by whatever was imported before a fork
print(confine_to_cache(os.environ), flush=True)
def allowed(what):
    try:
        what()
    except OSError as error:
        return type(error).__name__
    return "done"
"""


@pytest.fixture
def caches(tmp_path: Path) -> tuple[Path, Path]:
    own, sibling = (tmp_path / "cache" / "per-shape" / name for name in ("own", "sibling"))
    (sibling / "triton").mkdir(parents=True)
    (sibling / "kernel.so").write_text("theirs")
    (tmp_path / "run").mkdir()
    return own, sibling


def confined(caches: tuple[Path, Path], expression: str) -> list[str]:
    command = [sys.executable, "-c", f"{PROGRAM}\n{expression}", *map(str, caches)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    in_force, *answers = done.stdout.split()
    if in_force != "True":
        pytest.skip("this kernel has no Landlock")
    return answers


@pytest.mark.parametrize(
    "attempt",
    [
        "(sibling / 'kernel.so').write_text('mine')",
        "(sibling / 'kernel.so').open('r+')",
        "os.truncate(sibling / 'kernel.so', 0)",
        "(sibling / 'kernel.so').unlink()",
        "(sibling / 'kernel.so').rename(own / 'kernel.so')",
        "(sibling / 'new.so').write_text('mine')",
        "(sibling / 'new.so').symlink_to(own)",
        "(sibling / 'new').mkdir()",
        "(sibling / 'triton').rmdir()",
        "sibling.rename(sibling.with_name('other'))",
        "own.rename(own.with_name('other'))",
        "(own.parent / 'new').mkdir()",
        "((own / 'evil').write_text('mine'), os.link(own / 'evil', sibling / 'evil'))",
        "((own / 'way').symlink_to(sibling), (own / 'way' / 'kernel.so').write_text('mine'))",
        "pathlib.Path('/proc/self/root' + str(sibling) + '/kernel.so').write_text('mine')",
        "pathlib.Path(f'/proc/{os.getppid()}/mem').open('rb')",
    ],
)
def test_what_a_confined_process_cannot_do(caches: tuple[Path, Path], attempt: str) -> None:
    (answer,) = confined(caches, f"print(allowed(lambda: {attempt}))")
    assert answer in ("PermissionError", "OSError")
    sibling = caches[1]
    assert (sibling / "kernel.so").read_text() == "theirs"
    assert {entry.name for entry in sibling.iterdir()} == {"kernel.so", "triton"}


def test_what_a_confined_process_starts_is_confined_as_well(caches: tuple[Path, Path]) -> None:
    assert confined(caches, "print(subprocess.run(['touch', sibling / 'new']).returncode)") == ["1"]


@pytest.mark.parametrize(
    "attempt",
    [
        "(sibling / 'kernel.so').read_text()",
        "(own / 'torchinductor').mkdir()",
        "((own / 'a').mkdir(), (own / 'b').write_text('b'), (own / 'b').replace(own / 'a' / 'b'))",
        "(own.parents[2] / 'run' / 'video.mp4').write_text('video')",
        "tempfile.NamedTemporaryFile().close()",
        "subprocess.run(['mktemp'], check=True, stdout=-3)",
        "pathlib.Path('/dev/shm/ltx2-confined').write_text('') or os.unlink('/dev/shm/ltx2-confined')",
        "pathlib.Path('/proc/self/oom_score_adj').write_text('500')",
        "pathlib.Path('/dev/null').write_text('x')",
        "os.close(os.memfd_create('weights'))",
    ],
)
def test_what_a_confined_process_still_can_do(caches: tuple[Path, Path], attempt: str) -> None:
    assert confined(caches, f"print(allowed(lambda: {attempt}))") == ["done"]


def test_a_confined_process_compiles_into_its_own_cache(caches: tuple[Path, Path]) -> None:
    build = "(own / 'a.c').write_text('int f(void) { return 7; }'), subprocess.run(command, check=True)"
    expression = f"""
import ctypes
command = ["cc", "-shared", "-fPIC", "-o", own / "a.so", own / "a.c"]
print(allowed(lambda: ({build})))
print(ctypes.CDLL(str(own / "a.so")).f())
"""
    assert confined(caches, expression) == ["done", "7"]


def test_without_a_cache_nothing_is_confined() -> None:
    assert not module.confine_to_cache({})


def test_a_kernel_without_landlock_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_call", lambda *_: -1)
    assert not module.confine([tmp_path / "own"], tmp_path)


IN_SHARED_MEMORY = f"""{PROGRAM}
from multiprocessing.shared_memory import SharedMemory
SharedMemory(create=True, size=1).unlink()
new = own.with_name(own.name + "-new")
print(allowed(lambda: (new.mkdir(), new.rmdir())))
"""


@pytest.mark.parametrize(
    ("link", "target", "own", "in_force"),
    [
        ("", "", "{shm}/per-shape/own", False),
        ("", "", "{shm}", False),
        ("{disk}/root", "{shm}", "{disk}/root/per-shape/own", False),
        ("{shm}/root", "{disk}", "{shm}/root/per-shape/own", True),
        ("{shm}/per-shape/own", "{disk}/elsewhere", "{shm}/per-shape/own", False),
        ("{disk}/per-shape/own", "{shm}/elsewhere", "{disk}/per-shape/own", True),
    ],
    ids=["below it", "in it", "a root that leads there", "a root that leads out", "one leads out", "one leads there"],
)
def test_caches_in_shared_memory_are_not_confined_because_nothing_could_run(
    tmp_path: Path, link: str, target: str, own: str, in_force: bool
) -> None:
    """It hid the way to the shared memory that FastVideo needs at its start, which then divided by zero.

    Where the directory of all caches is says so; not where the links in it lead.
    """
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shm:
        for place in (Path(shm), tmp_path):
            (place / "per-shape").mkdir()
            (place / "elsewhere").mkdir()
        link, target, own = (text.format(shm=shm, disk=tmp_path) for text in (link, target, own))
        if link:
            Path(link).symlink_to(target)
        command = [sys.executable, "-c", IN_SHARED_MEMORY, own, own]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert ("not confined" in done.stderr) is not in_force
    if in_force and done.stdout.startswith("False"):
        pytest.skip("this kernel has no Landlock")
    assert done.stdout.split() == (["True", "PermissionError"] if in_force else ["False", "done"])
