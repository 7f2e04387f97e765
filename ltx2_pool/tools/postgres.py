"""A PostgreSQL server of one's own, from Debian's package, for as long as it is needed: for tests and benchmarks."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ltx2_pool.tools.stack import StackError, free_port


def binaries() -> Path | None:
    """Where initdb and the others are; None when PostgreSQL is not installed."""
    found = shutil.which("initdb") or next(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), None)
    return Path(found).resolve().parent if found else None


@contextlib.contextmanager
def server() -> Iterator[str]:
    """The URL of an empty database, for SQLAlchemy. Raises StackError."""
    there = binaries()
    if there is None:
        raise StackError("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    port, root = free_port(), Path(tempfile.mkdtemp(prefix="ltx2-postgresql-"))
    user: list[str | Path] = (
        ["runuser", "--user", "postgres", "--"] if os.geteuid() == 0 else []
    )  # the server refuses root
    if user:
        shutil.chown(root, "postgres")
    data = root / "data"
    quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    make = [*user, there / "initdb", "--auth=trust", "--username=ltx2", "--no-sync", data]
    subprocess.run(make, check=True, **quiet)
    command = [*user, there / "postgres", "-D", data, "-p", str(port), "-k", root, "-h", "127.0.0.1", "-c", "fsync=off"]
    process = subprocess.Popen(command, start_new_session=True, **quiet)
    try:
        ready: list[str | Path] = [there / "pg_isready", "--quiet", "--host=127.0.0.1", f"--port={port}"]
        deadline = time.monotonic() + 60
        while subprocess.run(ready, stdin=subprocess.DEVNULL).returncode:
            if time.monotonic() > deadline or process.poll() is not None:
                raise StackError("PostgreSQL does not start")
            time.sleep(0.05)
        yield f"postgresql+asyncpg://ltx2@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*user, there / "pg_ctl", "stop", "-D", data, "-m", "immediate"], **quiet)
        process.wait(30)
        shutil.rmtree(root, ignore_errors=True)
