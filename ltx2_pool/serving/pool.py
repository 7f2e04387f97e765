"""The pool: carries out what the book decides. Every action has one owner here, and every owner settles what it owns.

An event (a request, a message of a child, the end of a process) changes the :class:`~ltx2_pool.serving.book.Book`, and
:meth:`Pool._decide` carries out what follows. A process is owned by `_live` from its start to its end, a job in a
process by `_run`. Whatever is raised in an owner becomes an answer, a returned reservation and a counted loss.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from ltx2_pool.processes.host import Host, Process
from ltx2_pool.serving import files
from ltx2_pool.serving.actions import Evict, Refuse, Start, Wake
from ltx2_pool.serving.book import Begin, Book
from ltx2_pool.serving.budget import Budgets
from ltx2_pool.serving.devices import helpers_out
from ltx2_pool.serving.ledger import Phase, Reservation
from ltx2_pool.serving.metrics import Metrics
from ltx2_pool.serving.report import Health, Report
from ltx2_pool.serving.tickets import Answer, Ticket
from ltx2_pool.words.device import Device
from ltx2_pool.words.outcomes import (
    JobFailed,
    JobTimeout,
    NoRoom,
    OnEvent,
    PoolClosed,
    ProcessLost,
    Reason,
    Rejected,
    Video,
)
from ltx2_pool.words.protocol import Phase as PhaseBegins
from ltx2_pool.words.protocol import Ready, Step
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import Key

logger = logging.getLogger(__name__)

_LAST_WAIT = 60.0
"""Seconds for processes to end that were told to, and killed after their grace."""


class Pool:
    """Makes videos in the processes of a host. One contract for all hosts: queue, deadlines, drain, metrics, errors."""

    def __init__(
        self,
        host: Host,
        book: Book,
        run_dir: Path,
        *,
        devices: tuple[Device, ...] = (),
        memory_reserve: int = 0,
        warm_up: Callable[[Key], tuple[Job, ...]] | None = None,
        ready_min: int = 0,
        metrics: Metrics | None = None,
    ) -> None:
        """`devices`: those of the book's ledger whose budget is to be found out, less `memory_reserve` bytes each."""
        self._host = host
        self._book = book
        self._run_dir = run_dir
        self._budgets = Budgets(host, book, devices, memory_reserve)
        self._warm_up = warm_up
        self._ready_min = ready_min
        self._report = Report(host, book, metrics or Metrics([]))
        self._metrics = self._report.metrics
        self.listener = book.listener
        """To be told what the fleet is asked for."""
        self._handles: dict[int, Process] = {}  # by the number of their reservation
        self._events: dict[int, OnEvent] = {}  # by the number of their ticket
        self._lives: dict[int, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._hot_enough = asyncio.Event()
        self._started = False
        self._closing: asyncio.Task[None] | None = None
        self._progress = asyncio.Event()  # set after every decision

    # What the endpoint calls.

    async def start(self) -> None:
        """Start ahead, and return when as many shapes as asked for are hot, or as many as can be.

        Raises OSError when the host cannot be started at all.
        """
        await self._host.start()
        self._host.on_weights_lost(self._on_weights_lost)
        self._budgets.measure()
        self._decide()
        if self._ready_min:
            await self._hot_enough.wait()
        self._started = True
        self._publish()

    async def generate(self, job: Job, on_event: OnEvent, user: str = "", pixels: Sequence[int] = ()) -> Video:
        """Make one video; the caller owns its file, and `pixels`. Cancelling the awaiting task cancels the job.

        Raises a Rejected, JobFailed (the pipeline said no) or ProcessLost (after the last process that it may lose).
        """
        key, began = job.key, time.monotonic()
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

        def settle(outcome: Answer) -> None:
            if not answer.done():
                answer.set_result(outcome)
            elif isinstance(outcome, Video):
                files.remove(outcome.path)

        try:
            if self._host.broken is not None:
                raise PoolClosed(f"nothing can be made here any more: {self._host.broken}")
            ticket = self._book.admit(job, key, user, settle, began, pixels)
            self._events[ticket.number] = on_event
            self._decide()
            try:
                outcome = await self._answer(ticket, answer)
            finally:
                self._events.pop(ticket.number, None)
        except Rejected as rejected:
            outcome = rejected
        self._report.answered(job.key, outcome, time.monotonic() - began)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def _answer(self, ticket: Ticket, answer: asyncio.Future[Answer]) -> Answer:
        limit = self._book.limits.job_timeout
        try:
            done, _ = await asyncio.wait([answer], timeout=limit)
        except asyncio.CancelledError:
            self._metrics.cancellations.labels(str(ticket.key)).inc()
            self._give_up(ticket, answer)
            raise
        if not done:
            self._give_up(ticket, answer)
            raise JobTimeout(f"not done within {limit:g} s")
        return answer.result()

    def _give_up(self, ticket: Ticket, answer: asyncio.Future[Answer]) -> None:
        if answer.done():
            outcome = answer.result()
            if isinstance(outcome, Video):  # it came in the very moment in which its client left
                files.remove(outcome.path)
        answer.cancel()
        process = self._book.give_up(ticket)
        if process is not None and (handle := self._handles.get(process.id)) is not None:
            handle.cancel(ticket.job)
        self._decide()

    async def close(self, drain_timeout: float = 0) -> None:
        """Take no more jobs, let those admitted finish for `drain_timeout` seconds, then end every process.

        May be called again, also while it runs: there is only one close.
        """
        self._book.close()
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(drain_timeout))
        await asyncio.shield(self._closing)

    async def _close(self, drain_timeout: float) -> None:
        if self._book.unanswered and drain_timeout:
            logger.info("draining %d jobs for at most %g s", self._book.unanswered, drain_timeout)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(drain_timeout):
                    while self._book.unanswered:
                        self._progress.clear()
                        await self._progress.wait()
        self._book.settle_all(lambda: PoolClosed("the worker shut down before this job was done"))
        if self._timer is not None:
            self._timer.cancel()
        for number, handle in self._handles.items():
            if number in self._book.running:
                handle.kill()
            elif number in self._lives and handle.pid is None:  # it waits for a helper: nothing to stop yet
                self._lives[number].cancel()
        stopping = [asyncio.create_task(self._stop(handle)) for handle in self._handles.values()]
        deadline = time.monotonic() + _LAST_WAIT
        while left := {task for task in (*stopping, *self._tasks) if not task.done()}:
            await asyncio.wait(left, timeout=1.0)
            if time.monotonic() > deadline:
                logger.critical("%d processes do not end, although they were killed: they are left behind", len(left))
                break
        await self._host.close()

    def abort(self) -> None:
        """Stop draining: tell the jobs that are left, and kill what generates them."""
        self._book.close()
        self._book.settle_all(lambda: PoolClosed("the worker was told to stop at once"))
        for handle in self._handles.values():
            handle.kill()
        self._publish()

    @property
    def health(self) -> Health:
        """``unable``: no video can be made now, which may pass; ``broken``: it will not."""
        return self._report.health

    async def health_after(self, known: Health) -> Health:
        """Wait until the health is different from `known`."""
        return await self._report.health_after(known)

    def status(self) -> dict[str, Any]:
        """Processes, queue, memory and what went wrong last, for people and for tests."""
        return self._report.status(self._handles)

    def _entries(self) -> list[tuple[Reservation, Process]]:
        reservations = self._book.ledger.reservations
        return [(reservations[number], handle) for number, handle in self._handles.items() if number in reservations]

    # Deciding, and doing.

    def _decide(self) -> None:
        """Carry out what follows from the last event. Nothing in here waits, and nothing can fail half-way."""
        for device, why in self._book.devices.taken_out():
            logger.error(why)
            self._host.give_up(device)
            self._end_all_on(device, "device_lost")
        while self._book.devices.suspects:
            self._own(self._budgets.examine(self._book.devices.suspects.pop()))
        for entry, handle in self._entries():
            if not handle.alive and entry.idle:
                self._on_idle_death(entry, handle)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = time.monotonic()
        helpers = helpers_out(self._book.ledger.devices, self._host.helpers_pause, now)
        for action in self._book.next_actions(now, helpers):
            match action:
                case Begin():
                    self._begin(action)
                case Start():
                    ticket = action.job
                    assert isinstance(ticket, Ticket)
                    self._own(self._run(ticket, action.process, self._handles[action.process.id]))
                case Evict():
                    logger.info("evicting %s: %s", action.process.key, action.why)
                    self._metrics.evictions.labels(str(action.process.key)).inc()
                    self._own(self._stop(self._handles[action.process.id]))
                case Refuse():
                    logger.warning("job refused: %s is %s", action.job.key, action.pause.refuse)
                case Wake():
                    self._timer = asyncio.get_running_loop().call_later(max(0.0, action.at - now) + 1e-3, self._decide)
        self._publish()

    def _begin(self, action: Begin) -> None:
        entry = action.process
        self._metrics.spawns.labels(str(entry.key)).inc()
        handle = self._handles[entry.id] = self._host.process(entry.key, entry.devices)
        warm_up = self._warm_up(entry.key) if self._warm_up is not None and action.warm else ()
        self._lives[entry.id] = self._own(self._live(entry, handle, warm_up))

    async def _live(self, entry: Reservation, handle: Process, warm_up: tuple[Job, ...]) -> None:
        """Own one process from its start to its end."""
        try:
            try:
                ready = await self._host.start_process(handle, warm_up)
                if not handle.alive:
                    raise ProcessLost(str(entry.key), "killed", "ended as it became ready", handle.tail)
            except ProcessLost as lost:
                self._on_failed_start(entry, lost)
            except Exception as error:
                logger.exception("%s could not be started", entry.key)
                self._on_failed_start(entry, ProcessLost.unforeseen(str(entry.key), error))
            else:
                self._on_ready(entry, handle, ready)
                logger.info("%s (pid %s) ended with status %s", entry.key, handle.pid, await handle.exited())
                if entry.idle:
                    self._on_idle_death(entry, handle)
        finally:
            # Also when this task is cancelled: whatever there is of the process goes, and then what it held.
            handle.kill()
            try:
                await handle.exited()
            finally:
                self._book.end(entry)
                self._book.gone(entry)
                self._handles.pop(entry.id, None)
                self._lives.pop(entry.id, None)
                self._budgets.measure()
                self._decide()

    def _on_ready(self, entry: Reservation, handle: Process, ready: Ready) -> None:
        seconds = time.monotonic() - handle.began
        self._book.ready(entry, ready.memory, seconds)
        self._budgets.measure()
        self._report.started(handle, ready, seconds)
        self._decide()

    def _on_idle_death(self, entry: Reservation, handle: Process, reason: Reason = "killed") -> None:
        lost = ProcessLost(str(entry.key), reason, f"process {handle.pid} ended while idle", handle.tail)
        self._book.lost(entry, lost, time.monotonic())
        self._report.lost(entry.key, lost)

    def _on_failed_start(self, entry: Reservation, lost: ProcessLost) -> None:
        guilty = self._book.start_failed(entry, lost, time.monotonic())
        self._report.start_failed(entry.key, lost, guilty)

    async def _run(self, ticket: Ticket, entry: Reservation, handle: Process) -> None:
        """Own one job in one process, from its start there to its file or its failure."""
        began, queued = time.monotonic(), time.monotonic() - ticket.since
        lease = entry.phase is Phase.GENERATING
        encoding_began: float | None = None
        output = self._run_dir / f"{ticket.job.id}.{ticket.attempts}.mp4"
        logger.info("job %s starts shape=%s pid=%s queue=%.3f", ticket.job.id, entry.key, handle.pid, queued)

        def on_event(event: PhaseBegins | Step) -> None:
            nonlocal encoding_began
            if isinstance(event, PhaseBegins) and event.phase == "encode" and encoding_began is None:
                encoding_began = time.monotonic()
                self._book.encoding(entry)  # the device is done with this job: the next one may have it
                self._decide()
            if not ticket.answered and (tell := self._events.get(ticket.number)) is not None:
                try:
                    tell(event)
                except Exception:  # a listener's error is nobody else's
                    logger.exception("job %s: its listener failed", ticket.job.id)

        delivered = False
        try:
            if ticket.answered:  # its client left in the very moment in which it was given to the process
                raise JobFailed(entry.key, "cancelled", "cancelled")
            try:
                files.make_empty(output)
            except OSError as error:
                raise NoRoom(f"the file for the video cannot be made: {error}") from error
            done = await handle.generate(ticket.job, output, on_event, ticket.pixels)
            seconds = (encoding_began or time.monotonic()) - began
            video = Video(output, done.sample_rate, {"queue": queued, **done.phases})
            delivered = self._book.done(entry, done.memory, video, seconds)
            self._report.made(handle, hot=lease)
        except (JobFailed, NoRoom) as failed:
            self._book.failed(entry, failed)
        except ProcessLost as lost:
            self._on_lost(ticket, entry, lost)
        except asyncio.CancelledError:
            self._on_lost(ticket, entry, ProcessLost(str(entry.key), "killed", "its owner was cancelled"))
            raise
        except Exception as error:
            logger.exception("job %s: an error that nobody foresaw", ticket.job.id)
            self._on_lost(ticket, entry, ProcessLost.unforeseen(str(entry.key), error))
        finally:
            if entry.ending:
                handle.kill()
            if not delivered:
                files.remove(output)
            if lease:
                self._metrics.lease.inc(((encoding_began or time.monotonic()) - began) * len(entry.devices))
            self._decide()

    def _on_lost(self, ticket: Ticket, entry: Reservation, lost: ProcessLost) -> None:
        charge = self._book.lost(entry, lost, time.monotonic())
        self._report.job_lost(ticket, lost, charge)

    def _on_weights_lost(self, device: str) -> None:
        """What the borrowers there have mapped can no longer be trusted. Their jobs are tried again."""
        self._end_all_on(device, "weights_lost")
        self._decide()

    def _end_all_on(self, device: str, reason: Reason) -> None:
        self._budgets.forget(device)
        for entry, handle in self._entries():
            if device in entry.devices:
                if entry.idle:
                    self._on_idle_death(entry, handle, reason)
                handle.kill(reason)

    async def _stop(self, handle: Process) -> None:
        """Own the end of an idle process; `_live` owns the rest."""
        try:
            await handle.stop()
        except Exception:
            logger.exception("%s could not be stopped in good order", handle.key)
            handle.kill()

    def _publish(self) -> None:
        over = self._host.broken is not None or self._book.closing
        if over or self._book.hot_enough(self._ready_min, time.monotonic()):
            self._hot_enough.set()
        self._report.publish(self._started)
        self._progress.set()

    def _own(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._disown)
        return task

    def _disown(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.critical("an owner failed to settle what it owned; report this", exc_info=error)
