"""compose/cluster.yml: valid over single.yml, and chats go on when the master of the registry is killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.crc import key_slot

from tests.compose_files import check, health_check, merged, read
from tests.integration.compose.conftest import Deploy, chat

START_S = 90.0
NODES = ("redis", "redis-2", "redis-3", "redis-4", "redis-5", "redis-6")
MASTERS = NODES[:3]
"""Those that `redis-cli --cluster create` makes masters: the first ones, each of a third of the slots."""
ADDRESSES = {f"172.30.0.{11 + number}:": f"{node}:" for number, node in enumerate(NODES)}
# The test need not wait for what a busy network may need.
HERE = ADDRESSES | {"cluster-node-timeout 5000": "cluster-node-timeout 1500"}


@pytest.fixture
def cluster(directory: Path) -> dict[str, Any]:
    return read(directory / "cluster.yml")


@pytest.fixture
def compose(directory: Path, cluster: dict[str, Any]) -> dict[str, Any]:
    return merged(read(directory / "single.yml"), cluster)


def test_cluster_file_is_valid_alone_and_merged(compose: dict[str, Any], cluster: dict[str, Any]) -> None:
    check(cluster)
    check(compose)


def test_nodes_have_the_addresses_of_the_cluster(compose: dict[str, Any]) -> None:
    command = compose["services"]["cluster-create"]["command"][0]
    for node, address in zip(NODES, ADDRESSES, strict=True):
        service = compose["services"][node]
        assert service["networks"]["default"]["ipv4_address"] == address.removesuffix(":")
        assert f"{address}6379" in command
        assert service["volumes"] == [f"{node}-data:/data"]


async def test_killed_master_is_replaced_natively(compose: dict[str, Any], deploy: Deploy) -> None:
    hosts = [*NODES, "cluster-create", "frontend", "worker-1", "worker-2"]
    deployment = deploy(compose, hosts, ports={node: [6379] for node in NODES}, replaced=HERE)
    if not deployment.has("redis-cli"):
        pytest.skip("needs redis-cli beside redis-server")
    for node in NODES:
        deployment.start(node)
    for node in NODES:
        await deployment.until_it_succeeds(node, health_check(compose, node))
    for _ in range(2):  # the second time there is nothing to do
        assert await deployment.start("cluster-create").wait(START_S) == 0, deployment.logs()
        del deployment.processes["cluster-create"]
    for host in ("frontend", "worker-1"):
        deployment.start(host)
    for host in ("worker-1", "frontend"):
        await deployment.until_it_succeeds(host, health_check(compose, host))
    for node in NODES[3:]:  # a replica without its master's data does not take over
        follows = "redis-cli -p 6379 info replication | grep -q '^master_link_status:up'"
        await deployment.until_it_succeeds(node, ["sh", "-c", f'REDISCLI_AUTH="$REDIS_PASSWORD" {follows}'])

    url = f"http://127.0.0.1:{deployment.port('frontend', 8000)}"
    async with httpx.AsyncClient(base_url=url, timeout=30.0) as http:
        await chat(http, instances=1, within_s=START_S)
        killed = deployment.processes.pop(MASTERS[key_slot(b"{dynamo}") * 3 // 16384])
        killed.kill()
        await killed.wait()
        await chat(http, instances=1, within_s=START_S)
        deployment.start("worker-2")  # registers with the replica that takes over
        await chat(http, instances=2, within_s=START_S)
