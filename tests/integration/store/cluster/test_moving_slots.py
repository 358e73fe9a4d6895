"""Slots of a cluster that move between masters while they are used."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from dynamo_redis.config import EventSettings
from dynamo_redis.store.base import Put
from dynamo_redis.store.cluster_server import ClusterNode, EmbeddedCluster
from dynamo_redis.store.event_base import NewEntry, StreamName
from dynamo_redis.store.keys import ObjectKeys, RegistryKeys, StreamKeys, inbox_key
from dynamo_redis.store.locks.redis_locks import RedisLocks
from dynamo_redis.store.objects.redis_objects import RedisObjectStore
from dynamo_redis.store.redis.blocking import pack
from dynamo_redis.store.redis.cluster.client import ClusterClient
from dynamo_redis.store.registry.erase import erase_prefix
from dynamo_redis.store.streams.redis_streams import RedisEventStreams
from tests.integration.store.cluster.conftest import WAIT_S, other_master, until
from tests.integration.store.conftest import OpenRegistry

STREAM = StreamName("test", "backend", "kv_events")
MOVES_COUNT = 3


@asynccontextmanager
async def half_moved(cluster: EmbeddedCluster, *keys: str) -> AsyncIterator[tuple[int, ClusterNode]]:
    """Move these keys, and not yet their slot; yield the slot and the node to which it moves."""
    slot = await cluster.slot_of(keys[0])
    target = await other_master(cluster, await cluster.owner(slot))
    source = await cluster.begin_move(slot, target)
    await cluster.move_some_keys(keys, source, target)
    yield slot, target
    await cluster.move_keys(slot, source, target)
    await cluster.end_move(slot, target)
    assert await cluster.owner(slot) is target


async def move_under_load(cluster: EmbeddedCluster, key: str, work: Callable[[int], Awaitable[None]]) -> int:
    """Move the slot of a key from master to master while calls of `work` follow each other; return their
    number."""
    done_count, is_over = 0, False

    async def work_on() -> None:
        nonlocal done_count
        while not is_over:
            await work(done_count)
            done_count += 1

    working = asyncio.create_task(work_on())
    slot = await cluster.slot_of(key)
    for _ in range(MOVES_COUNT):
        before = done_count
        await cluster.move_slot(slot, await other_master(cluster, await cluster.owner(slot)))
        await until(lambda before=before: done_count > before + 1 or working.done())  # type: ignore[misc]
    is_over = True
    await working
    return done_count


async def test_registry_moves_without_error_or_lost_event(
    cluster: EmbeddedCluster, open_registry: OpenRegistry, dynamo_redis_prefix: str
) -> None:
    writer, reader = [await open_registry(cluster.url, timeout_s=10.0) for _ in range(2)]
    seen: list[bytes] = []

    async def follow() -> None:
        async for batch in reader.watch("v1/"):
            assert not batch.resync or not seen, "the watch was not interrupted"
            seen.extend(event.record.value for event in batch.events if isinstance(event, Put))

    async def put(number: int) -> None:
        await writer.put("v1/key", str(number).encode())

    following = asyncio.create_task(follow())
    await put(0)
    await until(lambda: len(seen) > 0)
    seen.clear()
    count = await move_under_load(cluster, RegistryKeys(dynamo_redis_prefix).meta, put)
    await until(lambda: len(seen) >= count or following.done())
    following.cancel()
    assert seen == [str(number).encode() for number in range(count)]


async def test_stream_moves_without_lost_entry(
    cluster: EmbeddedCluster, client: ClusterClient, dynamo_redis_prefix: str
) -> None:
    streams = RedisEventStreams(client, dynamo_redis_prefix, EventSettings())
    group, tail = streams.group(STREAM, "router"), streams.tail(STREAM, max_age_s=60.0)
    await group.create()
    read: list[bytes] = []
    tailed: list[bytes] = []

    async def follow() -> None:
        while True:
            entries = await group.read(count=100, block_s=1.0)
            read.extend(entry.content for entry in entries)
            await group.acknowledge([entry.entry_id for entry in entries])

    async def follow_tail() -> None:
        while True:
            tailed.extend(entry.content for entry in await tail.read(count=100, block_s=1.0))

    async def append(number: int) -> None:
        await streams.append(STREAM, [NewEntry(str(number).encode(), 1)])

    following = [asyncio.create_task(follow()), asyncio.create_task(follow_tail())]
    count = await move_under_load(cluster, StreamKeys(dynamo_redis_prefix, STREAM).events, append)
    await until(lambda: min(len(read), len(tailed)) >= count or any(task.done() for task in following))
    assert not any(task.done() for task in following), "no read was interrupted"
    for task in following:
        task.cancel()
    await asyncio.wait(following)
    await group.aclose()
    await tail.aclose()
    assert read == tailed == [str(number).encode() for number in range(count)]


async def test_keys_of_a_half_moved_slot_are_found(cluster: EmbeddedCluster, client: ClusterClient) -> None:
    here, there, nowhere = "{half}:here", "{half}:there", "{half}:nowhere"
    for key in (here, there):
        await client.execute("SET", key, key)
    reads = client.blocking(there)
    async with half_moved(cluster, there):
        found = [await client.execute("GET", key) for key in (here, there, nowhere)]
        assert found == [here.encode(), there.encode(), None]
        assert await client.pipeline([("GET", there), ("GET", here)]) == [there.encode(), here.encode()]
        assert await client.pipeline([("APPEND", there, "!")], transaction=True) == [len(there) + 1]
        commands = [pack("GET", key) for key in (here, there, nowhere)]
        answers = await reads.execute_all(commands, block_s=0.0)
        assert answers == [here.encode(), there.encode() + b"!", None]
        sending = client.sending()
        written = await sending.execute_each([(key, pack("APPEND", key, "?")) for key in (here, there)])
        assert written == [len(here) + 1, len(there) + 2]
        await sending.aclose()
    assert await reads.execute(pack("GET", there), block_s=0.0) == there.encode() + b"!?"
    await reads.aclose()


async def test_scripts_wait_for_a_half_moved_slot(
    cluster: EmbeddedCluster, client: ClusterClient, open_registry: OpenRegistry, dynamo_redis_prefix: str
) -> None:
    """Some of a script's keys are at one node, some at the other: no node can run it."""
    registry = await open_registry(cluster.url, timeout_s=WAIT_S)
    async with half_moved(cluster, RegistryKeys(dynamo_redis_prefix).log):
        writing = asyncio.create_task(registry.put("v1/key", b"value"))
        done, _ = await asyncio.wait([writing], timeout=0.2)
        assert not done
    await writing
    record = await registry.get("v1/key")
    assert record is not None
    assert record.value == b"value"


async def test_objects_and_locks_move(
    cluster: EmbeddedCluster, client: ClusterClient, dynamo_redis_prefix: str
) -> None:
    objects = RedisObjectStore(client, dynamo_redis_prefix, chunk_bytes=100)
    locks = RedisLocks(client, dynamo_redis_prefix)

    async def replace(number: int) -> None:
        content = str(number).encode() * 300
        async with locks.object_lock("bucket", "name").hold(timeout_s=WAIT_S) as held:
            await objects.put("bucket", "name", content, fence=held)
        assert await objects.read("bucket", "name") == content

    await move_under_load(cluster, ObjectKeys(dynamo_redis_prefix, "bucket", "name").current, replace)
    assert [info.name for info in await objects.list()] == ["name"]


async def test_messages_reach_subscribers_at_all_nodes(
    cluster: EmbeddedCluster, client: ClusterClient, dynamo_redis_prefix: str
) -> None:
    streams = RedisEventStreams(client, dynamo_redis_prefix, EventSettings())
    topic = await streams.subscribe(STREAM)
    await streams.publish(STREAM, b"one")
    assert await topic.next(WAIT_S) == b"one"
    await topic.aclose()


async def test_inboxes_are_written_at_all_nodes(
    cluster: EmbeddedCluster, client: ClusterClient, dynamo_redis_prefix: str
) -> None:
    keys = [inbox_key(dynamo_redis_prefix, "requests", f"default.{number}") for number in range(20)]
    await client.pipeline([("XADD", key, "*", "f", "") for key in keys[:-1]])
    sending = client.sending()
    commands = [(key, pack("XADD", key, "NOMKSTREAM", "*", "f", "")) for key in keys]
    *answers, missing = await sending.execute_each(commands)
    assert all(isinstance(answer, bytes) for answer in answers)
    assert missing is None
    await sending.aclose()


async def test_a_prefix_is_scanned_and_erased_at_all_nodes(
    cluster: EmbeddedCluster, client: ClusterClient, dynamo_redis_prefix: str
) -> None:
    objects = RedisObjectStore(client, dynamo_redis_prefix)
    for number in range(20):
        await objects.put("bucket", str(number), b"content")
    assert len(await objects.list()) == 20
    assert await erase_prefix(cluster.url, dynamo_redis_prefix) >= 20 * 3 + 1, (
        "beside claims on chunks, which expire"
    )
    assert [key async for key in client.scan(f"{{{dynamo_redis_prefix}*")] == []


@pytest.mark.parametrize("name", ["GET", "get"])
async def test_a_client_finds_all_nodes_by_one(cluster: EmbeddedCluster, name: str) -> None:
    client = ClusterClient(f"redis+cluster://127.0.0.1:{cluster.nodes[-1].port}", timeout_s=5.0)
    await client.connect()
    for number in range(20):
        await client.execute("SET", f"{{found-{number}}}", number)
        assert await client.execute(name, f"{{found-{number}}}") == str(number).encode()
    await client.aclose()
