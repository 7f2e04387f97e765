"""A scrape of a live worker has every series that is documented, and RUNBOOK documents every one."""

from __future__ import annotations

import json
import os
import subprocess

import httpx
from prometheus_client.parser import text_string_to_metric_families

from ltx2_pool.gateway.metrics import GatewayMetrics
from ltx2_pool.serving.metrics import Metrics
from ltx2_pool.tools.stack import WORKER
from tests.paths import REPOSITORY

from .conftest import BENCHMARK, MENU, A, B, C, ask, pids

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
    for name, kind, labels, meaning in [*Metrics([]).documented(), *GatewayMetrics().documented()]:
        shown = f"{name}{{{','.join(labels)}}}" if labels else name
        assert f"| `{shown}` | {kind} | {meaning} |" in runbook


def test_the_status_is_drawn_in_a_terminal(pool):
    ask(pool, A)
    command = [*WORKER, "status"]
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


KEYS = (A.key, B.key, C.key)


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "140"}
    return subprocess.run(
        [*BENCHMARK, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_load_and_menu_report_against_a_running_frontend(pool, tmp_path):
    ask(pool, A)
    ask(pool, B)
    (tmp_path / "mix.yaml").write_text(f"{A.key}: 2\n{B.key}: 1\n")
    where = ("--url", f"http://127.0.0.1:{pool.http_port}", "--status-url", f"http://127.0.0.1:{pool.system_port}")
    what = ("--shapes", str(MENU), "--mix", str(tmp_path / "mix.yaml"), "--num-prompts", "6", "--warm-up", "0")
    done = benchmark("load", *where, *what, "--rate", "5,9", "--out", str(tmp_path / "load"))
    assert done.returncode == 0, done.stdout + done.stderr
    levels = json.loads((tmp_path / "load" / "summary.json").read_text())["levels"]
    assert [(level["requests"], level["videos"], level["cold"]["videos"]) for level in levels] == [(6, 6, 0)] * 2
    assert {key: of["videos"] for key, of in levels[0]["shapes"].items()} == {A.key: 4, B.key: 2}
    assert len((tmp_path / "load" / "requests.csv").read_text().splitlines()) == 13
    for picture in ("latency", "timeline", "throughput"):
        assert (tmp_path / "load" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    report = benchmark("menu-report", "--from", f"http://127.0.0.1:{pool.system_port}/metrics")
    assert report.returncode == 0, report.stderr
    advice = {key: line.split("│")[-2].strip() for line in report.stdout.splitlines() for key in KEYS if key in line}
    assert advice[A.key] == "keep"
    assert advice.keys() == set(KEYS)
    nobody = benchmark("load", "--url", "http://127.0.0.1:1", "--shapes", str(MENU))
    assert (nobody.returncode, "no answer from http://127.0.0.1:1" in nobody.stderr) == (2, True)


def test_an_image_is_validated_in_turn_and_shuffled(pool, tmp_path):
    menu = tmp_path / "menu.yaml"
    menu.write_text("model: ltx2-tiny\nsteps: 2\nshapes:\n  - 64x64@9\n  - 96x64@17\n")
    what = ("--shapes", str(menu), "--prompts", "2", "--max-ratio", "100", "--out", str(tmp_path / "image"))
    done = benchmark("image", "--url", f"http://127.0.0.1:{pool.http_port}", *what)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len((tmp_path / "image" / "timings.csv").read_text().splitlines()) == 9
    assert {path.suffix for path in (tmp_path / "image").iterdir()} == {".csv", ".mp4", ".png"}


def test_dynamos_json_lines_carry_shape_job_and_pid(make_stack):
    running = make_stack(LTX2_POOL_MODE="1", DYN_LOGGING_JSONL="1")
    ask(running, A)
    lines = [json.loads(line)["message"] for line in running.log("worker").splitlines() if line.startswith("{")]
    starts = next(line for line in lines if " starts shape=" in line)
    job = starts.split()[1]
    assert f"starts shape={A.key} pid={pids(running)[A.key]} " in starts
    assert any(line.startswith(f"job {job} request=") and f" shape={A.key} " in line for line in lines)
    assert any(line.startswith(f"job {job} done shape={A.key}") for line in lines)
