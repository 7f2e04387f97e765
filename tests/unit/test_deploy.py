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
from pydantic import ValidationError

from ltx2_pool.fleet.metrics import Metrics as RouterMetrics
from ltx2_pool.fleet.settings import RouterSettings
from ltx2_pool.gateway.metrics import GatewayMetrics
from ltx2_pool.gateway.settings import GatewaySettings
from ltx2_pool.serving.metrics import Metrics
from ltx2_pool.words.settings import Settings
from tests.paths import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
RULES = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus-rules.yaml").read_text())["groups"]
    for rule in group["rules"]
]


def series() -> set[str]:
    names = {rule["record"] for rule in RULES if "record" in rule}
    documented = [*Metrics([]).documented(), *GatewayMetrics().documented(), *RouterMetrics([]).documented()]
    for name, kind, _, _ in documented:
        names |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"} if kind == "histogram" else {name}
    return names


def queries() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = [variable["query"]["query"] for variable in dashboard["templating"]["list"][1:]]
    return [*targets, *variables, *(rule["expr"] for rule in RULES)]


@pytest.mark.parametrize("query", queries())
def test_every_query_names_a_series_that_exists(query):
    named = set(re.findall(r"ltx2_\w+", query))
    assert named
    assert named <= series()


def test_the_runbook_has_every_alert():
    runbook = (REPOSITORY / "RUNBOOK.md").read_text()
    for alert in [rule["alert"] for rule in RULES if "alert" in rule]:
        assert f"| `{alert}` |" in runbook


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


def compose(file: str) -> dict[str, Any]:
    """What Compose makes of it: a service that extends another one has all that it does not say otherwise."""
    found: dict[str, Any] = yaml.safe_load((DEPLOY / file).read_text())
    for name, service in found["services"].items():
        if (extended := service.pop("extends", None)) is not None:
            base = compose(extended["file"])["services"][extended["service"]]
            environment = {**base.get("environment", {}), **service.get("environment", {})}
            found["services"][name] = {**base, **service, **({"environment": environment} if environment else {})}
    return found


COMPOSES = {name: compose(f"{name}.yaml") for name in ("compose", "compose-fleet")}
COMPOSE = COMPOSES["compose"]
PLAIN = [
    each
    for name in ("worker", "gateway", "router")
    for each in yaml.safe_load_all((DEPLOY / f"kubernetes/{name}.yaml").read_text())
]
GRAPH, *GRAPH_POLICIES = yaml.safe_load_all((DEPLOY / "kubernetes/dynamo-graph.yaml").read_text())
DRAIN = Settings.model_fields["drain_timeout"].default


def validate(tool: str, *arguments: str) -> None:
    """Run a validator of the virtual environment on files of deploy/."""
    command = [str(Path(sys.executable).with_name(tool)), *arguments]
    done = subprocess.run(command, cwd=DEPLOY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", COMPOSES)
def test_a_compose_file_keeps_to_the_compose_specification(name):
    validate("check-jsonschema", "--builtin-schema", "vendor.compose-spec", f"{name}.yaml")


def test_the_plain_manifests_keep_to_kubernetes_schemas():
    for name in ("worker", "gateway", "router", "hpa"):
        validate("kubernetes-validate", "--strict", f"kubernetes/{name}.yaml")


def patched(value: Any, patch: Any) -> Any:
    """What `kubectl patch` makes of it: mappings are merged, lists too, by the names of their members."""
    if isinstance(value, dict) and isinstance(patch, dict):
        return {**value, **{key: patched(value.get(key), each) for key, each in patch.items()}}
    if isinstance(value, list) and isinstance(patch, list):
        by_name = {each["name"]: each for each in patch}
        new = [each for name, each in by_name.items() if name not in {each["name"] for each in value}]
        return [*(patched(each, by_name.get(each["name"], each)) for each in value), *new]
    return patch


WORKER = next(each for each in PLAIN if each["metadata"]["name"] == "ltx2-worker" and each["kind"] == "Deployment")


def patched_worker(name: str, tmp_path: Path) -> dict[str, Any]:
    """The plain worker with a patch of ours, which Kubernetes takes."""
    made: dict[str, Any] = patched(WORKER, yaml.safe_load((DEPLOY / f"kubernetes/{name}.yaml").read_text()))
    spec = made["spec"]["template"]["spec"]
    assert len(spec["containers"]) == 1, "a patch for another container"
    file = tmp_path / f"{name}.yaml"
    file.write_text(yaml.safe_dump(made))
    validate("kubernetes-validate", "--strict", str(file))
    return made


def test_eight_gpus_are_a_patch_of_the_plain_worker(tmp_path):
    eight = patched_worker("eight-gpus", tmp_path)["spec"]["template"]["spec"]
    (worker,) = eight["containers"]
    assert {worker["resources"][kind]["nvidia.com/gpu"] for kind in ("requests", "limits")} == {"8"}
    assert worker["env"] == WORKER["spec"]["template"]["spec"]["containers"][0]["env"]
    assert len(eight["volumes"]) == len(WORKER["spec"]["template"]["spec"]["volumes"])


def test_a_fleets_workers_are_behind_routers_and_ready_when_all_is_hot(tmp_path):
    fleet = patched_worker("fleet-workers", tmp_path)["spec"]
    (worker,) = fleet["template"]["spec"]["containers"]
    given = {each["name"]: each.get("value") for each in worker["env"]}
    settings = Settings.model_validate(
        {"model": ".", "router": given["LTX2_ROUTER"], "ready_min": given["LTX2_POOL_READY_MIN"]}
    )
    assert settings.router
    most = 64  # processes that a worker may have
    Settings.model_validate({"model": ".", "pool_max_size": most})
    with pytest.raises(ValidationError, match="pool_max_size"):
        Settings.model_validate({"model": ".", "pool_max_size": most + 1})
    assert settings.ready_min >= most
    assert fleet["replicas"] >= 2
    assert fleet["strategy"] == WORKER["spec"]["strategy"]  # one at a time, and no second GPU


def test_a_rollout_always_leaves_a_router_and_all_workers_but_one():
    (router,) = [
        each["spec"] for each in PLAIN if each["metadata"]["name"] == "ltx2-router" and "replicas" in each["spec"]
    ]
    assert router["replicas"] >= 2
    assert router["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    pod = router["template"]["spec"]
    assert router["progressDeadlineSeconds"] > pod["terminationGracePeriodSeconds"]
    assert pod["terminationGracePeriodSeconds"] > RouterSettings.model_fields["drain_timeout"].default
    (container,) = pod["containers"]
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "system"}
    budgets = {each["metadata"]["name"]: each["spec"] for each in PLAIN if each["kind"] == "PodDisruptionBudget"}
    assert budgets["ltx2-router"]["minAvailable"] < router["replicas"]
    assert budgets["ltx2-worker"]["maxUnavailable"] == 1
    for name, budget in budgets.items():
        assert budget["selector"] == {"matchLabels": {"app": name}}


def test_both_autoscalers_ask_for_the_recorded_series_and_agree():
    """KEDA's definition is not in a package that is here; its fields are those of its own reference."""
    keda = yaml.safe_load((DEPLOY / "kubernetes/autoscaling.yaml").read_text())
    hpa = yaml.safe_load((DEPLOY / "kubernetes/hpa.yaml").read_text())["spec"]
    assert (keda["apiVersion"], keda["kind"]) == ("keda.sh/v1alpha1", "ScaledObject")
    spec = keda["spec"]
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    for trigger in spec["triggers"]:
        assert trigger["type"] == "prometheus"
        assert {type(value) for value in trigger["metadata"].values()} == {str}
    asked = {
        trigger["metadata"]["query"]: (trigger["metricType"], float(trigger["metadata"]["threshold"]))
        for trigger in spec["triggers"]
    }
    assert set(asked) <= recorded
    targets = [(each["external"]["metric"]["name"], each["external"]["target"]) for each in hpa["metrics"]]
    amounts = {"700m": 0.7, "30": 30.0}
    found = {name: (target["type"], amounts[target.get("averageValue") or target["value"]]) for name, target in targets}
    assert found == asked
    assert spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == hpa["behavior"]
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (hpa["minReplicas"], hpa["maxReplicas"])
    assert spec["scaleTargetRef"]["name"] == hpa["scaleTargetRef"]["name"] == "ltx2-worker"


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
    graph = next(each for each in GRAPH["spec"]["components"] if each["type"] == "worker")
    return [WORKER["spec"]["template"], graph["podTemplate"]]


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
        ("ltx2-router", MONITORING, 9090, True),
        ("ltx2-router", "ltx2-frontend", 9090, False),
        ("ltx2-router", "ltx2-frontend", 41000, True),
        ("ltx2-router", "ltx2-worker", 41000, True),
        ("ltx2-router", "a pod", 41000, False),
        ("ltx2-worker", "ltx2-router", 41000, True),
        ("ltx2-worker", "ltx2-router", 9090, False),
        ("ltx2-frontend", "ltx2-router", 41000, True),
        ("ltx2-etcd", "ltx2-router", 2379, True),
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


@pytest.mark.parametrize("name", COMPOSES)
def test_compose_opens_the_gateway_with_its_keys_and_nothing_else_beyond_this_host(name):
    for service_name, service in COMPOSES[name]["services"].items():
        open_to_all = [port for port in service.get("ports", []) if not port.startswith("127.0.0.1:")]
        assert open_to_all == (["${LTX2_PORT:-8080}:8080"] if service_name == "gateway" else [])
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
    assert WORKER["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0


@pytest.mark.parametrize("name", COMPOSES)
def test_compose_drains_and_its_workers_have_shared_memory(name):
    services = COMPOSES[name]["services"]
    for service in (each for part, each in services.items() if part.startswith(("worker", "router"))):
        minutes = re.fullmatch(r"(\d+)m", service["stop_grace_period"])
        assert minutes is not None
        assert int(minutes[1]) * 60 > DRAIN
    assert {each["shm_size"] for part, each in services.items() if part.startswith("worker")} == {"8gb"}


def test_a_compose_fleet_has_two_routers_and_workers_on_gpus_of_their_own():
    services = COMPOSES["compose-fleet"]["services"]
    workers = {name: each for name, each in services.items() if name.startswith("worker")}
    reserved = [each["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] for each in workers.values()]
    assert sorted(reserved) == [[str(number)] for number in range(len(workers))]
    assert {each["environment"]["LTX2_ROUTER"] for each in workers.values()} == {"1"}
    assert services["gateway"]["environment"]["LTX2_GATEWAY_WORKERS"].split(",") == [
        f"http://{name}:9090" for name in workers
    ]
    router = services["router"]
    assert (router["command"], router["deploy"]) == (["ltx2-router"], {"replicas": 2})
    discovery = {each["environment"]["DYN_FILE_KV"] for each in (router, services["frontend"], *workers.values())}
    assert discovery == {"/discovery"}
    assert all("discovery:/discovery" in each["volumes"] for each in (router, services["frontend"], *workers.values()))


def test_the_parts_of_compose_find_each_other():
    jobs = {job["job_name"]: job for job in yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["scrape_configs"]}
    names = [
        (name, each["port"])
        for job in jobs.values()
        for each in job.get("dns_sd_configs", [])
        for name in each["names"]
    ]
    assert names == [("worker", 9090), ("router", 9090)]
    assert "worker" in COMPOSE["services"]
    fleet = COMPOSES["compose-fleet"]["services"]
    for name in ("worker0", "worker1"):
        assert fleet[name]["networks"]["default"]["aliases"] == ["worker"]
    assert [jobs[name]["static_configs"][0]["targets"] for name in ("dynamo-frontend", "ltx2-gateway")] == [
        ["frontend:8000"],
        ["gateway:8080"],
    ]
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
        for of in (Settings, GatewaySettings, RouterSettings)
        for field in of.model_fields.values()
    }
    for file in DEPLOY.rglob("*.yaml"):
        text = file.read_text()
        for image in re.findall(r"image: *(\S+)", text):
            assert image.startswith("${LTX2_IMAGE:?") or re.fullmatch(r"[\w./-]+:v?[\d.]+", image), image
        inside = set(re.findall(r"(?:name: |^ +)(LTX2_\w+)\b", text, re.MULTILINE))
        assert inside <= known, f"{file.name}: {inside - known}"
