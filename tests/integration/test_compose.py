"""compose/single.yml: valid by the Compose Specification, and each service's own command line works.

The commands run natively, with the addresses of the containers replaced by local ones; where a container
engine answers, the file itself is brought up, too.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import yaml
from redis import Redis, RedisError

from dynamo_redis.child import ChildProcess
from dynamo_redis.store.server import find_server

START_S = 60.0
STOP_S = 10.0


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


def test_images_have_exact_versions(compose: dict[str, Any], dockerfile: str) -> None:
    images = [compose["services"]["redis"]["image"], *re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)]
    assert all(re.fullmatch(r"[a-z]+:\d+\.\d+\.\d+-[a-z-]+", image) for image in images), images


def test_dependencies_are_a_layer_before_sources(dockerfile: str) -> None:
    assert dockerfile.index("[http,engines,otel]") < dockerfile.index("COPY src ")


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
    assert entrypoint(dockerfile) == ["dynamo-redis"]


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


def entrypoint(dockerfile: str) -> list[str]:
    found = re.search(r"^ENTRYPOINT (.*)$", dockerfile, re.MULTILINE)
    assert found
    command: list[str] = json.loads(found[1])
    return command


# --------------------------------------------------------------------------- run natively


@dataclass
class NativeDeployment:
    """The services of the file, run as processes of this machine."""

    services: dict[str, Any]
    entrypoint: list[str]
    directory: Path
    redis_path: Path
    http_port: int
    password: str = "a0b1c2"
    processes: dict[str, ChildProcess] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.directory / "bin").mkdir()
        (self.directory / "bin" / "redis-server").symlink_to(find_server().path)

    def localized(self, text: str) -> str:
        """Return a text with Compose's variables replaced, and local addresses instead of the containers'."""
        text = re.sub(r"\b8000\b", str(self.http_port), text).replace("/tmp/", f"{self.directory}/")
        text = re.sub(r"\$\{REDIS_PASSWORD[^}]*\}", self.password, text).replace("$$", "$")
        text = text.replace("$(hostname -i | cut -d' ' -f1)", "127.0.0.1")
        text = re.sub(r"redis://(.*)@redis:6379", rf"unix://\1@{self.redis_path}", text)
        # Redis is started last: by then another program might have a port that is free now.
        server = f"redis-server - --port 0 --unixsocket {self.redis_path} --dir {self.directory}"
        return text.replace("redis-server -", server)

    def environment(self, service: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("DYN_")}
        places = [str(self.directory / "bin"), str(Path(sys.executable).parent), kept.get("PATH", "")]
        own = {name: self.localized(text) for name, text in self.services[service]["environment"].items()}
        return {**kept, "PATH": os.pathsep.join(places), **own}

    def start(self, service: str, name: str) -> None:
        command = [self.localized(word) for word in self.services[service]["command"]]
        argv = command if service == "redis" else [*self.entrypoint, *command]
        env = self.environment(service)
        with (self.directory / f"{name}.log").open("wb") as log:
            self.processes[name] = ChildProcess.start(
                argv, env=env, cwd=self.directory, stdout=log, stderr=log
            )

    async def check(self, service: str) -> int | None:
        """Run a service's health check; return the exit code."""
        kind, *test = map(self.localized, self.services[service]["healthcheck"]["test"])
        argv = ["sh", "-c", *test] if kind == "CMD-SHELL" else test
        return await ChildProcess.start(argv, env=self.environment(service)).wait(30)

    def redis_answers(self) -> bool:
        try:
            with Redis(unix_socket_path=str(self.redis_path), password=self.password) as redis:
                return bool(redis.ping())
        except RedisError:
            return False

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')}" for path in self.directory.glob("*.log")
        )


@pytest.fixture
async def deployment(
    compose: dict[str, Any], dockerfile: str, tmp_path: Path, short_directory: Path
) -> AsyncIterator[NativeDeployment]:
    deployment = NativeDeployment(
        compose["services"], entrypoint(dockerfile), tmp_path, short_directory / "redis.sock", free_port()
    )
    try:
        deployment.start("frontend", "frontend")
        for number in range(compose["services"]["worker"]["deploy"]["replicas"]):
            deployment.start("worker", f"worker-{number}")
        with anyio.fail_after(START_S):  # as when a machine starts again: Redis comes last
            while "waiting for it" not in (tmp_path / "worker-0.log").read_text():
                await anyio.sleep(0.02)
        deployment.start("redis", "redis")
        with anyio.fail_after(START_S):
            while not deployment.redis_answers():
                await anyio.sleep(0.02)
        yield deployment
    finally:
        for process in deployment.processes.values():
            await process.stop(1.0)


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """A path of a socket has room for about a hundred characters."""
    with tempfile.TemporaryDirectory(prefix="dyn-") as directory:
        yield Path(directory)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def test_each_services_command_line_runs_natively(deployment: NativeDeployment) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{deployment.http_port}", timeout=10.0) as http:
        try:
            with anyio.fail_after(START_S):
                instances = await wait_for_instances(http, deployment, count=2)
        except TimeoutError:
            pytest.fail(f"not healthy within {START_S:g} s\n{deployment.logs()}")
        assert len(instances) == 2

        for service in ("frontend", "worker"):
            assert await deployment.check(service) == 0, f"{service}\n{deployment.logs()}"

        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 5}
        answer = await http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"]

    for name in ("worker-0", "worker-1", "frontend", "redis"):
        started = time.monotonic()
        code = await deployment.processes[name].stop(STOP_S)
        assert code == 0, f"{name} ended with {code}\n{deployment.logs()}"
        assert time.monotonic() - started < STOP_S


async def wait_for_instances(
    http: httpx.AsyncClient, deployment: NativeDeployment, *, count: int
) -> list[object]:
    while True:
        for name, process in deployment.processes.items():
            assert process.returncode is None, f"{name} ended\n{deployment.logs()}"
        try:
            answer = await http.get("/health")
        except httpx.TransportError:
            await anyio.sleep(0.05)
            continue
        instances: list[object] = answer.json().get("instances", [])
        if answer.status_code == 200 and len(instances) >= count:
            return instances
        await anyio.sleep(0.05)


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
