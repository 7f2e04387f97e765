"""A child pinned to one key: the process that the pool deals with."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ltx2_pool.processes import endings
from ltx2_pool.processes.guard import Guard
from ltx2_pool.processes.host import Process
from ltx2_pool.processes.process import ChildProcess, Gone, Timeouts
from ltx2_pool.processes.slate import Slate
from ltx2_pool.processes.spawner import Spawner
from ltx2_pool.processes.weights import WeightsProcess
from ltx2_pool.words.device import shown
from ltx2_pool.words.outcomes import JobFailed, NoRoom, OnEvent, ProcessLost, Reason
from ltx2_pool.words.pictures import Size
from ltx2_pool.words.protocol import Assign, Cancel, Done, Failed, FromChild, Generate, Phase, Ready, Step
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import CacheDirs, Key

logger = logging.getLogger(__name__)


class ShapeProcess(ChildProcess, Process):
    """As `host.Process` promises. Its owner calls `start` once, then `generate` for each job."""

    def __init__(
        self,
        key: Key,
        devices: tuple[str, ...],
        spawner: Spawner,
        guard: Guard,
        timeouts: Timeouts,
        picture_sizes: tuple[Size, ...] = (),
        rank: int | None = None,
    ) -> None:
        """`picture_sizes`: those at which it is given pictures; none: it is given no picture. `rank`: in a gang."""
        super().__init__(str(key) if rank is None else f"{key} rank {rank}", spawner, guard, timeouts)
        self.key = key
        self._rank = rank or 0
        self.devices = devices
        self.jobs_done = 0
        self.began = time.monotonic()
        self.on_compile_failure: Callable[[], None] = lambda: None
        """Called once when what it compiled with seems to be damaged."""
        self._picture_sizes = picture_sizes
        self._slate: Slate | None = None
        self._weights: WeightsProcess | None = None
        self._job: Job | None = None
        self._on_event: OnEvent | None = None
        self._cancelled = False

    @property
    def pid(self) -> int | None:
        """As :attr:`ltx2_pool.processes.host.Process.pid`."""
        return super().pid

    @property
    def alive(self) -> bool:
        """As :attr:`ltx2_pool.processes.host.Process.alive`."""
        return super().alive

    @property
    def tail(self) -> Sequence[str]:
        """As :attr:`ltx2_pool.processes.host.Process.tail`."""
        return super().tail

    async def start(
        self,
        recipe: Recipe,
        cache: CacheDirs,
        warm_up: tuple[Job, ...] = (),
        weights: WeightsProcess | None = None,
        rendezvous: Sequence[int] = (),
    ) -> Ready:
        """Spawn the child and wait until it is READY: with a hot shape when `warm_up` is given.

        It borrows from `weights`; without, it loads the checkpoint. `rendezvous`: of a gang, the descriptor of the
        memory in which its ranks find each other. Raises ProcessLost; the child is then gone.
        """
        self.began = time.monotonic()
        self._weights = weights
        if not self.alive:
            raise await self.loss()
        assign = Assign(
            key=self.key,
            recipe=recipe,
            picture_sizes=self._picture_sizes,
            warm_up=warm_up,
            borrow=weights is not None,
            rank=self._rank,
        )
        try:
            slate = self._slate = Slate(self._picture_sizes)
        except OSError as error:
            self._doom("system", f"could not be started: no memory for pictures: {error}")
            raise await self.loss() from error
        inherited = [slate.fd]
        if weights is not None and weights.desk is not None:
            inherited.append(weights.desk.fileno())
        inherited += rendezvous
        advice = "raise LTX2_POOL_SPAWN_TIMEOUT if it only needs longer"
        environment = {**recipe.environment(cache), **shown(self.devices)}
        message = await self.begin(environment, inherited, assign, self._timeouts.spawn, advice)
        if not isinstance(message, Ready):
            self._doom("spawn_parse_error", f"sent {message.type!r} before READY")
            raise await self.loss()
        self._ready, self.memory = True, message.memory
        return message

    async def generate(self, job: Job, output: Path, on_event: OnEvent, pixels: Sequence[int] = ()) -> Done:
        """As :meth:`ltx2_pool.processes.host.Process.generate`."""
        if self._job is not None:
            raise RuntimeError(f"{self} was given job {job.id} while it makes {self._job.id}")
        self._job_began = False
        if not self.alive:
            raise await self.loss()
        if not self._ready:
            raise RuntimeError(f"{self} was given job {job.id} before it was READY")
        self.show(pixels)
        self._job, self._on_event, self._cancelled = job, on_event, False
        try:
            async with asyncio.timeout(self._timeouts.generation):
                answer = await self._ask(Generate(job=job, output=str(output)))
        except Gone:
            raise await self.loss() from None
        except TimeoutError:
            self._doom("gen_timeout", f"took over {self._timeouts.generation:g} s for a video")
            raise await self.loss() from None
        except BaseException:
            self.kill()  # cancelled, or `on_event` raised: the job is not wanted and cannot be taken back in time
            raise
        finally:
            self._job = self._on_event = None
        return await self._conclude(answer)

    def show(self, pixels: Sequence[int]) -> None:
        """Give it the pictures of the next job. Raises NoRoom: it has not been told of the job, and is sound."""
        if pixels and self._slate is not None:
            try:
                self._slate.write(pixels)
            except OSError as error:
                raise NoRoom(f"the process could not be given the pictures of its job: {error}") from error

    async def _conclude(self, answer: FromChild) -> Done:
        if isinstance(answer, Done):
            self.jobs_done += 1
            self.memory = answer.memory
            return answer
        if not isinstance(answer, Failed):
            self._doom("desync", f"sent {answer.type!r} in the middle of a job")
            raise await self.loss()
        self.memory = answer.memory or self.memory
        if answer.kind in ("refused", "soft", "cancelled"):
            raise JobFailed(self.key, answer.kind, answer.error, answer.memory)
        if answer.kind == "oom":
            self._doom("oom", f"had not enough memory: {answer.error}")
        elif answer.kind == "barred":
            self._doom("system", f"may not write the file that it was given: {answer.error}")
        elif answer.kind == "fatal":
            self._doom("cuda_fault", f"was ended by a fatal error: {answer.error}")
        elif endings.is_machines_fault(answer.error):
            self._doom("system", f"could not compile, for want of what this machine refused: {answer.error}")
        else:
            self._doom("compile", f"could not compile: {answer.error}")
        raise await self.loss()

    def cancel(self, job: Job) -> None:
        """As :meth:`ltx2_pool.processes.host.Process.cancel`."""
        if self._job is None or self._job.id != job.id or self._cancelled or self._channel is None:
            return
        self._cancelled = True
        self._channel.post(Cancel(job_id=job.id))

        def doom() -> None:
            if self._job is job:
                logger.warning("%s did not stop job %s within %g s", self, job.id, self._timeouts.cancel)
                self._doom("cancel_timeout", f"did not stop its job within {self._timeouts.cancel:g} s")

        self._later(self._timeouts.cancel, doom)

    async def loss(self) -> ProcessLost:
        """As the base class's; what follows from the end of the weights process is never the job's or the shape's."""
        lost = await super().loss()
        if lost.reason == "compile":
            call, self.on_compile_failure = self.on_compile_failure, lambda: None
            call()
        follows: tuple[Reason, ...] = ("spawn_eof", "gen_eof", "cuda_fault", "killed")
        weights = self._weights
        if weights is not None and weights.kept and self._ready:
            return lost  # it has attached what does not end with that process
        if weights is not None and not weights.alive and lost.reason in follows:
            lost = ProcessLost(
                self.name,
                "weights_lost",
                f"{lost.what}; the weights process that it borrows from is gone",
                lost.tail,
                began=lost.began,
                memory=lost.memory,
            )
        return lost

    @property
    def _waits_for_work(self) -> bool:
        return self._ready and self._job is None

    async def _release(self) -> None:
        if self._slate is not None:
            self._slate.close()
            self._slate = None
        await super()._release()

    def _take(self, message: FromChild) -> None:
        if self._job is None or not isinstance(message, Phase | Step | Done | Failed):
            super()._take(message)
            return
        if message.job_id != self._job.id:
            self._doom("desync", f"answered job {message.job_id!r} while {self._job.id!r} was asked")
        elif isinstance(message, Phase | Step):
            self._job_began = self._job_began or isinstance(message, Phase)
            try:
                if self._on_event is not None:
                    self._on_event(message)
            except Exception as error:
                if self._answer is not None and not self._answer.done():
                    self._answer.set_exception(error)
        else:
            super()._take(message)
