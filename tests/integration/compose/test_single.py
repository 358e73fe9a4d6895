"""compose/single.yml: valid by the Compose Specification, and each service's own command line works.

The commands run natively, with the addresses of the containers replaced by local ones; where a container
engine answers, the file itself is brought up, too.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import yaml

from tests.compose_files import check, health_check, merged, read
from tests.container_image import entrypoint_of
from tests.integration.compose.conftest import Deploy, chat
from tests.native_containers import NativeContainers

START_S = 60.0
STOP_S = 30.0


@pytest.fixture
def compose_file(repository: Path) -> Path:
    return repository / "compose" / "single.yml"


@pytest.fixture
def compose(compose_file: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(compose_file.read_text())
    return content


@pytest.fixture
def dockerfile(repository: Path) -> str:
    return (repository / "Dockerfile").read_text()


# --------------------------------------------------------------------------- the files


def test_the_file_is_valid_by_the_compose_specification(compose: dict[str, Any]) -> None:
    spec = pytest.importorskip("compose_spec", reason="has no wheel for this platform")
    spec.PyCompose.from_yaml(yaml.safe_dump(compose)).validate()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("services.worker.comand", ["worker"]),
        ("services.worker.deploy.replicas", "two"),
        ("services.frontend.depends_on.redis.condition", "service_happy"),
        ("services.redis.healthcheck.interval", "2 moments"),
        ("services.redis.networks", ["no-such-network"]),
    ],
)
def test_that_check_sees_mistakes(compose: dict[str, Any], path: str, value: object) -> None:
    spec = pytest.importorskip("compose_spec", reason="has no wheel for this platform")
    *parents, last = path.split(".")
    place = compose
    for parent in parents:
        place = place[parent]
    place[last] = value
    with pytest.raises(Exception, match=r"no-such-network|expected|extension key|duration"):
        spec.PyCompose.from_yaml(yaml.safe_dump(compose)).validate()


def test_one_redis_a_frontend_and_two_workers(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert {volume.partition(":")[0] for volume in services["redis"]["volumes"]} == set(compose["volumes"])
    assert set(services) == {"redis", "frontend", "worker"}
    assert services["worker"]["deploy"]["replicas"] == 2
    assert services["frontend"]["ports"] == ["8000:8000"]
    command = shlex.join(services["redis"]["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory 512mb" in command
    assert "--maxmemory-policy noeviction" in command
    assert services["redis"]["mem_limit"] == "1g"


def test_no_password_stands_in_the_file(compose: dict[str, Any]) -> None:
    redis, worker = compose["services"]["redis"], compose["services"]["worker"]
    assert "requirepass $$REDIS_PASSWORD" in redis["command"][2]
    assert redis["environment"]["REDIS_PASSWORD"] == "${REDIS_PASSWORD}"
    assert re.fullmatch(
        r"redis://:\$\{REDIS_PASSWORD:\?.*\}@redis:6379", worker["environment"]["DYN_REDIS_URL"]
    )


@pytest.mark.parametrize(
    "names",
    [
        ("tls", "vllm", "observability"),
        ("sentinel", "vllm", "observability"),
        ("cluster", "vllm", "observability"),
    ],
)
def test_files_over_this_one_can_be_combined(
    names: tuple[str, ...], compose: dict[str, Any], compose_file: Path
) -> None:
    check(merged(compose, *(read(compose_file.with_name(f"{name}.yml")) for name in names)))


def test_images_have_exact_versions(compose: dict[str, Any], dockerfile: str) -> None:
    images = [compose["services"]["redis"]["image"], *re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)]
    assert all(re.fullmatch(r"[a-z]+:\d+\.\d+\.\d+-[a-z-]+", image) for image in images), images


def test_dependencies_are_a_layer_before_sources(dockerfile: str) -> None:
    assert dockerfile.index("/source[$EXTRAS]") < dockerfile.index("COPY src ")


def test_processes_stop_gracefully_and_have_no_rights(compose: dict[str, Any], dockerfile: str) -> None:
    for name in ("frontend", "worker"):
        service = compose["services"][name]
        grace_s = int(service["stop_grace_period"].removesuffix("s"))
        assert grace_s > 30  # DYN_GRACEFUL_SHUTDOWN_S
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
    last_stage = dockerfile.rpartition("\nFROM ")[2]
    assert re.search(r"^USER [1-9]\d+:[1-9]\d+$", last_stage, re.MULTILINE)
    assert "STOPSIGNAL SIGTERM" in last_stage
    assert entrypoint_of(dockerfile) == ["dynamo-redis"]


def test_the_image_is_built_from_what_the_context_lets_through(repository: Path, dockerfile: str) -> None:
    allowed = {
        line.removeprefix("!")
        for line in (repository / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = {
        word.rstrip("/")
        for line in re.findall(r"^COPY (?!--)(.*) \S+$", dockerfile, re.MULTILINE)
        for word in line.split()
    }
    assert copied == allowed
    assert all((repository / name).exists() for name in copied)


# --------------------------------------------------------------------------- run natively


@pytest.fixture
async def deployment(compose: dict[str, Any], deploy: Deploy) -> NativeContainers:
    return deploy(compose, ["redis", "frontend", "worker-1", "worker-2"])


async def test_each_services_command_line_runs_natively(
    compose: dict[str, Any], deployment: NativeContainers
) -> None:
    for host in ("frontend", "worker-1", "worker-2"):
        deployment.start(host)
    with anyio.fail_after(START_S):  # as when a machine starts again: Redis comes last
        while "waiting for it" not in deployment.log("worker-1").read_text():
            await anyio.sleep(0.02)
    deployment.start("redis")
    if deployment.has("redis-cli"):
        await deployment.until_it_succeeds("redis", health_check(compose, "redis"))
    for host in ("worker-1", "worker-2", "frontend"):
        await deployment.until_it_succeeds(host, health_check(compose, host))

    url = f"http://127.0.0.1:{deployment.port('frontend', 8000)}"
    async with httpx.AsyncClient(base_url=url, timeout=30.0) as http:
        await chat(http, instances=2, within_s=START_S)

    for host in ("worker-1", "worker-2", "frontend", "redis"):
        started = time.monotonic()
        code = await deployment.stop(host, STOP_S)
        assert code == 0, f"{host} ended with {code}\n{deployment.logs()}"
        assert time.monotonic() - started < STOP_S


# --------------------------------------------------------------------------- in containers


@pytest.mark.timeout(600)
def test_up_in_containers(compose_file: Path) -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "info"], capture_output=True, timeout=20).returncode != 0:
        pytest.skip("no container engine answers")
    if subprocess.run([docker, "compose", "version"], capture_output=True, timeout=20).returncode != 0:
        pytest.skip("the container engine has no compose")
    command = [docker, "compose", "--file", str(compose_file), "--project-name", f"dynamo-test-{os.getpid()}"]
    environment = {**os.environ, "REDIS_PASSWORD": "a0b1c2"}
    try:
        subprocess.run(
            [*command, "up", "--build", "--wait", "--wait-timeout", "300"],
            check=True,
            timeout=500,
            env=environment,
        )
        health = httpx.get("http://127.0.0.1:8000/health", timeout=10)
        assert health.status_code == 200
    finally:
        subprocess.run([*command, "down", "--volumes", "--timeout", "10"], timeout=90, env=environment)
