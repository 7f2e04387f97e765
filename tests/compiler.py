"""g++ for the tests, which compile the same shapes again and again: what it made once of the same source is copied.

TorchInductor has its C++ compiled by what CXX names, each kernel on its own (torch/_inductor/cpp_builder.py), into the
cache directory of the moment; half of a tiny shape's compilation is that. What is compiled, and found again, in
TorchInductor's own caches is as it is without.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path


def install(directory: Path) -> Path | None:
    """The program that CXX is to name; what it compiles stays in the directory. None where there is no g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    directory.mkdir(parents=True, exist_ok=True)
    program = directory / "g++"
    text = (
        f"#!{sys.executable} -IS\n# {compiler}\n{Path(__file__).read_text()}\nmain({str(directory)!r}, {compiler!r})\n"
    )
    if not program.exists() or program.read_text() != text:
        fresh = directory / f"g++.{os.getpid()}"
        fresh.write_text(text)
        fresh.chmod(0o755)
        fresh.rename(program)
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
    for argument in arguments:  # but for where they are: in the cache directory of the moment
        for place in {str(source.parent) for source in sources}:
            argument = argument.replace(place, "")
        seen.update(argument.encode() + b"\0")
    return directory / seen.hexdigest()
