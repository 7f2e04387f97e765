"""Everything in deploy/: manifests against their schemas, alert rules, dashboard, and whether they fit the worker."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from ltx2_pool.gateway.metrics import GatewayMetrics
from ltx2_pool.gateway.settings import GatewaySettings
from ltx2_pool.serving.metrics import Metrics
from ltx2_pool.words.settings import Settings
from tests.paths import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
RULES = yaml.safe_load((DEPLOY / "prometheus-rules.yaml").read_text())["groups"][0]["rules"]


def series() -> set[str]:
    names = set()
    for name, kind, _, _ in [*Metrics([]).documented(), *GatewayMetrics().documented()]:
        names |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"} if kind == "histogram" else {name}
    return names


def queries() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = [variable["query"]["query"] for variable in dashboard["templating"]["list"][1:]]
    return [*targets, *variables, *(rule["expr"] for rule in RULES)]


@pytest.mark.parametrize("query", queries())
def test_every_query_names_a_series_that_exists(query):
    named = set(re.findall(r"ltx2_(?:pool|gateway)_\w+", query))
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
        missing = "promtool is not installed (Debian: apt-get install prometheus)"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    done = subprocess.run([promtool, *arguments], cwd=DEPLOY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
PLAIN = [
    each
    for name in ("worker", "gateway")
    for each in yaml.safe_load_all((DEPLOY / f"kubernetes/{name}.yaml").read_text())
]
GRAPH, *GRAPH_POLICIES = yaml.safe_load_all((DEPLOY / "kubernetes/dynamo-graph.yaml").read_text())
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
    validate("kubernetes-validate", "--strict", "kubernetes/gateway.yaml")


def patched(value: Any, patch: Any) -> Any:
    """What `kubectl patch` makes of it: mappings are merged, lists too, by the names of their members."""
    if isinstance(value, dict) and isinstance(patch, dict):
        return {**value, **{key: patched(value.get(key), each) for key, each in patch.items()}}
    if isinstance(value, list) and isinstance(patch, list):
        by_name = {each["name"]: each for each in patch}
        assert by_name.keys() <= {each["name"] for each in value}
        return [patched(each, by_name.get(each["name"], each)) for each in value]
    return patch


def test_eight_gpus_are_a_patch_of_the_plain_worker(tmp_path):
    plain = next(each for each in PLAIN if each["metadata"]["name"] == "ltx2-worker")
    eight = patched(plain, yaml.safe_load((DEPLOY / "kubernetes/eight-gpus.yaml").read_text()))
    (worker,) = eight["spec"]["template"]["spec"]["containers"]
    assert {worker["resources"][kind]["nvidia.com/gpu"] for kind in ("requests", "limits")} == {"8"}
    assert worker["env"] == plain["spec"]["template"]["spec"]["containers"][0]["env"]
    file = tmp_path / "eight.yaml"
    file.write_text(yaml.safe_dump(eight))
    validate("kubernetes-validate", "--strict", str(file))


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
    policies = tmp_path / "policies.yaml"
    policies.write_text(yaml.safe_dump_all(GRAPH_POLICIES))
    validate("kubernetes-validate", "--strict", str(policies))


def worker_pods() -> list[dict[str, Any]]:
    plain = next(each for each in PLAIN if each["metadata"]["name"] == "ltx2-worker")
    graph = next(each for each in GRAPH["spec"]["components"] if each["type"] == "worker")
    return [plain["spec"]["template"], graph["podTemplate"]]


@pytest.mark.parametrize("pod", worker_pods(), ids=["plain", "graph"])
def test_a_worker_pod_drains_is_probed_and_scraped(pod):
    spec, (container,) = pod["spec"], pod["spec"]["containers"]
    assert container.get("args", ["ltx2-worker"]) == ["ltx2-worker"]
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


def templates() -> dict[str, dict[str, Any]]:
    """Every pod that is deployed, by its label."""
    plain = [each["spec"]["template"] for each in PLAIN if each["kind"] == "Deployment"]
    graph = [component["podTemplate"] for component in GRAPH["spec"]["components"]]
    return {pod["metadata"]["labels"]["app"]: pod for pod in [*plain, *graph]}


PODS = templates()


@pytest.mark.parametrize("app", PODS)
def test_a_pod_has_no_privileges_and_writes_to_volumes_only(app):
    spec = PODS[app]["spec"]
    security = spec["securityContext"]
    assert (security["runAsNonRoot"], security["runAsUser"], security["runAsGroup"]) == (True, 10001, 10001)
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]
        mounts = {mount["mountPath"] for mount in container.get("volumeMounts", [])}
        if container["image"].startswith("ltx2-pool:") and container in spec["containers"]:
            assert {"name": "HOME", "value": "/tmp"} in container["env"]
            assert "/tmp" in mounts
    variables = {each["name"]: each.get("value") for c in spec["containers"] for each in c.get("env", [])}
    asks_the_api = variables.get("DYN_DISCOVERY_BACKEND") == "kubernetes"
    assert spec.get("automountServiceAccountToken", True) is asks_the_api


@pytest.mark.parametrize("pod", worker_pods(), ids=["plain", "graph"])
def test_a_worker_pod_has_its_own_copy_of_the_images_caches(pod):
    spec = pod["spec"]
    (copier,), (worker,) = spec["initContainers"], spec["containers"]
    assert copier["image"] == worker["image"]
    (target,) = copier["volumeMounts"]
    assert copier["command"][0] == "cp"
    assert copier["command"][-2:] == ["/cache/.", target["mountPath"]]
    assert {"name": target["name"], "mountPath": "/cache"} in worker["volumeMounts"]


POLICIES = {
    each["metadata"]["name"]: each["spec"] for each in [*PLAIN, *GRAPH_POLICIES] if each["kind"] == "NetworkPolicy"
}
MONITORING = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}


def admitted(app: str, caller: dict[str, Any] | str, port: int) -> bool:
    """Whether a pod with a label, or a peer as it stands in the policy, reaches a port of a pod."""
    names = {p["containerPort"]: p["name"] for c in PODS[app]["spec"]["containers"] for p in c.get("ports", [])}
    for policy in POLICIES.values():
        for rule in policy.get("ingress", []) if selects(policy["podSelector"], app) else []:
            from_it = any(
                peer == caller or (isinstance(caller, str) and selects(peer.get("podSelector"), caller))
                for peer in rule.get("from", [caller])
            )
            to_it = any(
                p["port"] == names.get(port)
                if isinstance(p["port"], str)
                else p["port"] <= port <= p.get("endPort", p["port"])
                for p in rule.get("ports", [{"port": port}])
            )
            if from_it and to_it:
                return True
    return False


def selects(selector: dict[str, Any] | None, app: str) -> bool:
    if selector is None:
        return False
    (expression,) = selector.get("matchExpressions", [None])
    values = expression["values"] if expression else [selector.get("matchLabels", {}).get("app", app)]
    return app in values


@pytest.mark.parametrize("app", PODS)
def test_every_pod_is_closed_by_default(app):
    closing = [
        policy for policy in POLICIES.values() if selects(policy["podSelector"], app) and "ingress" not in policy
    ]
    assert closing == [{**closing[0], "policyTypes": ["Ingress"]}]


@pytest.mark.parametrize(
    ("app", "caller", "port", "reached"),
    [
        *(
            row
            for prefix in ("ltx2", "ltx2-graph")
            for row in (
                (f"{prefix}-worker", MONITORING, 9090, True),
                (f"{prefix}-worker", f"{prefix}-frontend", 9090, False),
                (f"{prefix}-worker", f"{prefix}-frontend", 41000, True),
                (f"{prefix}-worker", "a pod", 9090, False),
                (f"{prefix}-worker", "a pod", 41000, False),
                (f"{prefix}-frontend", "a pod", 8000, True),
                (f"{prefix}-frontend", "a pod", 41000, False),
                (f"{prefix}-frontend", f"{prefix}-worker", 41000, True),
            )
        ),
        ("ltx2-gateway", "a pod", 8080, True),
        ("ltx2-gateway", "a pod", 8081, False),
        ("ltx2-worker", "ltx2-gateway", 9090, True),
        ("ltx2-worker", "ltx2-gateway", 41000, False),
        ("ltx2-etcd", "ltx2-worker", 2379, True),
        ("ltx2-etcd", "ltx2-frontend", 2379, True),
        ("ltx2-etcd", "a pod", 2379, False),
        ("ltx2-etcd", MONITORING, 2379, False),
    ],
)
def test_who_reaches_which_port(app, caller, port, reached):
    assert admitted(app, caller, port) is reached


def test_nothing_of_kubernetes_is_opened_on_a_host():
    services = {each["metadata"]["name"]: each["spec"] for each in PLAIN if each["kind"] == "Service"}
    assert set(services) == {"ltx2-frontend", "ltx2-etcd", "ltx2-gateway", "ltx2-worker-system"}
    assert {spec.get("type", "ClusterIP") for spec in services.values()} == {"ClusterIP"}
    for pod in PODS.values():
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod["spec"])
        assert not [p for c in pod["spec"]["containers"] for p in c.get("ports", []) if "hostPort" in p]


def test_compose_opens_the_gateway_with_its_keys_and_nothing_else_beyond_this_host():
    for name, service in COMPOSE["services"].items():
        open_to_all = [port for port in service.get("ports", []) if not port.startswith("127.0.0.1:")]
        assert open_to_all == (["${LTX2_PORT:-8080}:8080"] if name == "gateway" else [])
        assert (service["security_opt"], service["cap_drop"]) == (["no-new-privileges:true"], ["ALL"])
        assert not {"privileged", "network_mode", "pid", "cap_add"} & set(service)


def test_the_gateway_has_its_keys_and_keeps_its_jobs_wherever_it_is_deployed():
    (container,) = PODS["ltx2-gateway"]["spec"]["containers"]
    kubernetes = {each["name"]: each["value"] for each in container["env"]}
    compose = COMPOSE["services"]["gateway"]["environment"]
    drain = GatewaySettings.model_fields["drain_timeout"].default
    assert PODS["ltx2-gateway"]["spec"]["terminationGracePeriodSeconds"] > drain
    assert int(COMPOSE["services"]["gateway"]["stop_grace_period"].removesuffix("s")) > drain
    by_variable = {f.json_schema_extra["env"]: name for name, f in GatewaySettings.model_fields.items()}  # type: ignore[index]
    for environment in (kubernetes, compose):
        given = {by_variable[name]: value for name, value in environment.items() if name in by_variable}
        settings = GatewaySettings.model_validate(given)  # open to others, and so with keys
        assert settings.database.startswith("sqlite+aiosqlite:////state/")
        assert settings.content.startswith("file:///state/")


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
    assert targets == ["worker:9090", "frontend:8000", "gateway:8080"]
    (source,) = yaml.safe_load((DEPLOY / "grafana/datasources.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((DEPLOY / "grafana/dashboards.yaml").read_text())["providers"]
    mounts = [volume for service in COMPOSE["services"].values() for volume in service.get("volumes", [])]
    assert any(f":{provider['options']['path']}/" in mount for mount in mounts)
    for mount in mounts:
        if mount.startswith("./"):
            assert (DEPLOY / mount.split(":")[0]).is_file(), mount


def test_every_image_has_a_tag_and_every_variable_a_meaning():
    known = {
        field.json_schema_extra["env"]  # type: ignore[index]
        for of in (Settings, GatewaySettings)
        for field in of.model_fields.values()
    }
    for file in DEPLOY.rglob("*.yaml"):
        text = file.read_text()
        for image in re.findall(r"image: *(\S+)", text):
            assert image.startswith("${LTX2_IMAGE:?") or re.fullmatch(r"[\w./-]+:v?[\d.]+", image), image
        inside = set(re.findall(r"(?:name: |^ +)(LTX2_\w+)\b", text, re.MULTILINE))
        assert inside <= known, f"{file.name}: {inside - known}"
