"""The fault harness behind Redis Sentinels: a process sees only its own proxies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dynamo_redis.errors import StoreUnavailable
from dynamo_redis.store.redis.client import RedisClient
from faults.servers import ServerUnderTest, installed_servers
from faults.stores import SentinelLink, SentinelStore


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
