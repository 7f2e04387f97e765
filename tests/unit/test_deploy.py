"""Alert rules and dashboard name only series that exist, and the rules do what they say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
import yaml

from ltx2_pool.metrics import Metrics
from ltx2_pool.stack import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
RULES = yaml.safe_load((DEPLOY / "prometheus-rules.yaml").read_text())["groups"][0]["rules"]


def series() -> set[str]:
    names = set()
    for name, kind, _, _ in Metrics([]).documented():
        names |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"} if kind == "histogram" else {name}
    return names


def queries() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = [variable["query"]["query"] for variable in dashboard["templating"]["list"][1:]]
    return [*targets, *variables, *(rule["expr"] for rule in RULES)]


@pytest.mark.parametrize("query", queries())
def test_every_query_names_a_series_that_exists(query):
    named = set(re.findall(r"ltx2_pool_\w+", query))
    assert named
    assert named <= series()


def test_the_runbook_has_every_alert():
    runbook = (REPOSITORY / "RUNBOOK.md").read_text()
    for rule in RULES:
        assert f"| `{rule['alert']}` |" in runbook


def test_the_rules_fire_when_they_should():
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    done = subprocess.run(
        [promtool, "test", "rules", str(DEPLOY / "prometheus-rules-test.yaml")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
