"""What the pool says of itself: metrics, status, health, and the last error of each shape."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from ltx2_pool.processes.host import Host, Process
from ltx2_pool.serving.book import Book, Charge
from ltx2_pool.serving.forecast import forecast
from ltx2_pool.serving.ledger import Phase, Reservation
from ltx2_pool.serving.metrics import Metrics
from ltx2_pool.serving.tickets import Ticket
from ltx2_pool.words.outcomes import JobFailed, ProcessLost, Rejected, Video
from ltx2_pool.words.protocol import Ready
from ltx2_pool.words.shapes import Key

logger = logging.getLogger(__name__)

Health = Literal["starting", "able", "unable", "broken"]

_STATES = {
    Phase.LOADING: "loading",
    Phase.SPAWNING: "spawning",
    Phase.IDLE: "ready",
    Phase.GENERATING: "generating",
    Phase.ENCODING: "encoding",
}


class Report:
    """Counts what happens, and publishes what is."""

    def __init__(self, host: Host, book: Book, metrics: Metrics) -> None:
        self._host = host
        self._book = book
        self.metrics = metrics
        self.health: Health = "starting"
        self._health_waiters: list[asyncio.Future[None]] = []
        self._last_errors: dict[str, str] = {}
        metrics.routers.set_function(lambda: book.listener.routers(time.monotonic()))

    def answered(self, asked: Key, outcome: Video | Exception, seconds: float) -> None:
        """A request got its answer, that many seconds after it came."""
        key, metrics = str(asked), self.metrics
        match outcome:
            case Video():
                metrics.requests.labels(key, "DONE").inc()
                metrics.latency.labels(key).observe(seconds)
                for phase, part in outcome.phases.items():
                    metrics.phase.labels(key, phase).observe(part)
            case Rejected():
                metrics.rejections.labels(outcome.reason).inc()
            case JobFailed():
                metrics.requests.labels(key, "ERROR").inc()
            case _:
                metrics.requests.labels(key, "FATAL").inc()

    def started(self, process: Process, ready: Ready, seconds: float) -> None:
        """A process became ready, that many seconds after it was asked for."""
        logger.info(
            "%s (pid %s) is ready after %.2f s (import %.2f, attach %.2f, trace %.2f, warm-up %.2f; %.2f GB)",
            *(process.key, process.pid, seconds, ready.import_s, ready.load_s, ready.trace_s, ready.warm_s),
            ready.memory.resident / 1e9,
        )
        metrics = self.metrics
        if (lending := self._host.lending(process.devices[0])) is not None:
            metrics.lent.set(lending.bytes)
        metrics.cold_spawn.labels(str(process.key)).observe(seconds)
        parts = (ready.import_s, ready.load_s, ready.trace_s, ready.warm_s)
        for phase, part in zip(("import", "attach", "trace", "warm_up"), parts, strict=True):
            metrics.start_phase.labels(phase).observe(part)
        self.remember_memory(process)

    def made(self, process: Process, *, hot: bool) -> None:
        """A process made a video; `hot`: it was there before the video's request had it started."""
        if not hot:
            self.metrics.cold.labels(str(process.key)).inc()
        self.remember_memory(process)

    def remember_memory(self, process: Process) -> None:
        """The process said what it holds."""
        if process.memory is not None:
            for kind in ("resident", "peak"):
                self.metrics.memory.labels(str(process.key), kind).set(getattr(process.memory, kind))

    def lost(self, key: Key, lost: ProcessLost) -> None:
        """A process was lost."""
        self.metrics.failures.labels(lost.reason).inc()
        self._last_errors[str(key)] = str(lost)

    def start_failed(self, key: Key, lost: ProcessLost, guilty: bool) -> None:
        """A process was lost before it took jobs; `guilty`: that counts against its shape."""
        self.lost(key, lost)
        starts = self._book.starts.get(key)
        failures = starts.failures if starts is not None else 0
        if guilty:
            logger.error("spawn failed (%d in a row): %s", failures, lost)
        else:
            logger.error("spawn failed, and will be tried again: %s", lost)
        if (left := self._book.unavailable(time.monotonic()).get(key)) is not None:
            logger.error("%s is unavailable for %.0f s after %d failed starts", key, left, failures)

    def job_lost(self, ticket: Ticket, lost: ProcessLost, charge: Charge | None) -> None:
        """A job lost its process, and that became of it."""
        self.lost(ticket.key, lost)
        logger.error("job %s: %s", ticket.job.id, lost)
        if charge == "retry":
            logger.warning("job %s lost its process (%s) and is tried again", ticket.job.id, lost.reason)
            self.metrics.retries.labels(str(ticket.key)).inc()
        elif charge == "poisoned":
            logger.error("job %s ended %d processes: its parameters are refused", ticket.job.id, ticket.faults)

    def publish(self, started: bool) -> None:
        """Bring gauges and health up to date; `started`: the pool has started."""
        now, book, metrics = time.monotonic(), self._book, self.metrics
        entries = book.ledger.reservations.values()
        metrics.size.set(len(entries))
        metrics.leases.set(sum(r.phase is Phase.GENERATING for r in entries))
        metrics.wait.set(book.expected_wait())
        metrics.set_shapes(
            Counter((str(r.key), _state(r)) for r in entries),
            Counter(str(ticket.key) for ticket in book.waiting),
            {str(key) for key in book.unavailable(now)},
        )
        metrics.set_devices(book.ledger.describe()["devices"], self._out(now))
        health: Health = "able" if book.able() else "unable"
        if self._host.broken is not None:
            health = "broken"
        elif not started:
            health = "starting"
        metrics.able.set(health == "able")
        if health != self.health:
            self.health = health
            for waiter in self._health_waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self._health_waiters.clear()

    def _out(self, now: float) -> dict[str, float]:
        """Devices that are out of service, and for how many seconds more."""
        faulty = {name: pause.until - now for name, pause in self._book.devices.out(now).items()}
        return {
            name: max(left, faulty.get(name, 0.0))
            for name in self._book.ledger.devices
            if (left := self._host.helpers_pause(name)) or name in faulty
        }

    async def health_after(self, known: Health) -> Health:
        """Wait until the health is another."""
        while self.health == known:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._health_waiters.append(waiter)
            await waiter
        return self.health

    def status(self, handles: Mapping[int, Process]) -> dict[str, Any]:
        """For people and for tests; `handles` are the processes by the number of their reservation."""
        now, book = time.monotonic(), self._book
        entries = book.ledger.reservations
        said, out = book.ledger.describe(), self._out(now)
        for name, device in said["devices"].items():
            device["out_s"] = math.ceil(10 * out.get(name, 0.0)) / 10
        return {
            **said,
            "health": self.health,
            "waiting": len(book.waiting),
            "waiting_by_shape": dict(Counter(str(ticket.key) for ticket in book.waiting)),
            "running": len(book.running),
            "leases": sum(r.phase is Phase.GENERATING for r in entries.values()),
            "forecast": forecast(book, now).said(),
            "fleet": self._fleet(now),
            "expected_wait_s": round(book.expected_wait(), 3),
            "helpers": self._host.pids,
            "processes": [
                {
                    "shape": str(entries[number].key),
                    "state": _state(entries[number]),
                    "pid": handle.pid,
                    "pids": list(handle.pids),
                    "devices": list(entries[number].devices),
                    "job": book.running[number].job.id if number in book.running else None,
                    "jobs_done": handle.jobs_done,
                    "age_s": round(now - handle.began, 1),
                    "memory": handle.memory.model_dump() if handle.memory is not None else None,
                }
                for number, handle in handles.items()
                if number in entries
            ],
            "unavailable": {str(key): round(left, 1) for key, left in book.unavailable(now).items()},
            "last_errors": dict(self._last_errors),
        }

    def _fleet(self, now: float) -> dict[str, Any]:
        """What routers say, and what follows from it: starts an hour that a process of each key saves the fleet."""
        worth = self._book.listener.worth(now)
        saves = {} if worth is None else {str(key): round(3600 * worth(key), 3) for key in self._book.keys}
        return {"routers": self._book.listener.routers(now), "saves_starts_per_hour": saves}


def _state(entry: Reservation) -> str:
    return "draining" if entry.ending else _STATES[entry.phase]
