"""compose/sentinel.yml: valid over single.yml, and chats go on when the primary is killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.compose_files import check, health_check, merged, read
from tests.integration.compose.conftest import Deploy, chat
from tests.native_containers import NativeContainers

START_S = 90.0
SERVERS = ("redis", "redis-2", "redis-3")
SENTINELS = ("sentinel-1", "sentinel-2", "sentinel-3")
PORTS = {host: [6379] for host in SERVERS} | {host: [26379] for host in SENTINELS}
HERE = {
    "replica-announce-ip $NAME": "replica-announce-ip 127.0.0.1",
    "sentinel announce-ip $NAME": "sentinel announce-ip 127.0.0.1",
    "redis-server /data/redis.conf": "redis-server /data/redis.conf --bind 127.0.0.1",
    "redis-server /data/sentinel.conf": "redis-server /data/sentinel.conf --bind 127.0.0.1",
    # The test need not wait for what a busy network may need.
    "down-after-milliseconds mymaster 5000": "down-after-milliseconds mymaster 1000",
    "failover-timeout mymaster 30000": "failover-timeout mymaster 5000",
}


@pytest.fixture
def sentinel(directory: Path) -> dict[str, Any]:
    return read(directory / "sentinel.yml")


@pytest.fixture
def compose(directory: Path, sentinel: dict[str, Any]) -> dict[str, Any]:
    return merged(read(directory / "single.yml"), sentinel)


def test_sentinel_file_is_valid_alone_and_merged(compose: dict[str, Any], sentinel: dict[str, Any]) -> None:
    check(sentinel)
    check(compose)


def test_volumes_keep_what_servers_learn(compose: dict[str, Any]) -> None:
    volumes = [compose["services"][host]["volumes"] for host in (*SERVERS, *SENTINELS)]
    assert [volume for [volume] in volumes] == [f"{host}-data:/data" for host in (*SERVERS, *SENTINELS)]


def test_url_names_every_sentinel(compose: dict[str, Any]) -> None:
    hosts = ",".join(f"{host}:26379" for host in SENTINELS)
    for name in ("frontend", "worker"):
        service = compose["services"][name]
        assert f"@{hosts}/mymaster?" in service["environment"]["DYN_REDIS_URL"]
        assert service["depends_on"].keys() == {"redis", *SENTINELS}


async def test_killed_primary_is_replaced_natively(compose: dict[str, Any], deploy: Deploy) -> None:
    hosts = [*SERVERS, *SENTINELS, "frontend", "worker-1", "worker-2"]
    deployment = deploy(compose, hosts, ports=PORTS, replaced=HERE)
    if not deployment.has("redis-cli"):
        pytest.skip("needs redis-cli beside redis-server")
    for group in (("redis",), ("redis-2", "redis-3"), SENTINELS, ("frontend", "worker-1")):
        for host in group:  # as `depends_on` says
            deployment.start(host)
        for host in group:
            await deployment.until_it_succeeds(host, health_check(compose, host))
    await until_replicas_follow(deployment)

    url = f"http://127.0.0.1:{deployment.port('frontend', 8000)}"
    async with httpx.AsyncClient(base_url=url, timeout=30.0) as http:
        await chat(http, instances=1, within_s=START_S)
        killed = deployment.processes.pop("redis")
        killed.kill()
        await killed.wait()
        await chat(http, instances=1, within_s=START_S)
        deployment.start("worker-2")  # registers with the new primary
        await chat(http, instances=2, within_s=START_S)


def asked(command: str) -> list[str]:
    return ["sh", "-c", f'REDISCLI_AUTH="$REDIS_PASSWORD" {command}']


async def until_replicas_follow(deployment: NativeContainers) -> None:
    """Wait until the sentinels know both replicas and each other: before that they promote none."""
    for host in SENTINELS:
        listed = "redis-cli -p 26379 sentinel {} mymaster | grep -c '^name$' | grep -qx 2"
        for what in ("replicas", "sentinels"):
            await deployment.until_it_succeeds(host, asked(listed.format(what)))
    for host in ("redis-2", "redis-3"):
        up = "redis-cli -p 6379 info replication | grep -q master_link_status:up"
        await deployment.until_it_succeeds(host, asked(up))
