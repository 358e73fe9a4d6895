"""Masters of a cluster that end, and replicas that take their place."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import pytest

from dynamo_redis.config import EventSettings
from dynamo_redis.errors import StoreError, StoreRefused, StoreUnavailable
from dynamo_redis.store.cluster_server import EmbeddedCluster
from dynamo_redis.store.event_base import NewEntry, StreamName
from dynamo_redis.store.keys import RegistryKeys, StreamKeys
from dynamo_redis.store.redis.blocking import pack
from dynamo_redis.store.redis.cluster import topology
from dynamo_redis.store.redis.cluster.client import ClusterClient
from dynamo_redis.store.redis.opening import open_client
from dynamo_redis.store.registry.redis_registry import RedisRegistry
from dynamo_redis.store.scripts import Script
from dynamo_redis.store.server import EmbeddedServer
from dynamo_redis.store.streams.redis_streams import RedisEventStreams
from tests.integration.store.cluster.conftest import WAIT_S, until
from tests.integration.store.conftest import Mirror, OpenRegistry

STREAM = StreamName("test", "backend", "kv_events")


async def put_until_taken(registry: RedisRegistry, key: str, value: bytes) -> None:
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                await registry.put(key, value)
            except StoreUnavailable:
                await asyncio.sleep(0.02)
            else:
                return


async def test_registry_goes_on_after_its_master_is_killed(
    cluster: EmbeddedCluster, open_registry: OpenRegistry, dynamo_redis_prefix: str
) -> None:
    writer, reader = [await open_registry(cluster.url, ttl_s=5.0) for _ in range(2)]
    mirror = Mirror(reader, "v1/")
    await writer.register("v1/owned", b"here")
    await until(lambda: "v1/owned" in mirror.state)
    key = RegistryKeys(dynamo_redis_prefix).meta
    master = await cluster.owner_of(key)
    replica = await cluster.replica_of(master)
    await master.server.kill()
    await put_until_taken(writer, "v1/after", b"taken")
    assert await cluster.owner_of(key) is replica
    await until(lambda: set(mirror.state) == {"v1/owned", "v1/after"})
    await master.server.start()
    await cluster.wait_until_whole()


async def test_a_frozen_master_that_comes_back_is_not_used(
    cluster: EmbeddedCluster, open_registry: OpenRegistry, dynamo_redis_prefix: str
) -> None:
    writer, reader = [await open_registry(cluster.url, ttl_s=5.0) for _ in range(2)]
    mirror = Mirror(reader, "v1/")
    key = RegistryKeys(dynamo_redis_prefix).meta
    master = await cluster.owner_of(key)
    replica = await cluster.replica_of(master)
    await put_until_taken(writer, "v1/before", b"1")
    master.server.send_signal(signal.SIGSTOP)
    try:
        await put_until_taken(writer, "v1/meanwhile", b"2")
        assert await replica.is_master()
    finally:
        master.server.send_signal(signal.SIGCONT)
    await put_until_taken(writer, "v1/after", b"3")
    await until(lambda: mirror.state == {"v1/before": b"1", "v1/meanwhile": b"2", "v1/after": b"3"})
    await cluster.wait_until_whole()
    assert await cluster.owner_of(key) is replica


@pytest.mark.parametrize("way", ["thread", "reads", "sending"])
async def test_a_dead_master_whose_port_takes_connections_is_left(
    cluster: EmbeddedCluster, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """As a proxy's does. Each way to a node has to find the replica without the others' help."""
    monkeypatch.setattr(topology, "REFRESH_S", 3600.0)
    client = ClusterClient(cluster.url, timeout_s=5.0)
    key = f"{{{way}}}"
    await client.execute("SET", key, "x")
    thread, reads, sending = client.sync(2.0, key=key), client.blocking(key), client.sending()
    script = Script.of("get", "return redis.call('GET', KEYS[1])")

    async def ask() -> Any:
        if way == "thread":
            return await asyncio.to_thread(thread.script, script, [key])
        if way == "reads":
            return await reads.execute(pack("GET", key), block_s=0.0)
        (answer,) = await sending.execute_each([(key, pack("GET", key))])
        if isinstance(answer, StoreError):
            raise answer
        return answer

    assert await ask() == b"x"
    master = await cluster.owner_of(key)
    await master.server.kill()
    closing = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", master.port)
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                assert await ask() == b"x"
            except StoreUnavailable:
                await asyncio.sleep(0.05)
            else:
                break
    closing.close()
    await closing.wait_closed()
    await reads.aclose()
    await sending.aclose()
    thread.close()
    await client.aclose()
    await master.server.start()
    await cluster.wait_until_whole()


async def test_planned_failover_of_the_registrys_master_loses_nothing(
    cluster: EmbeddedCluster, open_registry: OpenRegistry, dynamo_redis_prefix: str
) -> None:
    writer, reader = [await open_registry(cluster.url, ttl_s=5.0) for _ in range(2)]
    mirror = Mirror(reader, "v1/")
    key = RegistryKeys(dynamo_redis_prefix).meta
    replica = await cluster.replica_of(await cluster.owner_of(key))
    await put_until_taken(writer, "v1/before", b"1")
    await cluster.failover(replica)
    await put_until_taken(writer, "v1/after", b"2")
    await until(lambda: mirror.state == {"v1/before": b"1", "v1/after": b"2"})
    await cluster.wait_until_whole()


async def test_a_group_reads_on_at_the_replica(
    cluster: EmbeddedCluster, client: ClusterClient, dynamo_redis_prefix: str
) -> None:
    streams = RedisEventStreams(client, dynamo_redis_prefix, EventSettings())
    group = streams.group(STREAM, "router")
    await group.create()
    replica = await cluster.replica_of(await cluster.owner_of(StreamKeys(dynamo_redis_prefix, STREAM).events))
    read: set[bytes] = set()

    async def follow() -> None:
        while True:
            try:
                entries = await group.read(count=100, block_s=1.0)
            except StoreUnavailable:
                continue
            read.update(entry.content for entry in entries)

    following = asyncio.create_task(follow())
    sent: set[bytes] = set()
    failing = asyncio.create_task(cluster.failover(replica))
    async with asyncio.timeout(WAIT_S):
        while not failing.done() or len(sent) < 20:
            content = str(len(sent)).encode()
            try:
                await streams.append(STREAM, [NewEntry(content, 1)])
            except StoreUnavailable:
                await asyncio.sleep(0.02)
            else:
                sent.add(content)
    await failing
    await until(lambda: sent <= read or following.done())
    following.cancel()
    await asyncio.wait([following])
    await group.aclose()
    await cluster.wait_until_whole()


async def refusal(url: str) -> StoreError:
    client = open_client(url, timeout_s=2.0)
    try:
        await client.connect()
    except StoreError as exc:
        return exc
    finally:
        await client.aclose()
    raise AssertionError("it connects")


async def test_errors_name_the_cluster_and_the_remedy(own_redis_server: EmbeddedServer) -> None:
    absent = await refusal("redis+cluster://127.0.0.1:1,127.0.0.1:2")
    assert isinstance(absent, StoreUnavailable)
    assert "no node of the cluster 127.0.0.1:1,127.0.0.1:2 answers" in str(absent)
    single = await refusal(own_redis_server.url.replace("redis://", "redis+cluster://"))
    assert isinstance(single, StoreRefused)
    assert "is no cluster: write redis://" in str(single)
