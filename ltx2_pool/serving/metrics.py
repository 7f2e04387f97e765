"""Every ``ltx2_pool_*`` series.

The labels of a shape are those of the menu, those of a device the worker's own: nothing a client sends can create one.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ltx2_pool.words.outcomes import REASONS, REJECTIONS

LATENCY_BUCKETS = (0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 60, 120, 300, 600, 1800)
"""Seconds. Hot videos took 2 to 9 s on an H200, cold ones 20 s, and the first systems needed 206 s."""
PHASE_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800)
SPAWN_BUCKETS = (0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 180, 600)
"""Seconds. A fork is READY in half a second, with a warm-up on a baked cache in 3 to 10 s, an exec in 25 s."""
STATUSES = ("DONE", "ERROR", "FATAL")
PHASES = ("queue", "text", "denoise", "decode", "encode", "respond")
START_PHASES = ("import", "attach", "trace", "warm_up")
STATES = ("loading", "spawning", "ready", "generating", "encoding", "draining")


class Metrics:
    """The series of one worker, in a registry of their own; all exist from the start, with the value zero."""

    def __init__(self, shape_keys: Sequence[str], devices: Sequence[str] = ()) -> None:
        self.registry = CollectorRegistry()
        self.size = self._gauge("ltx2_pool_size", "Shape processes that exist")
        self.routers = self._gauge(
            "ltx2_pool_routers", "Routers that say what the fleet is asked for, and are believed"
        )
        self.spawns = self._counter("ltx2_pool_spawn_total", "Shape processes started", "shape_key")
        self.evictions = self._counter(
            "ltx2_pool_eviction_total", "Shape processes ended for another shape", "shape_key"
        )
        self.requests = self._counter(
            "ltx2_pool_request_total",
            "Jobs that ended: DONE with a video, ERROR without one, FATAL with the loss of their process",
            "shape_key",
            "status",
        )
        self.cold = self._counter(
            "ltx2_pool_cold_video_total",
            "Videos whose process was started for them: no hot one was to be had",
            "shape_key",
        )
        self.latency = self._histogram(
            "ltx2_pool_request_latency_seconds",
            "Admission to video, of jobs that got one",
            LATENCY_BUCKETS,
            "shape_key",
        )
        self.cold_spawn = self._histogram(
            "ltx2_pool_cold_spawn_seconds", "Spawn to READY, warm-up video included", SPAWN_BUCKETS, "shape_key"
        )
        self.failures = self._counter("ltx2_pool_subprocess_failure_total", "Shape processes lost, by reason", "reason")
        self.start_phase = self._histogram(
            "ltx2_pool_start_phase_seconds", "Parts of a start: import, attach, trace, warm_up", PHASE_BUCKETS, "phase"
        )
        self.phase = self._histogram(
            "ltx2_pool_phase_seconds",
            "Parts of a job: pictures, queue, text, denoise, refine, decode, encode, respond",
            PHASE_BUCKETS,
            "shape_key",
            "phase",
        )
        self.queue = self._gauge("ltx2_pool_queue_depth", "Jobs that wait", "shape_key")
        self.wait = self._gauge("ltx2_pool_expected_wait_seconds", "What a job admitted now would wait")
        self.lease = self._counter(
            "ltx2_pool_lease_seconds_total", "Time for which jobs held leases, that of each GPU of a gang added up"
        )
        self.leases = self._gauge("ltx2_pool_leases", "Jobs that hold a lease on the GPU now")
        self.memory = self._gauge(
            "ltx2_pool_memory_bytes", "What a shape process needs besides the lent weights", "shape_key", "kind"
        )
        self.lent = self._gauge("ltx2_pool_weights_bytes", "Weights that are lent to all shape processes")
        self.state = self._gauge(
            "ltx2_pool_shape_state", "Processes of a shape by the state that they are in", "shape_key", "state"
        )
        self.retries = self._counter(
            "ltx2_pool_retry_total", "Jobs tried again after the loss of their process", "shape_key"
        )
        self.rejections = self._counter("ltx2_pool_rejection_total", "Requests that got no video, by reason", "reason")
        self.cancellations = self._counter("ltx2_pool_cancellation_total", "Jobs whose client went away", "shape_key")
        self.baked = self._gauge(
            "ltx2_pool_baked", "1 when the shape's baked compile cache was found good", "shape_key"
        )
        self.unavailable = self._gauge(
            "ltx2_pool_unavailable", "1 while the shape's jobs are refused, after failed starts", "shape_key"
        )
        self.device_budget = self._gauge(
            "ltx2_pool_device_budget_bytes",
            "What a device has for shape processes; 0 while that is not known",
            "device",
        )
        self.device_held = self._gauge("ltx2_pool_device_held_bytes", "What shape processes hold on a device", "device")
        self.device_processes = self._gauge("ltx2_pool_device_processes", "Shape processes on a device", "device")
        self.device_leases = self._gauge("ltx2_pool_device_leases", "Jobs that hold a lease on a device now", "device")
        self.device_out = self._gauge(
            "ltx2_pool_device_out", "1 while a device is out of service, after faults or failed starts", "device"
        )
        self.able = self._gauge("ltx2_pool_able", "1 while some video can be made: what the worker's health says")
        self._shape_keys = tuple(shape_keys)
        for key in shape_keys:
            for counter in (self.spawns, self.evictions, self.cold, self.retries, self.cancellations):
                counter.labels(key)
            for histogram in (self.latency, self.cold_spawn):
                histogram.labels(key)
            for gauge in (self.queue, self.baked, self.unavailable):
                gauge.labels(key)
            for status in STATUSES:
                self.requests.labels(key, status)
            for phase in PHASES:
                self.phase.labels(key, phase)
            for kind in ("resident", "peak"):
                self.memory.labels(key, kind)
            for state in STATES:
                self.state.labels(key, state)
        for device in devices:
            for gauge in (
                self.device_budget,
                self.device_held,
                self.device_processes,
                self.device_leases,
                self.device_out,
            ):
                gauge.labels(device)
        for reason in REASONS:
            self.failures.labels(reason)
        for phase in START_PHASES:
            self.start_phase.labels(phase)
        for rejection in REJECTIONS:
            self.rejections.labels(rejection)

    def set_shapes(
        self, states: Counts[tuple[str, str]], waiting: Mapping[str, int], unavailable: Collection[str]
    ) -> None:
        """Processes by shape key and state; by shape key, the jobs that wait for it, and whether they are refused."""
        for key in self._shape_keys:
            for state in STATES:
                self.state.labels(key, state).set(states[key, state])
            self.queue.labels(key).set(waiting.get(key, 0))
            self.unavailable.labels(key).set(key in unavailable)

    def set_devices(self, devices: Mapping[str, Mapping[str, Any]], out: Collection[str]) -> None:
        """By device: as the ledger describes it, and whether it is out of service."""
        for name, device in devices.items():
            self.device_budget.labels(name).set(device["budget"] or 0)
            self.device_held.labels(name).set(device["held"])
            self.device_processes.labels(name).set(device["processes"])
            self.device_leases.labels(name).set(device["leases"])
            self.device_out.labels(name).set(name in out)

    def documented(self) -> list[tuple[str, str, tuple[str, ...], str]]:
        """Name, type, labels and meaning of every series, for the RUNBOOK's table."""
        return sorted(
            (m._name + ("_total" if m._type == "counter" else ""), m._type, m._labelnames, m._documentation)
            for m in vars(self).values()
            if isinstance(m, Counter | Gauge | Histogram)
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)
