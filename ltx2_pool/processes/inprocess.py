"""LTX2_POOL_MODE=0: one generator inside the worker, for every shape of the menu. No isolation, no pool."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltx2_pool.processes.process import JobFailed, OnEvent, ProcessLost
from ltx2_pool.serving.pool import PoolClosed, Video
from ltx2_pool.words.protocol import Phase, Step
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import CacheDirs

if TYPE_CHECKING:
    from ltx2_pool.model.engine import Generator

logger = logging.getLogger(__name__)


class InProcessGenerator:
    """Serves jobs one at a time in a thread. Same factory, recipe and encoder as a shape process."""

    def __init__(self, recipe: Recipe, cache_root: Path, run_dir: Path) -> None:
        self._recipe = recipe
        self._cache = CacheDirs(cache_root / "in-process")
        self._run_dir = run_dir
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generate")
        self._generator: Generator | None = None
        self._jobs: set[asyncio.Future[Video]] = set()
        self._closing = False
        self._broken = False
        self._jobs_done = 0

    async def start(self) -> None:
        """Import torch and FastVideo and load the checkpoint. Raises engine.LoadError."""
        os.environ.update(self._recipe.environment(self._cache))
        self._generator = await asyncio.get_running_loop().run_in_executor(self._thread, self._load)

    def _load(self) -> Generator:
        from ltx2_pool.model import engine

        return engine.build_generator(self._recipe)

    async def generate(self, job: Job, on_event: OnEvent) -> Video:
        """As :meth:`ltx2_pool.serving.pool.SubprocessPool.generate`."""
        if self._closing or self._broken:
            raise PoolClosed("the worker is shutting down" if self._closing else "the generator met a fatal error")
        loop = asyncio.get_running_loop()
        cancelled = False

        def tell(event: Phase | Step) -> None:
            loop.call_soon_threadsafe(lambda: None if cancelled else on_event(event))

        future = loop.run_in_executor(self._thread, self._make, job, tell, lambda: cancelled, time.monotonic())
        self._jobs.add(future)
        future.add_done_callback(self._jobs.discard)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            cancelled = True
            if not future.cancel():
                future.add_done_callback(_discard)
            raise

    def _make(self, job: Job, tell: OnEvent, is_cancelled: Any, admitted: float) -> Video:
        from ltx2_pool.model import engine, mp4

        assert self._generator is not None
        phases = [("queue", admitted)]

        def on_phase(phase: str) -> None:
            phases.append((phase, time.monotonic()))
            tell(Phase(job_id=job.id, phase=phase))

        def on_step(done: int, total: int) -> None:
            if is_cancelled():
                raise engine.Cancelled
            tell(Step(job_id=job.id, done=done, total=total))

        path = self._run_dir / f"{job.id}.mp4"
        try:
            if is_cancelled():
                raise engine.Cancelled
            clip = self._generator.generate(job, on_phase, on_step)
            on_phase("encode")
            mp4.encode(clip, path, job.comment)
        except engine.Cancelled:
            raise JobFailed(job.shape, "cancelled", "cancelled") from None
        except Exception as error:
            path.unlink(missing_ok=True)
            logger.exception("job %s failed", job.id)
            text = f"{type(error).__name__}: {error}"[:2000]
            if engine.is_fatal(error):
                self._broken = True
                raise ProcessLost("in-process generator", "cuda_fault", f"a fatal error: {text}") from error
            raise JobFailed(job.shape, "refused" if engine.is_refusal(error) else "soft", text) from error
        self._jobs_done += 1
        ends = [begin for _, begin in phases[1:]] + [time.monotonic()]
        return Video(
            path, clip.sample_rate, {name: end - begin for (name, begin), end in zip(phases, ends, strict=True)}
        )

    @property
    def broken(self) -> bool:
        """Whether a fatal error happened: only a restart of the worker helps."""
        return self._broken

    async def close(self, drain_timeout: float = 0) -> None:
        """As :meth:`ltx2_pool.serving.pool.SubprocessPool.close`."""
        self._closing = True
        if self._jobs and drain_timeout:
            await asyncio.wait(self._jobs, timeout=drain_timeout)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def abort(self) -> None:
        """There is no way to stop a generation in this process but between two steps: `close` sees to that."""

    def status(self) -> dict[str, Any]:
        """What there is to say without a pool."""
        return {
            "waiting": 0,
            "running": len(self._jobs),
            "processes": [],
            "jobs_done": self._jobs_done,
            "broken": self._broken,
        }


def _discard(future: asyncio.Future[Video]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().path.unlink(missing_ok=True)
