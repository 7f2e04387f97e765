"""g++ for the tests, which compile the same shapes again and again: what it made once of the same source is copied.

TorchInductor has g++ compile each kernel on its own (torch/_inductor/cpp_builder.py), into the cache directory of the
moment; half of a tiny shape's compilation is that. What is compiled, and found again, in TorchInductor's own caches is
as it is without. Its sources include installed headers and no others, so one is the same where those are.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

_LONGEST = 200
"""Characters of an interpreter's path that the kernel reads in a script's first line, with some to spare."""


def install(directory: Path) -> Path | None:
    """Put a g++ before the others of PATH, in this directory, where what it compiles stays. None: it cannot be had.

    It is found by its name, and not by CXX, which TorchInductor's keys would name.
    """
    others = [place for place in os.environ["PATH"].split(os.pathsep) if place != str(directory)]
    compiler = shutil.which("g++", path=os.pathsep.join(others))
    if compiler is None or len(sys.executable) > _LONGEST:
        return None
    program = directory / "g++"
    text = (
        f"#!{sys.executable} -IS\n# {compiler}\n{Path(__file__).read_text()}\nmain({str(directory)!r}, {compiler!r})\n"
    )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not program.exists() or program.read_text() != text:
            fresh = directory / f"g++.{os.getpid()}"
            fresh.write_text(text)
            fresh.chmod(0o755)
            fresh.rename(program)
    except OSError:  # a checkout that is read-only
        return None
    os.environ["PATH"] = os.pathsep.join([str(directory), *others])
    return program


def main(directory: str, compiler: str) -> None:
    """Compile, or copy."""
    arguments = sys.argv[1:]
    kept = _kept(Path(directory), compiler, arguments)
    if kept is None:
        os.execv(compiler, [compiler, *arguments])
    target = arguments[arguments.index("-o") + 1]
    if kept.exists():
        shutil.copy(kept, target)
        return
    done = subprocess.run([compiler, *arguments])
    if done.returncode == 0:
        fresh = kept.with_name(f"{kept.name}.{os.getpid()}")
        with contextlib.suppress(OSError):  # a full disk, or a process that may not write there
            shutil.copy(target, fresh)
            fresh.rename(kept)
    sys.exit(done.returncode)


def _kept(directory: Path, compiler: str, arguments: list[str]) -> Path | None:
    """Where its product is kept. None: it is no kernel, and not the header that all of them share."""
    sources = [Path(each) for each in arguments if each.endswith((".cpp", ".h"))]
    if "-o" not in arguments or "-E" in arguments or not all(source.is_file() for source in sources):
        return None
    stat = Path(compiler).stat()
    seen = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    for source in sources:
        seen.update(source.read_bytes())
    for place in (Path(each[2:]) for each in arguments if each.startswith("-I")):  # another version of a package
        seen.update(f"{place} {place.stat().st_mtime_ns if place.exists() else 0}".encode())
    for argument in arguments:  # but for where they are: in the cache directory of the moment
        for place in {str(source.parent) for source in sources}:
            argument = argument.replace(place, "")
        seen.update(argument.encode() + b"\0")
    return directory / seen.hexdigest()
