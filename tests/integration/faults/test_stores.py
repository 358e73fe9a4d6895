"""The fault harness behind Redis Sentinels and on a cluster: a process sees only its own proxies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dynamo_redis.errors import StoreUnavailable
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.redis.cluster.slots import slot_of_key
from faults.cluster_store import ClusterStore
from faults.links import ClusterLink, SentinelLink
from faults.servers import ServerUnderTest, installed_servers
from faults.stores import SentinelStore


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SentinelStore]:
    kind = installed_servers()[0]
    servers = [ServerUnderTest(label, kind, tmp_path / label) for label in ("a", "b")]
    made = SentinelStore(servers, tmp_path / "sentinels")
    try:
        await made.start()
        yield made
    finally:
        await made.aclose()


async def test_process_reaches_servers_by_its_proxies(store: SentinelStore) -> None:
    link = await store.open_link()
    assert isinstance(link, SentinelLink)
    client = RedisClient(link.url, timeout_s=5.0)
    await client.execute("SET", "k", "v")
    own_ports = {proxy.url.rpartition(":")[2] for proxy in link._servers}
    assert any(f":{port} (" in client.address for port in own_ports)
    link.refuse = True
    link.cut()
    with pytest.raises(StoreUnavailable):
        await client.execute("GET", "k")
    link.heal()
    assert await client.execute("GET", "k") == b"v"
    await client.aclose()
    await link.aclose()


async def test_hand_over_behind_sentinels_loses_nothing(store: SentinelStore) -> None:
    link = await store.open_link()
    client = RedisClient(link.url, timeout_s=5.0)
    await client.execute("SET", "k", "v")
    old = store.server
    await store.hand_over()
    assert store.server is not old
    async with asyncio.timeout(30):
        while (await client.execute("INFO", "replication")).split(b"\r\n")[1] != b"role:master":
            await asyncio.sleep(0.02)
    assert await client.execute("GET", "k") == b"v"
    assert (await store.server.execute("CLIENT", "LIST")).count(b"name=dynamo-redis") >= 1
    await client.aclose()
    await link.aclose()


# --------------------------------------------------------------------------- a cluster


PREFIX = "faults"
KEY = f"{{{PREFIX}}}k"
"""A key in the registry's slot."""


@pytest.fixture
async def cluster_store(tmp_path: Path) -> AsyncIterator[ClusterStore]:
    made = ClusterStore(installed_servers()[0], tmp_path / "nodes", "everysec", PREFIX)
    try:
        await made.start()
        yield made
    finally:
        await made.aclose()


@pytest.fixture
async def link(cluster_store: ClusterStore) -> AsyncIterator[ClusterLink]:
    made = await cluster_store.open_link()
    assert isinstance(made, ClusterLink)
    yield made
    await made.aclose()


async def test_nodes_are_named_by_the_proxies_of_the_process(
    cluster_store: ClusterStore, link: ClusterLink
) -> None:
    own_ports = {int(proxy.url.rpartition(":")[2]) for proxy in link._proxies}
    node = RedisClient(link._proxies[0].url, timeout_s=5.0)
    slots = await node.execute("CLUSTER", "SLOTS")
    assert {place[1] for _, _, *places in slots for place in places} <= own_ports
    port = cluster_store.servers[1].url.rpartition(":")[2].encode()
    assert await node.execute("ECHO", port) == port  # data is not touched
    await node.aclose()


async def test_changes_of_the_registry_s_master_are_followed(
    cluster_store: ClusterStore, link: ClusterLink
) -> None:
    old = cluster_store.server
    await old.execute("SET", KEY, "v")
    await cluster_store.hand_over()
    assert cluster_store.server is not old
    assert await cluster_store.server.execute("GET", KEY) == b"v"
    target = next(
        node
        for node in cluster_store.cluster.nodes
        if node.master is None and node is not cluster_store.node_of(old)
    )
    await cluster_store.move(slot_of_key(KEY), target)
    assert cluster_store.node_of(cluster_store.server) is target
    assert await cluster_store.server.execute("GET", KEY) == b"v"


async def test_replica_without_the_last_writes_takes_over(cluster_store: ClusterStore) -> None:
    old = cluster_store.server
    await old.execute("SET", KEY, "kept")
    assert cluster_store.replica is not None
    assert await old.execute("WAIT", 1, 10_000) == 1
    await cluster_store.part(0.0)
    await old.execute("SET", KEY, "lost")
    await old.kill()
    await cluster_store.replace(())
    assert await cluster_store.server.execute("GET", KEY) == b"kept"


async def test_replica_of_a_dead_master_takes_over_only_if_it_may(cluster_store: ClusterStore) -> None:
    old, replica = cluster_store.server, cluster_store.replica
    await old.kill()
    async with cluster_store.automatic():
        await cluster_store.wait_for_takeover()
    assert cluster_store.server is replica
