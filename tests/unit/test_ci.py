"""The CI script: what it installs, how often it tries, and that a test may not be skipped for what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.paths import REPOSITORY

POSTGRESQL = list(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
"""Debian keeps it away from PATH, and the script looks for it there."""
TOOLS = ("bash", "cat", "dirname", "env", "mktemp", "rm", "timeout")


@pytest.fixture
def machine(tmp_path) -> Path:
    """A checkout with the script, and a PATH where make and apt-get only record, and promtool is not found."""
    (tmp_path / ".ci").mkdir()
    shutil.copy2(REPOSITORY / ".ci/run", tmp_path / ".ci/run")
    (tmp_path / "bin").mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        assert found
        (tmp_path / "bin" / name).symlink_to(found)
    say(tmp_path, "make", 'echo "make $* CI=$CI" >> "$LOG"')
    say(tmp_path, "id", "echo 0")
    say(tmp_path, "sleep", 'echo "sleep $*" >> "$LOG"')
    say(tmp_path, "apt-get", 'echo "apt-get $*" >> "$LOG"')
    return tmp_path


def say(machine: Path, name: str, script: str) -> None:
    program = machine / "bin" / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def run(machine: Path) -> list[str]:
    log = machine / "log"
    log.touch()
    done = subprocess.run(
        [str(machine / ".ci/run")],
        env={"PATH": str(machine / "bin"), "LOG": str(log)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return log.read_text().splitlines()


def test_what_is_missing_is_installed_before_the_tests(machine):
    update, install, make = run(machine)
    assert update.startswith("apt-get update")
    assert install.endswith(" prometheus g++ chromium" + ("" if POSTGRESQL else " postgresql"))
    assert make == "make test CI=true"


def test_a_package_server_that_fails_is_asked_three_times_and_then_the_tests_say_what_is_missing(machine):
    say(machine, "apt-get", 'echo "apt-get $*" >> "$LOG"; exit 100')
    lines = run(machine)
    assert [line.split()[1] for line in lines if line.startswith("apt-get")] == ["update"] * 3
    assert lines[-1] == "make test CI=true"


def test_nothing_is_installed_when_nothing_is_missing_or_for_somebody_else_than_root(machine):
    say(machine, "id", "echo 1000")
    assert run(machine) == ["make test CI=true"]
    (machine / "log").unlink()
    say(machine, "id", "echo 0")
    for name in ("promtool", "g++", "chromium", "pg_ctl"):
        say(machine, name, ":")
    assert run(machine) == ["make test CI=true"]


def test_it_can_be_run():
    assert os.access(REPOSITORY / ".ci/run", os.X_OK)
