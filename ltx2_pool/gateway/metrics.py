"""Every ``ltx2_gateway_*`` series. Their labels come from fixed lists: nothing a client sends can create one."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

ENDS = ("completed", "failed", "timeout", "deleted", "expired")
REJECTIONS = ("invalid", "unauthorized", "queue_full", "key_queue_full", "too_large")
SECONDS = (0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 7200)


class GatewayMetrics:
    """The series of one gateway, in a registry of their own; all exist from the start, with the value zero."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.jobs = self._gauge(
            "ltx2_gateway_jobs",
            "Jobs in the store, of all gateways",
            "status",
            of=("queued", "in_progress", "completed", "failed"),
        )
        self.in_work = self._gauge("ltx2_gateway_in_work", "Jobs that this gateway has handed to the frontend")
        self.accepted = self._counter("ltx2_gateway_accepted_total", "Jobs accepted")
        self.rejections = self._counter(
            "ltx2_gateway_rejection_total", "Requests refused, by reason", "reason", of=REJECTIONS
        )
        self.ended = self._counter(
            "ltx2_gateway_end_total", "Jobs that ended, and jobs removed (deleted, expired)", "end", of=ENDS
        )
        self.attempts = self._counter(
            "ltx2_gateway_attempt_total",
            "Jobs handed out: for the first time, or again",
            "attempt",
            of=("first", "again"),
        )
        self.retries = self._counter(
            "ltx2_gateway_retry_total",
            "Jobs put back into the queue: nobody could begin (busy), or it was lost",
            "reason",
            of=("busy", "lost"),
        )
        self.seconds = Histogram(
            "ltx2_gateway_job_seconds",
            "Request to video, of jobs that got one",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.bytes = self._counter("ltx2_gateway_stored_bytes_total", "Bytes of videos written to the content store")
        self.statuses = self._counter(
            "ltx2_gateway_response_total",
            "Answers, by class of their HTTP status",
            "status",
            of=("2xx", "3xx", "4xx", "5xx"),
        )
        self.frontend = self._gauge("ltx2_gateway_frontend_up", "1 while the frontend lists a model")
        self.store = self._gauge("ltx2_gateway_store_up", "1 while the database answers")

    def documented(self) -> list[tuple[str, str, tuple[str, ...], str]]:
        """Name, type, labels and meaning of every series, for the RUNBOOK's table."""
        return sorted(
            (m._name + ("_total" if m._type == "counter" else ""), m._type, m._labelnames, m._documentation)
            for m in vars(self).values()
            if isinstance(m, Counter | Gauge | Histogram)
        )

    def _counter(self, name: str, text: str, label: str = "", of: Sequence[str] = ()) -> Counter:
        counter = Counter(name, text, [label] if label else [], registry=self.registry)
        for value in of:
            counter.labels(value)
        return counter

    def _gauge(self, name: str, text: str, label: str = "", of: Sequence[str] = ()) -> Gauge:
        gauge = Gauge(name, text, [label] if label else [], registry=self.registry)
        for value in of:
            gauge.labels(value)
        return gauge
