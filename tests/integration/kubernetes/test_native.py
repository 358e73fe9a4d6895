"""deploy/kubernetes: each container's command line, environment and probes, as processes of this machine."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.container_image import entrypoint_of
from tests.kubernetes_manifests import Object, built, container, named, workloads
from tests.native_containers import NativeContainers

START_S = 90.0
SECRET = {"REDIS_PASSWORD": "a0b1c2", "DYN_REDIS_URL": "redis://:a0b1c2@redis:6379"}
ENGINES_MODEL = "Qwen/Qwen3-8B"


@pytest.fixture
def directory(repository: Path) -> Path:
    return repository / "deploy" / "kubernetes"


@pytest.fixture
def pods(directory: Path) -> dict[str, Object]:
    """Return the workloads by the host of a pod: Redis, a frontend, a router, and both sorts of workers."""
    found = {each["metadata"]["name"]: each for each in workloads(built(directory / "redis-inside"))}
    found["engine-worker"] = named(built(directory / "workers/vllm"), "Deployment", "worker")
    return found


@pytest.fixture
async def deployment(
    pods: dict[str, Object], repository: Path, tmp_path: Path
) -> AsyncIterator[NativeContainers]:
    from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH

    places = tmp_path / "places"
    places.mkdir()
    (places / "model").symlink_to(DEMO_MODEL_PATH)
    entrypoint = entrypoint_of((repository / "Dockerfile").read_text())
    containers = {
        host: container(workload, host=host, entrypoint=entrypoint, secret=SECRET, places=places)
        for host, workload in pods.items()
    }
    replaced = {"redis-server -": "redis-server - --bind 127.0.0.1"}
    found = NativeContainers(tmp_path, containers, replaced)
    yield found
    await found.stop_all()


def probe(pod: Object, name: str) -> dict[str, Any]:
    [main] = pod["spec"]["template"]["spec"]["containers"]
    found: dict[str, Any] = main[name]
    return found


async def ask(
    http: httpx.AsyncClient, deployment: NativeContainers, pod: Object, host: str, name: str
) -> int:
    """Make a pod's probe by HTTP. Return the status; 0 if nothing listens."""
    asked = probe(pod, name)["httpGet"]
    [main] = pod["spec"]["template"]["spec"]["containers"]
    [port] = [each["containerPort"] for each in main["ports"] if each["name"] == asked["port"]]
    try:
        answer = await http.get(f"http://127.0.0.1:{deployment.port(host, port)}{asked['path']}")
    except httpx.TransportError:
        return 0
    return answer.status_code


async def test_pods_serve_natively(
    deployment: NativeContainers, pods: dict[str, Object], directory: Path
) -> None:
    pytest.importorskip("aiohttp", reason="the extra engines is not installed")
    from tests.integration.engines.openai_engine import TestEngine

    engine = TestEngine(owner="vllm", name=ENGINES_MODEL)
    await engine.start(
        http_port=deployment.port("engine-worker", 8001),
        event_port=deployment.port("engine-worker", 5557),
        replay_port=deployment.port("engine-worker", 5657),
    )
    try:
        async with httpx.AsyncClient(timeout=30.0) as http:
            await start(deployment, pods, http)
            await check_chats(deployment, http)
            await check_scaling_metric(deployment, http, directory)
    finally:
        await engine.stop()

    for host in ("engine-worker", "worker", "frontend", "router", "redis"):
        grace_s = pods[host]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        started = time.monotonic()
        assert await deployment.stop(host, grace_s) == 0, deployment.logs()
        assert time.monotonic() - started < grace_s


async def start(deployment: NativeContainers, pods: dict[str, Object], http: httpx.AsyncClient) -> None:
    """Start all pods but Redis, which comes last, and wait for their probes."""
    processes = [host for host in pods if host != "redis"]
    for host in processes:
        deployment.start(host)
    with anyio.fail_after(START_S):
        for host in processes:  # alive without Redis, so that no pod is restarted for want of it
            while await ask(http, deployment, pods[host], host, "livenessProbe") != 200:
                deployment.check_all_run()
                await anyio.sleep(0.05)
            assert await ask(http, deployment, pods[host], host, "readinessProbe") == 503
    deployment.start("redis")
    if deployment.has("redis-cli"):
        await deployment.until_it_succeeds("redis", probe(pods["redis"], "readinessProbe")["exec"]["command"])
    with anyio.fail_after(START_S):
        for host in processes:
            while await ask(http, deployment, pods[host], host, "readinessProbe") != 200:
                deployment.check_all_run()
                await anyio.sleep(0.05)


async def check_chats(deployment: NativeContainers, http: httpx.AsyncClient) -> None:
    url = f"http://127.0.0.1:{deployment.port('frontend', 8000)}"
    for model in ("demo", ENGINES_MODEL):
        body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 5}
        with anyio.fail_after(START_S):
            while (answer := await http.post(f"{url}/v1/chat/completions", json=body)).status_code != 200:
                assert answer.status_code in (404, 503), answer.text
                await anyio.sleep(0.05)
        assert answer.json()["choices"][0]["message"]["content"]
    metrics = (await http.get(f"http://127.0.0.1:{deployment.port('router', 9090)}/metrics")).text
    chosen = re.findall(r"^dynamo_component_router_requests_total\{.*\} (\S+)$", metrics, re.MULTILINE)
    assert sum(map(float, chosen)) >= 2, "the frontend asks the router"


async def check_scaling_metric(
    deployment: NativeContainers, http: httpx.AsyncClient, directory: Path
) -> None:
    """Check that workers have the metric of their autoscaler, with the labels that the adapter wants."""
    [scaler] = [
        each for each in built(directory / "workers/mock") if each["kind"] == "HorizontalPodAutoscaler"
    ]
    [metric] = scaler["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    [rule] = yaml.safe_load((directory / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert rule["name"]["as"] == name
    assert rule["seriesQuery"].startswith(f"{name}{{")
    labels = dict(re.findall(r'(\w+)="([^"]+)"', rule["metricsQuery"]))
    assert labels
    for host in ("worker", "engine-worker"):
        text = (await http.get(f"http://127.0.0.1:{deployment.port(host, 9090)}/metrics")).text
        samples = [each for family in text_string_to_metric_families(text) for each in family.samples]
        assert [each for each in samples if each.name == name and labels.items() <= each.labels.items()], host
