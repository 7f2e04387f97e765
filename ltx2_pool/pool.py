"""The pool: which job goes to which shape process, which shapes have one, and who waits.

All decisions are made in one synchronous function, :meth:`SubprocessPool._schedule`, run after every event. Nothing is
locked, and nothing is awaited while deciding, so a spawn or a generation of one shape can not hold up another.

The rule: jobs are looked at from the oldest to the newest. A job whose process is idle gets a lease on the GPU, if one
is free. A job whose shape has no process gets a slot: a free one, or that of the least recently used idle process that
no older job waits for. A busy process is never evicted.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ltx2_pool.guard import Guard
from ltx2_pool.process import JobFailed, OnEvent, ProcessLost, ShapeProcess, Spawner, State, Timeouts
from ltx2_pool.protocol import Phase, Step
from ltx2_pool.recipe import Recipe
from ltx2_pool.requests import Job
from ltx2_pool.shapes import CacheDirs, Shape

logger = logging.getLogger(__name__)

ATTEMPTS = 2
"""How many processes a job may lose before it fails."""


class PoolClosed(Exception):
    """The worker is shutting down and takes no more jobs."""


@dataclass(frozen=True)
class Video:
    """A finished video in a file that the receiver deletes."""

    path: Path
    sample_rate: int
    """Hz of the audio track, 0 without one."""
    phases: dict[str, float]
    """Seconds in each phase, ``queue`` included."""


@dataclass(eq=False)
class _Ticket:
    """One admitted job on its way."""

    number: int
    job: Job
    on_event: OnEvent
    result: asyncio.Future[Video]
    admitted: float = field(default_factory=time.monotonic)
    attempts: int = 0
    process: ShapeProcess | None = None


class SubprocessPool:
    """At most `max_size` shape processes, least recently used first out; at most `gpu_concurrency` generating."""

    def __init__(
        self,
        spawner: Spawner,
        recipe: Recipe,
        cache_root: Path,
        run_dir: Path,
        *,
        max_size: int = 2,
        gpu_concurrency: int = 1,
        timeouts: Timeouts | None = None,
    ) -> None:
        self._spawner = spawner
        self._recipe = recipe
        self._cache_root = cache_root
        self._run_dir = run_dir
        self._max_size = max_size
        self._leases = gpu_concurrency
        self._timeouts = timeouts or Timeouts()
        self._guard = Guard()
        self._numbers = itertools.count()
        self._processes: OrderedDict[Shape, ShapeProcess] = OrderedDict()
        """Least recently used first."""
        self._waiting: list[_Ticket] = []
        """Oldest first."""
        self._running: set[_Ticket] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    async def start(self) -> None:
        """Get ready to take jobs. Raises OSError when the guard can not be started."""
        self._guard.start()

    async def generate(self, job: Job, on_event: OnEvent) -> Video:
        """Make one video. Cancelling the awaiting task cancels the job, wherever it is.

        Raises JobFailed (the pipeline said no), ProcessLost (after the second process was lost) or PoolClosed.
        """
        if self._closing:
            raise PoolClosed("the worker is shutting down")
        ticket = _Ticket(next(self._numbers), job, on_event, asyncio.get_running_loop().create_future())
        self._waiting.append(ticket)
        self._schedule()
        try:
            return await ticket.result
        except asyncio.CancelledError:
            self._abandon(ticket)
            raise

    async def close(self, drain_timeout: float = 0) -> None:
        """Take no more jobs, let those admitted finish for `drain_timeout` seconds, then stop every process."""
        self._closing = True
        pending = [t.result for t in (*self._waiting, *self._running) if not t.result.done()]
        if pending and drain_timeout:
            logger.info("draining %d jobs for at most %g s", len(pending), drain_timeout)
            await asyncio.wait(pending, timeout=drain_timeout)
        for ticket in self._waiting:
            _settle(ticket, PoolClosed("the worker shut down before this job's turn came"))
        self._waiting.clear()
        for ticket in self._running:
            _settle(ticket, PoolClosed("the worker shut down before this job was done"))
            if ticket.process is not None:
                ticket.process.kill()
        await asyncio.gather(*(process.stop() for process in self._processes.values()))
        while self._tasks:
            await asyncio.wait(self._tasks)
        await asyncio.to_thread(self._guard.close)

    def status(self) -> dict[str, Any]:
        """The state of every shape process and the length of the queue, for people and for tests."""
        return {
            "max_size": self._max_size,
            "waiting": len(self._waiting),
            "running": len(self._running),
            "processes": [
                {"shape": p.shape.key, "state": p.state.value, "pid": p.pid, "jobs_done": p.jobs_done}
                for p in self._processes.values()
            ],
        }

    def _schedule(self) -> None:
        if self._closing and not self._waiting:
            return
        free_slots = self._max_size - sum(p.state is not State.DRAINING for p in self._processes.values())
        wanted: set[Shape] = set()
        for ticket in tuple(self._waiting):
            shape = ticket.job.shape
            process = self._processes.get(shape)
            if process is None:
                if shape not in wanted:
                    if free_slots <= 0 and (victim := self._victim(wanted)) is not None:
                        self._evict(victim, shape)
                        free_slots += 1
                    if free_slots > 0:
                        free_slots -= 1
                        if len(self._processes) < self._max_size:
                            self._spawn(shape)
            elif process.state is State.READY and self._leases > 0 and shape not in wanted:
                self._dispatch(ticket, process)
            wanted.add(shape)

    def _victim(self, wanted: set[Shape]) -> ShapeProcess | None:
        """The least recently used idle process; one that nobody waits for, if there is such a one."""
        idle = [p for s, p in self._processes.items() if p.state is State.READY and s not in wanted]
        awaited = {ticket.job.shape for ticket in self._waiting}
        return next((p for p in idle if p.shape not in awaited), idle[0] if idle else None)

    def _spawn(self, shape: Shape) -> None:
        process = ShapeProcess(shape, self._spawner, self._guard, self._timeouts)
        self._processes[shape] = process
        self._own(self._live(process))

    async def _live(self, process: ShapeProcess) -> None:
        """Own one process from its spawn to its end."""
        if self._closing:
            return
        cache = CacheDirs.of(self._cache_root, process.shape)
        try:
            ready = await process.start(self._recipe, cache, str(self._run_dir))
        except ProcessLost as lost:
            logger.log(logging.DEBUG if self._closing else logging.ERROR, "spawn failed: %s", lost)
            await process.exited()
            self._processes.pop(process.shape, None)
            for ticket in [t for t in self._waiting if t.job.shape == process.shape]:
                self._charge(ticket, lost)
        else:
            logger.info("%s is ready (import %.1f s, load %.1f s)", process, ready.import_s, ready.load_s)
            self._schedule()
            logger.info("%s ended with status %s", process, await process.exited())
            self._processes.pop(process.shape, None)
        self._schedule()

    def _evict(self, process: ShapeProcess, for_shape: Shape) -> None:
        logger.info("evicting %s for %s", process, for_shape.key)
        process.state = State.DRAINING

        async def stop() -> None:
            await process.stop()

        self._own(stop())

    def _dispatch(self, ticket: _Ticket, process: ShapeProcess) -> None:
        self._waiting.remove(ticket)
        self._running.add(ticket)
        self._leases -= 1
        ticket.process = process
        self._processes.move_to_end(process.shape)
        process.reserve()
        self._own(self._run(ticket, process))

    async def _run(self, ticket: _Ticket, process: ShapeProcess) -> None:
        queued = time.monotonic() - ticket.admitted
        lease = _Lease(self._return_lease)

        def on_event(event: Phase | Step) -> None:
            if isinstance(event, Phase) and event.phase == "encode":
                lease.release()  # the GPU is done with this job: the next one may have it
            if not ticket.result.done():
                ticket.on_event(event)

        try:
            done = await process.generate(ticket.job, on_event)
        except JobFailed as failed:
            _settle(ticket, failed)
        except ProcessLost as lost:
            logger.error("job %s: %s", ticket.job.id, lost)
            self._running.discard(ticket)
            ticket.process = None
            if not ticket.result.done():
                self._waiting.insert(0, ticket)
                self._waiting.sort(key=lambda t: t.number)
                self._charge(ticket, lost)
        else:
            path = self._run_dir / f"{ticket.job.id}.mp4"
            if ticket.result.done():
                path.unlink(missing_ok=True)
            else:
                ticket.result.set_result(Video(path, done.sample_rate, {"queue": queued, **done.phases}))
        finally:
            self._running.discard(ticket)
            lease.release()
            self._schedule()

    def _charge(self, ticket: _Ticket, lost: ProcessLost) -> None:
        """A waiting job lost a process: let it try once more, or tell its client."""
        ticket.attempts += 1
        if ticket.attempts < ATTEMPTS and lost.reason != "gen_timeout":
            logger.warning("job %s lost its process (%s) and is tried again", ticket.job.id, lost.reason)
            return
        self._waiting.remove(ticket)
        _settle(ticket, lost)

    def _abandon(self, ticket: _Ticket) -> None:
        if ticket in self._waiting:
            self._waiting.remove(ticket)
            self._schedule()
        elif ticket.process is not None:
            ticket.process.cancel(ticket.job)

    def _return_lease(self) -> None:
        self._leases += 1
        self._schedule()

    def _own(self, coroutine: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Lease:
    """The right to use the GPU, given back once."""

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._give_back: Callable[[], None] | None = give_back

    def release(self) -> None:
        if (give_back := self._give_back) is not None:
            self._give_back = None
            give_back()


def _settle(ticket: _Ticket, error: Exception) -> None:
    if not ticket.result.done():
        ticket.result.set_exception(error)
