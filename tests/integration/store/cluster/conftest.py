"""A real cluster of three masters with a replica each, on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from dynamo_redis.store.cluster_server import ClusterNode, EmbeddedCluster
from dynamo_redis.store.redis.cluster.client import ClusterClient

WAIT_S = 60.0


@pytest.fixture(scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedCluster]:
    """Every test leaves it whole, but its slots and roles where they are."""
    async with EmbeddedCluster(tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture
async def client(cluster: EmbeddedCluster) -> AsyncIterator[ClusterClient]:
    made = ClusterClient(cluster.url, timeout_s=5.0)
    yield made
    await made.aclose()


async def other_master(cluster: EmbeddedCluster, than: ClusterNode) -> ClusterNode:
    """Return a master other than the given node."""
    for node in cluster.running():
        if node is not than and await node.is_master():
            return node
    raise AssertionError("there is no other master")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.01)
