"""A gang: as many shape processes as a key has GPUs, one on each device, that make one video together.

They are its ranks. They are READY together and die together: whoever ends first takes the others with it. All are given
each job; what rank 0 says is what the gang says, and it alone writes the video.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ltx2_pool.processes.host import Process
from ltx2_pool.processes.process import Timeouts
from ltx2_pool.processes.shape import ShapeProcess
from ltx2_pool.processes.weights import WeightsProcess
from ltx2_pool.words.outcomes import FROM_OUTSIDE, JobFailed, OnEvent, ProcessLost, Reason
from ltx2_pool.words.protocol import Compiled, Done, Memory, Ready
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import CacheDirs

logger = logging.getLogger(__name__)

_LAST_WORDS = 1.0
"""Seconds for which the end of another rank may still explain the failure of one: an exchange with a rank that dies
fails before that is gone."""


class Gang(Process):
    """As `host.Process` promises; its `memory` is that of the rank that needs most."""

    def __init__(self, ranks: Sequence[ShapeProcess], timeouts: Timeouts) -> None:
        """`ranks` by their numbers, not started yet."""
        self.ranks = tuple(ranks)
        self.key = ranks[0].key
        self.name = str(self.key)
        self.devices = tuple(device for rank in ranks for device in rank.devices)
        self.began = time.monotonic()
        self.on_compile_failure: Callable[[], None] = lambda: None
        """As :attr:`ltx2_pool.processes.shape.ShapeProcess.on_compile_failure`."""
        self._timeouts = timeouts
        self._watches: list[asyncio.Task[None]] = []
        self._fallen: list[ShapeProcess] = []
        """Those that ended, or said that they must, before the others were made to: in that order."""
        self._falling = asyncio.Event()
        """The others are made to end."""
        self._cause: tuple[Reason, str] | None = None
        """Why the gang made its ranks end."""

    def __str__(self) -> str:
        return f"{self.name} ({len(self.ranks)} ranks, pids {', '.join(map(str, self.pids))})"

    @property
    def pid(self) -> int | None:
        """Rank 0's."""
        return self.ranks[0].pid

    @property
    def pids(self) -> tuple[int | None, ...]:
        """As :attr:`ltx2_pool.processes.host.Process.pids`."""
        return tuple(rank.pid for rank in self.ranks)

    @property
    def alive(self) -> bool:
        """As :attr:`ltx2_pool.processes.host.Process.alive`: of all ranks."""
        return all(rank.alive for rank in self.ranks)

    @property
    def tail(self) -> Sequence[str]:
        """Of the rank that ended first, or of rank 0."""
        return (self._fallen or self.ranks)[0].tail

    async def start(
        self,
        recipe: Recipe,
        cache: CacheDirs,
        warm_up: tuple[Job, ...] = (),
        weights: Sequence[WeightsProcess | None] = (),
    ) -> Ready:
        """Start all ranks, and return when all are READY. `weights` has for each what it borrows from.

        They share one cache: what the ranks compile differs, and is found by its content. Raises ProcessLost; nothing
        is then left of any of them.
        """
        self.began = time.monotonic()
        if not self.alive:
            raise await self.loss()
        try:
            rendezvous = os.memfd_create("ltx2-rendezvous", os.MFD_CLOEXEC)
        except OSError as error:
            self._doom("system", f"could not be started: no memory for its rendezvous: {error}")
            raise await self.loss() from error
        self._watches = [asyncio.create_task(self._watch(rank)) for rank in self.ranks]
        lenders = weights or [None] * len(self.ranks)
        starts = [
            asyncio.create_task(rank.start(recipe, cache, warm_up, lender, [rendezvous]))
            for rank, lender in zip(self.ranks, lenders, strict=True)
        ]
        try:
            ready = await asyncio.gather(*starts)
        except ProcessLost:
            lost = await self.loss()
            ends = await asyncio.gather(*starts, return_exceptions=True)
            causes = [end.__cause__ for end in ends if isinstance(end, ProcessLost) and end.__cause__ is not None]
            raise lost from next(iter(causes), None)
        except BaseException:
            self.kill()
            await asyncio.gather(*starts, return_exceptions=True)
            raise
        finally:
            os.close(rendezvous)
        self.memory = _most([each.memory for each in ready])
        slowest = {
            name: max(getattr(each, name) for each in ready) for name in Ready.model_fields if name.endswith("_s")
        }
        return Ready(**slowest, memory=self.memory)

    async def generate(self, job: Job, output: Path, on_event: OnEvent, pixels: Sequence[int] = ()) -> Done:
        """As :meth:`ltx2_pool.processes.host.Process.generate`."""
        if not self.alive:
            raise await self.loss()
        for rank in self.ranks:
            rank.show(pixels)
        makings = [
            asyncio.create_task(rank.generate(job, output, on_event if rank is self.ranks[0] else _ignore))
            for rank in self.ranks
        ]
        try:
            await self._finished(makings)
        finally:
            for making in makings:
                making.cancel()  # which ends a rank that is still at it
            answers = await asyncio.gather(*makings, return_exceptions=True)
        return await self._conclude(*answers)

    async def _finished(self, makings: Sequence[asyncio.Task[Done]]) -> None:
        """Wait for all answers, but not for one that cannot come: the ranks are in step, or they wait for ever."""
        waiting = set(makings)
        while waiting:
            failures = [making.exception() for making in makings if making.done()]
            decided = makings[0].done() or any(failures)
            lost = any(isinstance(failure, ProcessLost) for failure in failures)  # which ends the others
            timeout = self._timeouts.cancel if decided and not lost else None
            done, waiting = await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                answers = [making.exception() or making.result() if making.done() else None for making in makings]
                self._doom("desync", f"{_out_of_step(answers)}, {timeout:g} s after the first answer")
                return

    async def _conclude(self, *answers: Done | BaseException) -> Done:
        """What rank 0 answered, if the ranks are in step."""
        if self._cause is not None:
            raise await self.loss()
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, JobFailed | ProcessLost):
                raise answer  # of `on_event`, which has ended rank 0
        if any(isinstance(answer, ProcessLost) for answer in answers):
            raise await self.loss()
        first, *others = answers
        # Rank 0 may fail in what it does alone: before the others begin, and when they have done their part. Any other
        # error, of all ranks as well, may be one of the exchange between them, which is then good for nothing.
        together = {_standing(answer)[0] for answer in others}
        alone = isinstance(first, JobFailed) and together in ({"cancelled"}, {"done"})
        if not alone and {_standing(first)[0], *together} not in ({"done"}, {"refused"}):
            self._doom("desync", _out_of_step(answers))
            raise await self.loss()
        memories = [rank.memory for rank in self.ranks if rank.memory is not None]
        self.memory = _most(memories) if memories else None
        if isinstance(first, JobFailed):
            raise JobFailed(self.key, first.kind, first.error, self.memory)
        assert isinstance(first, Done)
        self.jobs_done += 1
        compiled = [answer.compiled for answer in answers if isinstance(answer, Done)]
        looked_up = {name: sum(getattr(each, name) for each in compiled) for name in Compiled.model_fields}
        return first.model_copy(update={"compiled": Compiled(**looked_up), "memory": self.memory})

    def cancel(self, job: Job) -> None:
        """As :meth:`ltx2_pool.processes.host.Process.cancel`. The ranks agree on the step before which they stop."""
        for rank in self.ranks:
            rank.cancel(job)

    def kill(self, why: Reason | None = None) -> None:
        """As :meth:`ltx2_pool.processes.host.Process.kill`: all ranks."""
        self._falling.set()
        for rank in self.ranks:
            rank.kill(why)

    async def stop(self) -> None:
        """As :meth:`ltx2_pool.processes.host.Process.stop`: all ranks at once."""
        self._falling.set()
        await asyncio.gather(*(rank.stop() for rank in self.ranks))

    async def exited(self) -> int:
        """As :meth:`ltx2_pool.processes.host.Process.exited`: of all ranks; the status of the first that ended."""
        statuses = await asyncio.gather(*(rank.exited() for rank in self.ranks))
        await asyncio.gather(*self._watches)
        return statuses[self.ranks.index((self._fallen or self.ranks)[0])]

    async def ended(self) -> bool:
        """As :meth:`ltx2_pool.processes.process.ChildProcess.ended`: all ranks."""
        return all(await asyncio.gather(*(rank.ended() for rank in self.ranks)))

    async def loss(self) -> ProcessLost:
        """As :meth:`ltx2_pool.processes.process.ChildProcess.loss`: of the rank that is to blame.

        Of several that ended by themselves, one that something from outside explains, or that a signal ended: the
        others lost their neighbour. Else the first.
        """
        losses = {rank: await rank.loss() for rank in self.ranks}
        crashed = {rank for rank in self._fallen if rank.ended_because is None and _crashed(await rank.exited())}
        rank = min(
            self._fallen or self.ranks, key=lambda each: (losses[each].reason not in FROM_OUTSIDE, each not in crashed)
        )
        lost = losses[rank]
        reason, what = self._cause or (lost.reason, f"rank {self.ranks.index(rank)} of {len(self.ranks)}: {lost.what}")
        memories = [each.memory for each in losses.values() if each.memory is not None]
        if reason == "compile":
            call, self.on_compile_failure = self.on_compile_failure, lambda: None
            call()
        return ProcessLost(
            self.name,
            reason,
            what,
            lost.tail,
            began=any(each.began for each in losses.values()),
            devices=() if self._cause else rank.devices,
            memory=_most(memories) if memories else None,
        )

    async def _watch(self, rank: ShapeProcess) -> None:
        """Once one has ended, or said that it must, the others go with it: when it is clear which was the first."""
        await rank.noticed()
        if self._falling.is_set():
            return
        self._fallen.append(rank)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS):
                why = rank.ended_because
                if why not in FROM_OUTSIDE and (why is not None or not _crashed(await rank.exited())):
                    await self._falling.wait()
        self._falling.set()
        for other in self.ranks:
            if other.alive:
                other.kill()

    def _doom(self, reason: Reason, what: str) -> None:
        if self._cause is None:
            self._cause = reason, what
        self.kill()


def _crashed(status: int) -> bool:
    """Whether a signal ended a process that an error of its neighbours explains badly: torch's watchdog aborts."""
    return status < 0 and -status != signal.SIGABRT


def _standing(answer: object) -> tuple[str, str]:
    """Where a rank stands after its answer."""
    if isinstance(answer, JobFailed):
        return answer.kind, answer.error
    return ("done", "") if isinstance(answer, Done) else ("silent" if answer is None else "lost", "")


def _out_of_step(answers: Sequence[object]) -> str:
    said = [": ".join(filter(None, _standing(answer))) for answer in answers]
    return f"fell out of step: {', '.join(f'rank {number} {what}' for number, what in enumerate(said))}"


def _most(memories: Sequence[Memory]) -> Memory:
    """What the rank needs that needs most: each has a device of its own."""
    return Memory(
        resident=max(each.resident for each in memories),
        peak=max(each.peak for each in memories),
        encoding=max(each.peak if each.encoding is None else each.encoding for each in memories),
        weights=max(each.weights for each in memories),
        generated=all(each.generated for each in memories),
    )


def _ignore(_event: object) -> None:
    """Of the other ranks nobody wants to know how far they are."""
