"""The pool: which job goes to which shape process, which shapes have one, and who waits.

All decisions are made in one synchronous function, :meth:`SubprocessPool._schedule`, run after every event. Nothing is
locked, and nothing is awaited while deciding, so a spawn or a generation of one shape can not hold up another.

The rule: jobs are looked at from the oldest to the newest. A job whose process is idle gets a lease on the GPU, if one
is free. A job whose shape has no process gets room for one: free room, or that of the least recently used idle
processes that no older job waits for. A busy process is never evicted. Spawns need no lease, so hot shapes flow on
beside them; but as soon as a process is READY, no younger job starts before the job that waited for it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from ltx2_pool.caches.manifest import WARM_UP_COMMAND
from ltx2_pool.processes.process import JobFailed, OnEvent, ProcessLost, ShapeProcess, State
from ltx2_pool.serving.breaker import Breaker
from ltx2_pool.serving.capacity import Capacity, FixedCapacity
from ltx2_pool.serving.metrics import Metrics
from ltx2_pool.words.protocol import Lending, Phase, Ready, Step
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import CacheDirs, Shape

logger = logging.getLogger(__name__)

ATTEMPTS = 2
"""How many processes a job may lose in the middle of it before it fails."""
POISON_SECONDS = 600.0
"""For how long the parameters of a job that ended two processes are refused."""
_MAX_POISONS = 1000


class Rejected(Exception):
    """The job is not made, and no process was at fault. `reason` is the label of the rejection metric."""

    reason = "closed"


class PoolClosed(Rejected):
    """The worker is shutting down and takes no more jobs."""


class QueueFull(Rejected):
    """Too many jobs wait already, in all (queue_full) or for this shape (shape_queue_full)."""

    def __init__(self, reason: str, waiting: int, wait: float) -> None:
        self.reason = reason
        super().__init__(f"{waiting} jobs wait already, for some {wait:.0f} s")


class Unavailable(Rejected):
    """The shape's processes do not start at the moment."""

    reason = "unavailable"


class Poisonous(Rejected):
    """These parameters ended two processes a short while ago."""

    reason = "poisonous"


class JobTimeout(Rejected, TimeoutError):
    """The job was not done by its deadline."""

    reason = "timeout"


@dataclass(frozen=True)
class Limits:
    """What the pool admits."""

    max_queue: int = 64
    max_queue_per_shape: int = 32
    job_timeout: float = 3600
    """Seconds from admission to the video."""


@dataclass(frozen=True)
class Video:
    """A finished video in a file that the receiver deletes."""

    path: Path
    sample_rate: int
    """Hz of the audio track, 0 without one."""
    phases: dict[str, float]
    """Seconds in each phase, ``queue`` included."""


class Host(Protocol):
    """What starts shape processes (:class:`ltx2_pool.processes.host.ProcessHost`)."""

    async def start(self) -> None: ...

    def process(self, shape: Shape) -> ShapeProcess: ...

    async def start_process(
        self, process: ShapeProcess, cache: CacheDirs, output_dir: str, warm_up: Job | None = None
    ) -> Ready: ...

    def on_weights_lost(self, call: Callable[[], None]) -> None: ...

    @property
    def lending(self) -> Lending | None: ...

    @property
    def pids(self) -> dict[str, int | None]: ...

    async def close(self) -> None: ...


@dataclass(eq=False)
class _Ticket:
    """One admitted job on its way."""

    number: int
    job: Job
    on_event: OnEvent
    result: asyncio.Future[Video]
    admitted: float = field(default_factory=time.monotonic)
    losses: list[ProcessLost] = field(default_factory=list)
    """The processes that it lost."""
    process: ShapeProcess | None = None


class SubprocessPool:
    """Shape processes within a capacity, least recently used first out; at most `gpu_concurrency` generating."""

    def __init__(
        self,
        host: Host,
        cache_root: Path,
        run_dir: Path,
        *,
        capacity: Capacity | None = None,
        gpu_concurrency: int = 1,
        limits: Limits | None = None,
        warm_up: Callable[[Shape], Job] | None = None,
        prewarm: Sequence[Shape] = (),
        ready_min: int = 0,
        metrics: Metrics | None = None,
        make_breaker: Callable[[], Breaker] = Breaker,
    ) -> None:
        self._host = host
        self._cache_root = cache_root
        self._run_dir = run_dir
        self._capacity = capacity or FixedCapacity(2)
        self._leases = gpu_concurrency
        self._concurrency = gpu_concurrency
        self._limits = limits or Limits()
        self._warm_up = warm_up
        self._prewarm = tuple(prewarm)
        self._ready_min = min(ready_min, len(self._prewarm))
        self._hot_enough = asyncio.Event()
        self._metrics = metrics or Metrics([])
        self._numbers = itertools.count()
        self._processes: OrderedDict[Shape, ShapeProcess] = OrderedDict()
        """Least recently used first."""
        self._waiting: list[_Ticket] = []
        """Oldest first."""
        self._running: set[_Ticket] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._starting: dict[ShapeProcess, asyncio.Task[None]] = {}
        self._breakers: defaultdict[Shape, Breaker] = defaultdict(make_breaker)
        self._poisons: OrderedDict[Job, float] = OrderedDict()
        """Parameters that ended two processes, and when they may come again."""
        self._seconds: dict[Shape, float] = {}
        """What a video of the shape took lately, on the GPU."""
        self._last_errors: dict[Shape, str] = {}
        self._closing = False

    async def start(self) -> None:
        """Spawn ahead, and return when as many shapes as asked for are READY. Raises OSError without a guard."""
        await self._host.start()
        self._host.on_weights_lost(self._on_weights_lost)
        self._schedule()
        if self._ready_min:
            await self._hot_enough.wait()

    async def generate(self, job: Job, on_event: OnEvent) -> Video:
        """Make one video. Cancelling the awaiting task cancels the job, wherever it is.

        Raises a Rejected, JobFailed (the pipeline said no) or ProcessLost (after the second process was lost).
        """
        try:
            self._admit(job)
            ticket = _Ticket(next(self._numbers), job, on_event, asyncio.get_running_loop().create_future())
            self._waiting.append(ticket)
            self._schedule()
            try:
                async with asyncio.timeout(self._limits.job_timeout) as deadline:
                    video = await ticket.result
            except asyncio.CancelledError:
                self._abandon(ticket)
                self._metrics.cancellations.labels(job.shape.key).inc()
                raise
            except TimeoutError:
                if not deadline.expired():
                    raise
                self._abandon(ticket)
                raise JobTimeout(f"not done within {self._limits.job_timeout:g} s") from None
        except Rejected as rejected:
            self._metrics.rejections.labels(rejected.reason).inc()
            raise
        except (JobFailed, ProcessLost) as error:
            status = "FATAL" if isinstance(error, ProcessLost) else "ERROR"
            self._metrics.requests.labels(job.shape.key, status).inc()
            raise
        self._metrics.requests.labels(job.shape.key, "DONE").inc()
        self._metrics.latency.labels(job.shape.key).observe(time.monotonic() - ticket.admitted)
        for phase, seconds in video.phases.items():
            self._metrics.phase.labels(job.shape.key, phase).observe(seconds)
        return video

    def _admit(self, job: Job) -> None:
        if self._closing:
            raise PoolClosed("the worker is shutting down")
        if (poisoned_until := self._poisons.get(_parameters(job))) is not None:
            if (left := poisoned_until - time.monotonic()) > 0:
                raise Poisonous(
                    f"a job with these parameters ended {ATTEMPTS} processes; refused for {left:.0f} s more"
                )
            del self._poisons[_parameters(job)]
        self._check_breaker(job.shape)
        of_shape = sum(t.job.shape == job.shape for t in self._waiting)
        if len(self._waiting) >= self._limits.max_queue:
            raise QueueFull("queue_full", len(self._waiting), self.expected_wait())
        if of_shape >= self._limits.max_queue_per_shape:
            raise QueueFull("shape_queue_full", of_shape, self.expected_wait())

    def expected_wait(self) -> float:
        """Seconds that a job admitted now would wait for the jobs before it, by what their shapes took lately."""
        ahead = [ticket.job.shape for ticket in (*self._waiting, *self._running)]
        return sum(self._seconds.get(shape, 0.0) for shape in ahead) / self._concurrency

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
        for process, task in self._starting.items():
            if process.pid is None:  # it waits for the zygote or the weights process: there is nothing to stop yet
                task.cancel()
        await asyncio.gather(*(process.stop() for process in self._processes.values()))
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._host.close()

    def abort(self) -> None:
        """Stop draining: tell the jobs that are left, and kill what generates them."""
        self._closing = True
        for ticket in (*self._waiting, *self._running):
            _settle(ticket, PoolClosed("the worker was told to stop at once"))
        for process in self._processes.values():
            process.kill()

    def status(self) -> dict[str, Any]:
        """Processes, queue, memory and what went wrong last, for people and for tests."""
        now = time.monotonic()
        return {
            **self._capacity.describe(),
            "waiting": len(self._waiting),
            "waiting_by_shape": dict(Counter(t.job.shape.key for t in self._waiting)),
            "running": len(self._running),
            "expected_wait_s": round(self.expected_wait(), 3),
            "helpers": self._host.pids,
            "processes": [
                {
                    "shape": p.shape.key,
                    "state": p.state.value,
                    "pid": p.pid,
                    "jobs_done": p.jobs_done,
                    "age_s": round(now - p.started_at, 1),
                    "memory": p.memory.model_dump() if p.memory is not None else None,
                }
                for p in self._processes.values()
            ],
            "unavailable": {s.key: round(b.remaining, 1) for s, b in self._breakers.items() if b.remaining},
            "last_errors": {shape.key: error for shape, error in self._last_errors.items()},
        }

    def _schedule(self) -> None:
        # Shapes that have room: those with a process that stays, and those promised to an older job in this pass.
        claimed = {shape for shape, process in self._processes.items() if process.state is not State.DRAINING}
        wanted: set[Shape] = set()
        for ticket in tuple(self._waiting):
            shape = ticket.job.shape
            process = self._processes.get(shape)
            if process is None:
                if shape not in wanted:
                    while not self._capacity.fits(claimed | {shape}) and (victim := self._victim(wanted)) is not None:
                        self._evict(victim, shape)
                        claimed.discard(victim.shape)
                    if self._capacity.fits({*self._processes, shape}):
                        self._spawn(shape)
                    # Also when it does not fit yet: what gets free is not for a younger job.
                    claimed.add(shape)
            elif process.state is State.READY and self._leases > 0 and shape not in wanted:
                self._dispatch(ticket, process)
            wanted.add(shape)
        if not self._waiting and not self._closing:
            self._spawn_ahead()
        self._publish()

    def _victim(self, wanted: set[Shape]) -> ShapeProcess | None:
        """The least recently used idle process; one that nobody waits for, if there is such a one."""
        idle = [p for s, p in self._processes.items() if p.state is State.READY and s not in wanted]
        awaited = {ticket.job.shape for ticket in self._waiting}
        return next((p for p in idle if p.shape not in awaited), idle[0] if idle else None)

    def _spawn_ahead(self) -> None:
        """Start one more of the shapes to prewarm, if nobody waits, nothing else starts, and it fits."""
        if any(process.state is State.SPAWNING for process in self._processes.values()):
            return
        for shape in self._prewarm:
            if shape in self._processes:
                continue
            if left := self._breakers[shape].remaining:
                asyncio.get_running_loop().call_later(left, self._retry_prewarm, shape)
            elif self._capacity.fits({*self._processes, shape}):
                self._spawn(shape)
                return

    def _retry_prewarm(self, shape: Shape) -> None:
        if not self._closing and shape not in self._processes:
            self._schedule()

    def _spawn(self, shape: Shape) -> None:
        process = self._host.process(shape)
        self._processes[shape] = process
        self._metrics.spawns.labels(shape.key).inc()
        self._starting[process] = self._own(self._live(process))

    async def _live(self, process: ShapeProcess) -> None:
        """Own one process from its spawn to its end."""
        shape = process.shape
        warm_up = self._warm_up(shape) if self._warm_up is not None else None
        try:
            ready = await self._host.start_process(
                process, CacheDirs.of(self._cache_root, shape), str(self._run_dir), warm_up
            )
        except ProcessLost as lost:
            await process.exited()
            self._processes.pop(shape, None)
            if not self._closing:
                self._on_failed_start(shape, lost)
        except asyncio.CancelledError:
            self._processes.pop(shape, None)
            raise
        else:
            del self._starting[process]
            self._on_ready(process, ready)
            status = await process.exited()
            logger.info("%s ended with status %s", process, status)
            self._processes.pop(shape, None)
        finally:
            self._starting.pop(process, None)
        self._schedule()

    def _on_ready(self, process: ShapeProcess, ready: Ready) -> None:
        key, seconds = process.shape.key, time.monotonic() - process.started_at
        logger.info(
            "%s is ready after %.2f s (import %.2f, attach %.2f, trace %.2f, warm-up %.2f; %.2f GB)",
            process, seconds, ready.import_s, ready.load_s, ready.trace_s, ready.warm_s, ready.memory.resident / 1e9,
        )  # fmt: skip
        self._breakers[process.shape].succeeded()
        if (lending := self._host.lending) is not None:
            self._capacity.lent(lending)
            self._metrics.lent.set(lending.bytes)
        self._remember_memory(process)
        self._metrics.cold_spawn.labels(key).observe(seconds)
        parts = (ready.import_s, ready.load_s, ready.trace_s, ready.warm_s)
        for phase, part in zip(("import", "attach", "trace", "warm_up"), parts, strict=True):
            self._metrics.start_phase.labels(phase).observe(part)
        if sum(p.state in (State.READY, State.BUSY) for p in self._processes.values()) >= self._ready_min:
            self._hot_enough.set()
        self._schedule()

    def _on_failed_start(self, shape: Shape, lost: ProcessLost) -> None:
        self._count_loss(shape, lost)
        breaker = self._breakers[shape]
        breaker.failed()
        logger.error("spawn failed (%d in a row): %s", breaker.failures, lost)
        if breaker.remaining:
            logger.error(
                "%s is left alone for %.0f s after %d failed starts", shape, breaker.remaining, breaker.failures
            )
            for ticket in [t for t in self._waiting if t.job.shape == shape]:
                self._waiting.remove(ticket)
                _settle(ticket, lost)

    def _check_breaker(self, shape: Shape) -> None:
        if (breaker := self._breakers.get(shape)) is not None and breaker.remaining:
            raise Unavailable(f"{shape.key} is left alone for {breaker.remaining:.0f} s after failed starts")

    def _on_weights_lost(self) -> None:
        """What the borrowers have mapped is no more to be trusted: replace them all. Their jobs are tried again."""
        for process in self._processes.values():
            process.kill("weights_lost")

    def _evict(self, process: ShapeProcess, for_shape: Shape) -> None:
        logger.info("evicting %s for %s", process, for_shape.key)
        self._metrics.evictions.labels(process.shape.key).inc()
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
        self._run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)  # somebody may have tidied up
        process.reserve()
        self._own(self._run(ticket, process))

    async def _run(self, ticket: _Ticket, process: ShapeProcess) -> None:
        queued = time.monotonic() - ticket.admitted
        logger.info("job %s starts shape=%s pid=%s queue=%.3f", ticket.job.id, process.shape.key, process.pid, queued)
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
            self._count_loss(process.shape, lost)
            logger.error("job %s: %s", ticket.job.id, lost)
            self._running.discard(ticket)
            ticket.process = None
            if not ticket.result.done():
                self._waiting.insert(0, ticket)
                self._waiting.sort(key=lambda t: t.number)
                self._charge(ticket, lost)
        else:
            self._remember_memory(process)
            path = self._run_dir / f"{ticket.job.id}.mp4"
            if ticket.result.done():
                path.unlink(missing_ok=True)
            else:
                ticket.result.set_result(Video(path, done.sample_rate, {"queue": queued, **done.phases}))
        finally:
            self._running.discard(ticket)
            held = lease.release()
            self._seconds[process.shape] = 0.5 * (held + self._seconds.get(process.shape, held))
            self._schedule()

    def _charge(self, ticket: _Ticket, lost: ProcessLost) -> None:
        """A job lost its process and waits again: let it try once more, or tell its client."""
        ticket.losses.append(lost)
        if len(ticket.losses) < ATTEMPTS and lost.reason != "gen_timeout":
            logger.warning("job %s lost its process (%s) and is tried again", ticket.job.id, lost.reason)
            self._metrics.retries.labels(ticket.job.shape.key).inc()
            return
        self._waiting.remove(ticket)
        if len(ticket.losses) >= ATTEMPTS and all(loss.reason in _JOBS_OWN_FAULT for loss in ticket.losses):
            logger.error("job %s ended %d processes: its parameters are refused for %g s", ticket.job.id,
                         len(ticket.losses), POISON_SECONDS)  # fmt: skip
            self._poisons[_parameters(ticket.job)] = time.monotonic() + POISON_SECONDS
            if len(self._poisons) > _MAX_POISONS:
                self._poisons.popitem(last=False)
        _settle(ticket, lost)

    def _count_loss(self, shape: Shape, lost: ProcessLost) -> None:
        self._metrics.failures.labels(lost.reason).inc()
        self._last_errors[shape] = str(lost)
        if lost.reason == "compile":
            self._set_cache_aside(shape)

    def _set_cache_aside(self, shape: Shape) -> None:
        """torch.compile failed on this shape's cache: let the next process compile into an empty one. Once."""
        root = CacheDirs.of(self._cache_root, shape).root
        aside = root.with_name(f"{root.name}.damaged")
        if aside.exists() or not root.exists():
            return
        try:
            root.rename(aside)
        except OSError as error:
            logger.error("the compile cache %s is damaged and can not be moved away: %s", root, error)
        else:
            logger.error("the compile cache of %s is damaged and now at %s; a new one is compiled. Bake it again: %s",
                         shape.key, aside, WARM_UP_COMMAND.format(key=shape.key))  # fmt: skip

    def _remember_memory(self, process: ShapeProcess) -> None:
        if process.memory is not None:
            self._capacity.observe(process.shape, process.memory)
            self._metrics.memory.labels(process.shape.key, "resident").set(process.memory.resident)
            self._metrics.memory.labels(process.shape.key, "peak").set(process.memory.peak)

    def _abandon(self, ticket: _Ticket) -> None:
        if ticket in self._waiting:
            self._waiting.remove(ticket)
            self._schedule()
        elif ticket.process is not None:
            ticket.process.cancel(ticket.job)

    def _return_lease(self, held: float) -> None:
        self._leases += 1
        self._metrics.lease.inc(held)
        self._schedule()

    def _publish(self) -> None:
        metrics = self._metrics
        metrics.size.set(len(self._processes))
        metrics.leases.set(self._concurrency - self._leases)
        metrics.wait.set(self.expected_wait())
        metrics.set_shapes(
            {shape.key: process.state.value for shape, process in self._processes.items()},
            Counter(ticket.job.shape.key for ticket in self._waiting),
            {shape.key for shape, breaker in self._breakers.items() if breaker.remaining},
        )

    def _own(self, coroutine: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


_JOBS_OWN_FAULT: Collection[str] = ("gen_eof", "cuda_fault", "parse_error", "desync", "gen_timeout")
"""Losses in the middle of a job that the job itself may have caused."""


class _Lease:
    """The right to use the GPU, given back once."""

    def __init__(self, give_back: Callable[[float], None]) -> None:
        self._give_back = give_back
        self._began = time.monotonic()
        self._held: float | None = None

    def release(self) -> float:
        """Give it back, if that was not done yet; returns for how many seconds it was held."""
        if self._held is None:
            self._held = time.monotonic() - self._began
            self._give_back(self._held)
        return self._held


def _parameters(job: Job) -> Job:
    """The job without what makes it one of a kind."""
    return replace(job, id="")


def _settle(ticket: _Ticket, error: Exception) -> None:
    if not ticket.result.done():
        ticket.result.set_exception(error)
