"""``ltx2-benchmark compare --stock``: FastVideo's own generator, and this project's ways to run it, on one checkpoint.

Each way runs in a process of its own (:mod:`ltx2_pool.tools.bench.ways`), one after the other on the same device, and
makes the same videos:

- *stock*: FastVideo's ``VideoGenerator`` with its own executor, compiled, in one stage, and no file written;
- *in-process*: the engine of ``LTX2_POOL_MODE=0``;
- *pool*: a shape process that borrows its weights; and the same with ``--enable-optimizations``.

All of ours end with the MP4 in a file. On a CPU, for which FastVideo's executor is unfinished, stock runs in ours.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.shapes import Shape

WAYS = ("stock", "in-process", "pool", "pool, quantized")
PROMPT = "a red fox runs through fresh snow at dawn"
SEED = 7
TIMEOUT = 1800.0
"""Seconds for one way."""
MARK = "@rival "
"""What a way reports begins with it; everything else that its process prints does not."""


class RivalError(Exception):
    """One of the ways could not make its videos. The message ends with what its process printed."""

    def __init__(self, way: str, why: str) -> None:
        super().__init__(f"{way} {why}")
        self.way = way


@dataclass(frozen=True)
class Videos:
    """What every way is to make."""

    recipe: Recipe
    shapes: Sequence[Shape]
    steps: int
    repeat: int
    """Steady videos of each shape."""
    cache_root: Path

    def figures(self) -> dict[str, Any]:
        return {"shapes": [shape.key for shape in self.shapes], "steps": self.steps, "repeat": self.repeat}


def run(videos: Videos, groups: Sequence[Sequence[str]], tell: Callable[[str], None]) -> dict[str, Any]:
    """The figures of every way, by shape, in groups of ways that run together, one group after the other.

    Those of a group load and compile at the same time, and take turns only at what is steady. Faster, on a device with
    the memory for all; what comes before is then measured in each other's company. When a way fails, its group ends
    and the next one goes on; ``problems`` says why, by the way that failed.
    """
    found: dict[str, Any] = {**videos.figures(), "ways": {}, "problems": {}}
    for group in groups:
        started: list[_Rival] = []
        with contextlib.ExitStack() as stack, concurrent.futures.ThreadPoolExecutor(len(group)) as threads:
            try:
                for way in group:
                    started.append(stack.enter_context(_Rival(way, videos, tell)))
                for _ in threads.map(lambda rival: rival.read("ready"), started):
                    pass
                for rival in started:
                    rival.measure()
            except RivalError as error:
                found["problems"][error.way] = str(error)
            finally:
                found["ways"] |= {rival.way: rival.found for rival in started}
                stack.close()  # before the threads are waited for
    return found


class _Rival:
    """One way's process."""

    def __init__(self, way: str, videos: Videos, tell: Callable[[str], None]) -> None:
        asked = {
            **videos.figures(),
            "way": way,
            "recipe": videos.recipe.model_dump(),
            "cache_root": str(videos.cache_root),
        }
        self.way = way
        self.found: dict[str, Any] = {}
        self._tell = tell
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed when the process is
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ltx2_pool.tools.bench.ways", json.dumps(asked)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        self._late = False
        self._overdue = threading.Timer(TIMEOUT, self._expire)
        self._overdue.start()

    def __enter__(self) -> _Rival:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._overdue.cancel()
        self._kill()
        self._process.wait()
        self._log.close()

    def _expire(self) -> None:
        self._late = True
        self._kill()

    def _kill(self) -> None:
        """All that it has started too: it may keep the pipe."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def measure(self) -> None:
        """Let it make its steady videos, now that the device is its own, and end it. Raises RivalError."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        self.read("done")
        self.__exit__()

    def read(self, until: str) -> None:
        """Take what it reports until then. Raises RivalError."""
        assert self._process.stdout is not None
        # Not to the end of the file: what it has started, torch's compilers for one, may keep the pipe for longer.
        for line in self._process.stdout:
            if not line.startswith(MARK):
                continue
            what, value = json.loads(line.removeprefix(MARK))
            if what == until:
                return
            if what == "doing":
                self._tell(f"{self.way}: {value}")
            else:
                self.found.setdefault(what, {}).update(value)
        status = self._process.wait()
        why = f"took longer than {TIMEOUT:g} s" if self._late else f"ended with status {status}"
        self._log.seek(0)
        raise RivalError(self.way, f"{why}:\n{self._log.read()[-3000:]}")


def cache(cache_root: Path, way: str) -> Path:
    """Where a way keeps what it compiles."""
    return cache_root / way.replace(", ", "-")


def ratio(result: Mapping[str, Any], way: str, shape: str, baseline: str = "stock") -> float | None:
    """Median steady seconds of a way over those of another; None where one of them was not measured."""
    try:
        a, b = (statistics.median(result["ways"][name][shape]["steady_s"]) for name in (way, baseline))
    except KeyError:
        return None
    return float(a / b)
