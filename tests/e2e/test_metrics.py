"""A scrape of a live worker has every series that is documented, and RUNBOOK documents every one."""

from __future__ import annotations

import os
import subprocess
import sys

import httpx
from prometheus_client.parser import text_string_to_metric_families

from ltx2_pool.metrics import Metrics
from ltx2_pool.stack import REPOSITORY

from .conftest import A, B, C, ask, pids

DYNAMO = {"dynamo_namespace", "dynamo_component", "dynamo_endpoint", "worker_id", "model"}


def scrape(running) -> dict[str, list]:
    text = httpx.get(f"http://127.0.0.1:{running.system_port}/metrics", timeout=10).raise_for_status().text
    return {
        family.name: family.samples
        for family in text_string_to_metric_families(text)
        if family.name.startswith("ltx2_pool_")
    }


def value(series: dict[str, list], name: str, **labels: str) -> float:
    family = series[name.removesuffix("_total").removesuffix("_count")]
    return sum(s.value for s in family if s.name == name and labels.items() <= s.labels.items())


def test_every_documented_series_is_scraped_with_dynamos_labels(pool):
    ask(pool, A)
    before = scrape(pool)
    ask(pool, A)
    assert pool.create(size="31x31").status_code == 400
    series = scrape(pool)
    for name, kind, labels, _ in Metrics([]).documented():
        samples = series[name.removesuffix("_total")]
        assert samples, name
        for sample in samples:
            extra = {"le"} if kind == "histogram" and sample.name.endswith("_bucket") else set()
            assert sample.labels.keys() >= {*labels, *DYNAMO, *extra}, sample
    shapes = {
        sample.labels["shape_key"] for family in series.values() for sample in family if "shape_key" in sample.labels
    }
    assert shapes == {A.key, B.key, C.key}  # nothing a client sends makes a label

    def grown(name: str, **labels: str) -> float:
        return value(series, name, **labels) - value(before, name, **labels)

    assert grown("ltx2_pool_request_total", shape_key=A.key, status="DONE") == 1
    assert grown("ltx2_pool_request_latency_seconds_count", shape_key=A.key) == 1
    assert grown("ltx2_pool_rejection_total", reason="invalid") == 1
    assert grown("ltx2_pool_lease_seconds_total") > 0
    assert value(series, "ltx2_pool_size") == len(pool.status()["processes"])
    assert value(series, "ltx2_pool_shape_state", shape_key=A.key, state="ready") == 1
    assert value(series, "ltx2_pool_memory_bytes", shape_key=A.key, kind="resident") > 0
    assert value(series, "ltx2_pool_weights_bytes") > 0


def test_the_runbook_has_every_series():
    runbook = (REPOSITORY / "RUNBOOK.md").read_text()
    for name, kind, labels, meaning in Metrics([]).documented():
        shown = f"{name}{{{','.join(labels)}}}" if labels else name
        assert f"| `{shown}` | {kind} | {meaning} |" in runbook


def test_the_status_is_drawn_in_a_terminal(pool):
    ask(pool, A)
    command = [sys.executable, str(REPOSITORY / "worker.py"), "status"]
    environment = {**os.environ, "DYN_SYSTEM_PORT": str(pool.system_port), "COLUMNS": "140"}
    drawn = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert drawn.returncode == 0, drawn.stderr
    line = next(line for line in drawn.stdout.splitlines() if A.key in line)
    assert "ready" in line
    assert f" {pids(pool)[A.key]} " in line
    assert "0 running, 0 waiting" in drawn.stdout
    environment["DYN_SYSTEM_PORT"] = "1"
    nobody = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (nobody.returncode, "no worker answers at http://127.0.0.1:1" in nobody.stderr) == (1, True)
