"""Everything in deploy/: manifests against their schemas, alert rules, dashboard, and whether they fit the worker."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from ltx2_pool.serving.metrics import Metrics
from ltx2_pool.words.settings import Settings
from tests.paths import REPOSITORY

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


@pytest.mark.parametrize(
    "arguments", [("test", "rules", "prometheus-rules-test.yaml"), ("check", "config", "prometheus.yaml")]
)
def test_the_rules_fire_when_they_should_and_the_configuration_is_one(arguments):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    done = subprocess.run([promtool, *arguments], cwd=DEPLOY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
PLAIN = list(yaml.safe_load_all((DEPLOY / "kubernetes/worker.yaml").read_text()))
GRAPH = yaml.safe_load((DEPLOY / "kubernetes/dynamo-graph.yaml").read_text())
DRAIN = Settings.model_fields["drain_timeout"].default


def validate(tool: str, *arguments: str) -> None:
    """Run a validator of the virtual environment on files of deploy/."""
    command = [str(Path(sys.executable).with_name(tool)), *arguments]
    done = subprocess.run(command, cwd=DEPLOY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_compose_file_keeps_to_the_compose_specification():
    validate("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml")


def test_the_plain_manifests_keep_to_kubernetes_schemas():
    validate("kubernetes-validate", "--strict", "kubernetes/worker.yaml")


def test_the_graph_deployment_is_like_dynamos_own_and_its_pods_keep_to_kubernetes_schemas(tmp_path):
    """The custom resource's definition is not in Dynamo's package; a graph that its profiler deploys is."""
    template = resources.files("dynamo.profiler") / "templates/dgd/mocker/disagg.yaml"
    example = yaml.safe_load(template.read_text())
    assert (GRAPH["apiVersion"], GRAPH["kind"]) == (example["apiVersion"], example["kind"])
    assert [component["type"] for component in GRAPH["spec"]["components"]] == ["frontend", "worker"]
    known = {name for component in example["spec"]["components"] for name in component}
    known.add("sharedMemorySize")  # Dynamo's reference of DynamoComponentDeployment, nvidia.com/v1beta1
    for component in GRAPH["spec"]["components"]:
        assert set(component) <= known
        template = component["podTemplate"]
        pod = {"apiVersion": "v1", "kind": "Pod", "spec": template["spec"]}
        pod["metadata"] = {"name": "pod", **template.get("metadata", {})}
        file = tmp_path / f"{component['name']}.yaml"
        file.write_text(yaml.safe_dump(pod))
        validate("kubernetes-validate", "--strict", str(file))


def worker_pods() -> list[dict[str, Any]]:
    plain = next(each for each in PLAIN if each["metadata"]["name"] == "ltx2-worker")
    graph = next(each for each in GRAPH["spec"]["components"] if each["type"] == "worker")
    return [plain["spec"]["template"], graph["podTemplate"]]


@pytest.mark.parametrize("pod", worker_pods(), ids=["plain", "graph"])
def test_a_worker_pod_drains_is_probed_scraped_and_unprivileged(pod):
    spec, (container,) = pod["spec"], pod["spec"]["containers"]
    assert spec["terminationGracePeriodSeconds"] > DRAIN
    port = next(port for port in container["ports"] if port["name"] == "system")["containerPort"]
    annotations = pod["metadata"]["annotations"]
    assert {"name": "DYN_SYSTEM_PORT", "value": str(port)} in container["env"]
    assert (annotations["prometheus.io/scrape"], annotations["prometheus.io/port"]) == ("true", str(port))
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "system"}
    startup = container["startupProbe"]
    loading = sum(Settings.model_fields[name].default for name in ("weights_timeout", "spawn_timeout"))
    assert startup["periodSeconds"] * startup["failureThreshold"] > loading
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_a_rollout_never_needs_a_second_gpu():
    plain = next(each for each in PLAIN if each["metadata"]["name"] == "ltx2-worker")
    assert plain["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0


def test_compose_drains_and_has_shared_memory_and_its_parts_find_each_other():
    worker = COMPOSE["services"]["worker"]
    minutes = re.fullmatch(r"(\d+)m", worker["stop_grace_period"])
    assert minutes is not None
    assert int(minutes[1]) * 60 > DRAIN
    assert worker["shm_size"] == "8gb"
    scraped = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["scrape_configs"]
    targets = [target for job in scraped for static in job["static_configs"] for target in static["targets"]]
    assert targets == ["worker:9090", "frontend:8000"]
    (source,) = yaml.safe_load((DEPLOY / "grafana/datasources.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((DEPLOY / "grafana/dashboards.yaml").read_text())["providers"]
    mounts = [volume for service in COMPOSE["services"].values() for volume in service.get("volumes", [])]
    assert any(f":{provider['options']['path']}/" in mount for mount in mounts)
    for mount in mounts:
        if mount.startswith("./"):
            assert (DEPLOY / mount.split(":")[0]).is_file(), mount


def test_every_image_has_a_tag_and_every_variable_a_meaning():
    known = {field.json_schema_extra["env"] for field in Settings.model_fields.values()}  # type: ignore[index]
    for file in DEPLOY.rglob("*.yaml"):
        text = file.read_text()
        for image in re.findall(r"image: *(\S+)", text):
            assert image.startswith("${LTX2_IMAGE:?") or re.fullmatch(r"[\w./-]+:v?[\d.]+", image), image
        inside = set(re.findall(r"(?:name: |^ +)(LTX2_\w+)\b", text, re.MULTILINE))
        assert inside <= known, f"{file.name}: {inside - known}"
