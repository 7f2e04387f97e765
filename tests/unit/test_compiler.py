"""The compiler of the tests copies what it has made of the same, and nothing else."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import compiler


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", os.environ["PATH"])  # and put back
    found = compiler.install(tmp_path / "kept")
    if found is None:
        pytest.skip("there is no g++")
    return found


def build(program: Path, directory: Path, number: int, *options: str, first: str = "") -> int:
    """What a library says that is compiled there."""
    directory.mkdir(exist_ok=True)
    source, target = directory / "kernel.cpp", directory / "kernel.so"
    source.write_text(f'{first}\nextern "C" int number() {{ return {number} + VALUE; }}')
    subprocess.run([program, source, "-shared", "-fPIC", "-DVALUE=0", *options, "-o", target], check=True)
    return int(ctypes.CDLL(str(target)).number())


def kept(program: Path) -> int:
    return len(list(program.parent.iterdir())) - 1


def test_the_same_is_compiled_once_wherever_it_is(program: Path, tmp_path: Path) -> None:
    assert [build(program, tmp_path / name, 7) for name in "ab"] == [7, 7]
    assert kept(program) == 1


def test_other_source_and_other_options_are_compiled(program: Path, tmp_path: Path) -> None:
    assert build(program, tmp_path / "a", 7) == 7
    assert build(program, tmp_path / "b", 8) == 8
    assert build(program, tmp_path / "c", 7, "-UVALUE", "-DVALUE=2") == 9
    assert kept(program) == 3


def test_other_headers_at_the_same_place_are_compiled(program: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        shutil.rmtree(tmp_path / "include", ignore_errors=True)
        (tmp_path / "include").mkdir()
        (tmp_path / "include/value.h").write_text(f"#undef VALUE\n#define VALUE {number}\n")
        place = f"-I{tmp_path / 'include'}"
        assert build(program, tmp_path / str(number), 7, place, first="#include <value.h>") == 7 + number


def test_a_directory_that_cannot_be_made_is_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    before = os.environ["PATH"]
    assert compiler.install(tmp_path / "file/kept") is None
    assert os.environ["PATH"] == before


def test_what_cannot_be_compiled_fails_each_time_and_is_not_kept(program: Path, tmp_path: Path) -> None:
    source = tmp_path / "kernel.cpp"
    source.write_text("this is not C++")
    for _ in range(2):
        done = subprocess.run([program, source, "-o", tmp_path / "out"], capture_output=True, text=True)
        assert done.returncode == 1
        assert "error:" in done.stderr
    assert kept(program) == 0


def test_a_process_of_the_tests_that_another_has_started_has_the_compiler_too(program: Path) -> None:
    before, text = os.environ["PATH"], program.read_text()
    assert shutil.which("g++") == str(program)
    assert compiler.install(program.parent) == program
    assert (os.environ["PATH"], program.read_text()) == (before, text)


def test_anything_else_is_handed_to_the_compiler(program: Path) -> None:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    assert "Free Software Foundation" in done.stdout
