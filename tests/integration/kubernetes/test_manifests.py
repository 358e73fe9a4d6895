"""deploy/kubernetes: valid by Kubernetes' schemas, and in agreement with the settings and with each other."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from dynamo_redis.config import GROUPS, RuntimeSettings, env_name
from dynamo_redis.config.base import parse_duration
from tests.kubernetes_manifests import Object, built, containers_of, named, reachable, selects, workloads
from tests.vllm_arguments import OPTIONS, SWITCHES, check_kv_events

OLDEST = "1.29"
"""The first release with sidecars by default."""
OVERLAYS = ("redis-inside", "redis-outside")
COMPONENT = "app.kubernetes.io/component"


@pytest.fixture
def directory(repository: Path) -> Path:
    return repository / "deploy" / "kubernetes"


@pytest.fixture
def inside(directory: Path) -> list[Object]:
    return built(directory / "redis-inside")


@pytest.fixture
def vllm(directory: Path) -> list[Object]:
    return built(directory / "workers" / "vllm")


@pytest.fixture
def every(directory: Path, vllm: list[Object]) -> list[Object]:
    """Return all objects of all files."""
    return [each for overlay in OVERLAYS for each in built(directory / overlay)] + vllm


# --------------------------------------------------------------------------- valid


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
def test_each_object_fits_the_schemas(every: list[Object], version: str) -> None:
    for each in {str(each): each for each in every}.values():
        kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Deployment", ["spec", "template", "spec", "terminationGracePeriod"], 30),
        ("HorizontalPodAutoscaler", ["spec", "maxReplicas"], "many"),
        ("NetworkPolicy", ["spec", "podSelektor"], {}),
    ],
)
def test_that_check_sees_mistakes(inside: list[Object], kind: str, path: list[str], value: object) -> None:
    wrong: Any = next(each for each in inside if each["kind"] == kind)
    place = wrong
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, OLDEST, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_builds_the_same_objects(directory: Path, overlay: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl here; the kustomizations only name files")
    text = subprocess.run(
        [kubectl, "kustomize", directory / overlay], check=True, capture_output=True, timeout=120
    ).stdout.decode()
    text = text.replace("registry.example/dynamo-redis", "dynamo-redis")

    def sorted_texts(objects: list[Object]) -> list[str]:
        return sorted(json.dumps(each, sort_keys=True) for each in objects)

    assert sorted_texts(list(yaml.safe_load_all(text))) == sorted_texts(built(directory / overlay))


# --------------------------------------------------------------------------- pods


def test_no_pod_has_rights_on_its_node(every: list[Object]) -> None:
    for workload in workloads(every):
        pod = workload["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers_of(workload):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context.get("readOnlyRootFilesystem") or container["name"] == "engine"


def test_pods_run_as_the_user_of_the_image(every: list[Object], repository: Path) -> None:
    found = re.search(r"^USER (\d+):(\d+)$", (repository / "Dockerfile").read_text(), re.MULTILINE)
    assert found
    for workload in workloads(every):
        context = workload["spec"]["template"]["spec"]["securityContext"]
        if workload["metadata"]["name"] != "redis":
            assert (context["runAsUser"], context["runAsGroup"]) == (int(found[1]), int(found[2]))


def test_containers_say_what_they_need(every: list[Object]) -> None:
    for workload in workloads(every):
        for container in containers_of(workload):
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]


def test_images_have_exact_versions(every: list[Object]) -> None:
    images = {each["image"] for workload in workloads(every) for each in containers_of(workload)}
    assert all(re.fullmatch(r"[a-z/-]+:v?\d+\.\d+\.\d+(-alpine)?", image) for image in images), images


def test_variables_are_documented_settings(every: list[Object], repository: Path) -> None:
    known = {env_name(field) for group in GROUPS for field in group.model_fields.values()}
    documented = set(re.findall(r"^\| `(\w+)` ", (repository / "docs/settings.md").read_text(), re.MULTILINE))
    for workload in workloads(every):
        for container in containers_of(workload):
            if container["name"] in ("frontend", "router", "worker"):
                names = {each["name"] for each in container["env"]}
                assert names <= known & documented


def test_secrets_are_named_and_not_written(every: list[Object]) -> None:
    assert not [each for each in every if each["kind"] == "Secret"]
    for workload in workloads(every):
        for container in containers_of(workload):
            for variable in container["env"]:
                if variable["name"] in ("DYN_REDIS_URL", "REDIS_PASSWORD"):
                    reference = {"name": "dynamo-redis", "key": variable["name"]}
                    assert variable["valueFrom"] == {"secretKeyRef": reference}


def test_grace_periods_leave_time_for_the_shutdown(every: list[Object]) -> None:
    for workload in workloads(every):
        [main] = workload["spec"]["template"]["spec"]["containers"]
        if main["name"] == "redis":
            continue
        variables = {each["name"]: each.get("value") for each in main["env"]}
        drain_s = parse_duration(variables.get("DYN_GRACEFUL_SHUTDOWN_S") or RuntimeSettings().drain_s)
        assert isinstance(drain_s, float)
        before_s = 0.0
        if "lifecycle" in main:
            program, seconds = main["lifecycle"]["preStop"]["exec"]["command"]
            assert program == "sleep"
            before_s = float(seconds)
        engines_s = 20.0 if "initContainers" in workload["spec"]["template"]["spec"] else 0.0
        grace_s = workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        assert grace_s == before_s + drain_s + engines_s + 10.0, workload["metadata"]["name"]


def test_probes_ask_ports_that_are_served(every: list[Object]) -> None:
    for workload in workloads(every):
        [main] = workload["spec"]["template"]["spec"]["containers"]
        if main["name"] == "redis":
            continue
        ports = {each["name"]: str(each["containerPort"]) for each in main["ports"]}
        variables = {each["name"]: each.get("value") for each in main["env"]}
        assert main["readinessProbe"]["httpGet"] == {"path": "/health", "port": "system"}
        assert main["livenessProbe"]["httpGet"] == {"path": "/live", "port": "system"}
        assert ports.pop("system") == variables["DYN_SYSTEM_PORT"]
        annotations = workload["spec"]["template"]["metadata"]["annotations"]
        assert annotations["prometheus.io/port"] == variables["DYN_SYSTEM_PORT"]
        assert set(ports.values()) == {variables.get("DYN_HTTP_PORT") or variables["DYN_TCP_RPC_PORT"]}


def test_workers_and_routers_advertise_their_pod(every: list[Object]) -> None:
    for workload in workloads(every):
        [main] = workload["spec"]["template"]["spec"]["containers"]
        if main["name"] in ("worker", "router"):
            [host] = [each for each in main["env"] if each["name"] == "DYN_TCP_ADVERTISE_HOST"]
            assert host["valueFrom"] == {"fieldRef": {"fieldPath": "status.podIP"}}


# --------------------------------------------------------------------------- objects that name others


def test_selectors_match_one_workload(inside: list[Object], vllm: list[Object]) -> None:
    pods = {
        each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"] for each in workloads(inside)
    }
    for each in [*inside, *vllm]:
        selector = each.get("spec", {}).get("selector")
        if selector is not None:
            wanted = {"matchLabels": selector} if each["kind"] == "Service" else selector
            found = [name for name, labels in pods.items() if selects(wanted, labels)]
            assert found == [each["metadata"]["name"]], each["kind"]


def test_scaled_deployments_have_no_replicas(inside: list[Object], vllm: list[Object]) -> None:
    for objects in (inside, vllm):
        for scaler in [each for each in objects if each["kind"] == "HorizontalPodAutoscaler"]:
            deployment = named(objects, "Deployment", scaler["spec"]["scaleTargetRef"]["name"])
            assert "replicas" not in deployment["spec"]
            assert scaler["spec"]["minReplicas"] >= 2


def test_budgets_are_for_all_that_has_replicas(inside: list[Object]) -> None:
    budgets = {each["metadata"]["name"] for each in inside if each["kind"] == "PodDisruptionBudget"}
    assert budgets == {"frontend", "router", "worker"}


def test_network_lets_through_what_is_needed(inside: list[Object]) -> None:
    assert reachable(inside) == {
        ("frontend", "redis", 6379),
        ("router", "redis", 6379),
        ("worker", "redis", 6379),
        ("frontend", "router", 7000),
        ("frontend", "worker", 7000),
        ("router", "worker", 7000),
    }


def test_clients_reach_the_port_of_http_alone(inside: list[Object]) -> None:
    policy = named(inside, "NetworkPolicy", "clients-to-frontend")
    assert policy["spec"]["ingress"] == [{"ports": [{"protocol": "TCP", "port": "http"}]}]


def test_metrics_are_for_prometheus_only(inside: list[Object]) -> None:
    rules = [
        rule
        for each in inside
        if each["kind"] == "NetworkPolicy"
        for rule in each["spec"].get("ingress", ())
        if any(port["port"] in (9090, "system") for port in rule["ports"])
    ]
    [rule] = rules
    labels = {"kubernetes.io/metadata.name": "monitoring"}
    assert rule["from"] == [{"namespaceSelector": {"matchLabels": labels}}]


# --------------------------------------------------------------------------- the engine


def test_engine_is_a_sidecar_with_documented_flags(vllm: list[Object]) -> None:
    worker = named(vllm, "Deployment", "worker")
    engine, main = containers_of(worker)
    assert engine["restartPolicy"] == "Always"
    assert engine["command"] == ["vllm", "serve"]
    model, *words = engine["args"]
    assert model == "/model"
    names = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert names <= OPTIONS | SWITCHES
    variables = {each["name"]: each.get("value") for each in main["env"]}
    assert f"--served-model-name={variables['DYN_MODEL_NAME']}" in words
    host, port = (next(word for word in words if word.startswith(name)) for name in ("--host=", "--port="))
    url = f"http://{host.partition('=')[2]}:{port.partition('=')[2]}"
    assert variables["DYN_ENGINE_URL"] == url
    for probe in ("startupProbe", "livenessProbe"):
        assert f"{url}/health" in engine[probe]["exec"]["command"][-1]
    check_kv_events(
        json.loads(words[words.index("--kv-events-config") + 1]),
        host="127.0.0.1",
        events=str(variables["DYN_KV_EVENTS_ENDPOINT"]),
        replay=str(variables["DYN_KV_REPLAY_ENDPOINT"]),
    )
