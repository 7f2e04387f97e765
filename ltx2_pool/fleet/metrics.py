"""Every ``ltx2_router_*`` series. Labels are those of the menu and of this module: no client can create one."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge

from ltx2_pool.fleet.policy import REASONS

STATES = ("heard", "unheard", "lost")
PROBLEMS = ("error", "nobody")


class Metrics:
    """The series of one router, in a registry of their own; all exist from the start, with the value zero."""

    def __init__(self, shape_keys: Sequence[str]) -> None:
        self.registry = CollectorRegistry()
        self.choices = Counter(
            "ltx2_router_choice_total",
            "Requests sent to a worker, by why to that one",
            ["reason"],
            registry=self.registry,
        )
        self.retries = Counter(
            "ltx2_router_retry_total", "Requests sent elsewhere after a worker was lost", registry=self.registry
        )
        self.problems = Counter(
            "ltx2_router_problem_total",
            "Requests without a video: error, as the worker said; nobody, because no worker could be reached",
            ["problem"],
            registry=self.registry,
        )
        self.workers = Gauge("ltx2_router_workers", "Workers in discovery, by state", ["state"], registry=self.registry)
        self.wait = Gauge(
            "ltx2_router_expected_wait_seconds",
            "What a request of the shape would wait now, its own seconds not counted",
            ["shape_key"],
            registry=self.registry,
        )
        self.hot = Gauge(
            "ltx2_router_hot_workers",
            "Workers that have a process of the shape, or are about to",
            ["shape_key"],
            registry=self.registry,
        )
        self.rate = Gauge(
            "ltx2_router_rate",
            "Requests of the shape that come to this router in a second, the last half an hour counting most",
            ["shape_key"],
            registry=self.registry,
        )
        for reason in REASONS:
            self.choices.labels(reason)
        for problem in PROBLEMS:
            self.problems.labels(problem)
        for key in shape_keys:
            for gauge in (self.wait, self.hot, self.rate):
                gauge.labels(key)
        self.set_workers(heard=0, unheard=0, lost=0)

    def set_workers(self, **states: int) -> None:
        """By state; ``lost`` are in one of the others as well."""
        for state, number in states.items():
            self.workers.labels(state).set(number)

    def documented(self) -> list[tuple[str, str, tuple[str, ...], str]]:
        """Name, type, labels and meaning of every series, for the RUNBOOK's table."""
        return sorted(
            (m._name + ("_total" if m._type == "counter" else ""), m._type, m._labelnames, m._documentation)
            for m in vars(self).values()
            if isinstance(m, Counter | Gauge)
        )
