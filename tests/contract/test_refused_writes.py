"""Servers that answer reads and refuse writes: full, unable to save, a replica, without replicas."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from dynamo_redis.config import StoreSettings
from dynamo_redis.errors import ConfigError, StoreError
from dynamo_redis.store.base import DeleteOp, LeaseId, PutOp
from dynamo_redis.store.keys import RegistryKeys
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.registry.redis_registry import RedisRegistry
from dynamo_redis.store.registry.scripts_api import KeyValue, OwnedPut, keep_alive
from dynamo_redis.store.server import EmbeddedServer

from .conftest import SERVERS

TTL_S = 1.5
WAIT_S = 20.0
ME = LeaseId(7)


class Server:
    """A server of this test alone, which can be made to refuse writes."""

    def __init__(self, embedded: EmbeddedServer, directory: Path, name: str) -> None:
        self.name = name
        self.url = embedded.url
        self.client = RedisClient(embedded.url, timeout_s=5.0)
        self._directory = directory

    async def set(self, name: str, value: str | int) -> None:
        await self.client.execute("CONFIG", "SET", name, value)

    async def refuse(self, why: str) -> None:
        match why:
            case "full":
                await self.set("maxmemory", 1)
            case "replicas":
                await self.set("min-replicas-to-write", 1)
            case "replica":
                await self.client.execute("REPLICAOF", "127.0.0.1", 1)
            case "disk":
                await self.set("save", "3600 1")
                (self._directory / "dump.rdb").mkdir()
                await self._save("err")

    async def allow(self, why: str) -> None:
        match why:
            case "full":
                await self.set("maxmemory", 0)
            case "replicas":
                await self.set("min-replicas-to-write", 0)
            case "replica":
                await self.client.execute("REPLICAOF", "NO", "ONE")
            case "disk":
                (self._directory / "dump.rdb").rmdir()
                await self._save("ok")

    async def _save(self, status: str) -> None:
        async with asyncio.timeout(WAIT_S):
            while b"rdb_last_bgsave_status:%s" % status.encode() not in await self.client.execute(
                "INFO", "persistence"
            ):
                with contextlib.suppress(StoreError):
                    await self.client.execute("BGSAVE")
                await asyncio.sleep(0.1)


@pytest.fixture(params=SERVERS)
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Server]:
    directory = tmp_path / "data"
    directory.mkdir()
    try:
        binary = SERVERS[request.param]()
    except ConfigError as exc:
        pytest.skip(str(exc))
    settings = {"appendonly": "no"}
    async with EmbeddedServer(directory, port=0, binary=binary, settings=settings) as embedded:
        made = Server(embedded, directory, request.param)
        yield made
        await made.client.aclose()


@pytest.fixture
async def open_registry(server: Server) -> AsyncIterator[Callable[[], RedisRegistry]]:
    opened: list[RedisRegistry] = []

    def open_one() -> RedisRegistry:
        settings = StoreSettings.load(redis_url=server.url, lease_ttl_s=TTL_S, command_timeout_s=1.0)
        opened.append(RedisRegistry(settings))
        return opened[-1]

    yield open_one
    await asyncio.gather(*(registry.aclose() for registry in opened))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("why", ["full", "disk", "replica", "replicas"])
async def test_reading_goes_on_while_writes_are_refused(
    server: Server,
    open_registry: Callable[[], RedisRegistry],
    why: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "dynamo_redis.store.redis.health")
    worker, reader = open_registry(), open_registry()
    await worker.start()
    await reader.start()
    registration = await worker.register("i/worker", b"v")
    await worker.put("k/free", b"w")
    seen: list[object] = []

    async def follow() -> None:
        async for batch in reader.watch("i/"):
            assert batch.resync is None
            seen.extend(batch.events)

    following = asyncio.create_task(follow())
    await until(lambda: len(seen) == 1)
    await server.refuse(why)
    refused_at = time.monotonic()

    with pytest.raises(StoreError):
        await worker.put("k/other", b"x")
    with pytest.raises(StoreError):
        await registration.update(b"owed")
    await until(lambda: None not in (reader.write_refusal, worker.write_refusal))
    await until(lambda: reader.connected)  # a server that is demoted ends waiting reads
    assert "refuses writes" in repr(reader)
    while time.monotonic() < refused_at + 2.5 * TTL_S:
        assert (await worker.get("i/worker")) is not None
        assert [record.key for record in (await reader.get_prefix("")).records] == ["i/worker", "k/free"]
        await asyncio.sleep(0.1)
    warnings = [record for record in caplog.records if "; reads" in record.message]
    assert len(warnings) == 2, "one a process"
    assert "Commands that may modify" not in caplog.text, "its first sentence says it"
    newcomer = open_registry()
    await newcomer.start()
    assert len((await anext(newcomer.watch("i/"))).events) == 1
    assert newcomer.connected
    await newcomer.register("i/newcomer", b"v")
    await worker.register("i/more", b"v")
    with pytest.raises(StoreError):
        await worker.register("i/exclusive", b"v", exclusive=True)

    await server.allow(why)
    await until(lambda: len(seen) == 4)
    keys = [record.key for record in (await reader.get_prefix("i/")).records]
    assert keys == ["i/more", "i/newcomer", "i/worker"]
    assert newcomer.lease_losses == 0
    assert (await reader.get("i/worker")).value == b"owed"  # type: ignore[union-attr]
    await until(lambda: reader.write_refusal is None)
    assert worker.lease_losses == 0
    following.cancel()


async def test_another_reason_of_refusal_is_logged(
    server: Server, open_registry: Callable[[], RedisRegistry], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dynamo_redis.store.redis.health")
    registry = open_registry()
    await registry.start()
    await server.refuse("replicas")
    await until(lambda: "NOREPLICAS" in caplog.text)
    await server.refuse("replica")
    await until(lambda: "(READONLY" in caplog.text)
    await server.allow("replica")
    await server.allow("replicas")
    await until(lambda: "takes writes again" in caplog.text)
    assert registry.write_refusal is None


async def test_keys_not_yet_written_are_logged_once(
    server: Server, open_registry: Callable[[], RedisRegistry], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "dynamo_redis.store.registry.registrations")
    await KeyValue(server.client, RegistryKeys("dynamo")).initialize()
    await server.refuse("full")
    registry = open_registry()
    await registry.start()
    for number in range(4):
        await registry.register(f"i/{number}", b"v")

    def said(level: int) -> list[str]:
        records = [record for record in caplog.records if record.name.endswith("registrations")]
        return [record.getMessage() for record in records if record.levelno >= level]

    await until(lambda: sum(text.startswith("repair: ") for text in said(logging.DEBUG)) >= 4)
    assert [text.partition(" ")[0] for text in said(logging.INFO)] == ["i/0"]
    await server.allow("full")


async def test_renewals_do_not_hide_that_ticks_fail(
    server: Server, open_registry: Callable[[], RedisRegistry], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dynamo_redis.store.redis.health")
    registry = open_registry()
    await registry.start()
    await registry.register("i/worker", b"v")
    index = registry._kv.keys.structure("idx")
    await server.client.execute("SET", index, "no index")
    await until(lambda: registry.write_refusal is not None)
    lease = registry._kv.keys.lease(registry.lease_id)
    for _ in range(2):  # a renewal is seen by how the lease's time to live grows
        left_ms = await server.client.execute("PTTL", lease)
        async with asyncio.timeout(WAIT_S):
            while (now_left_ms := await server.client.execute("PTTL", lease)) <= left_ms:
                left_ms = now_left_ms
                await asyncio.sleep(0.02)
                assert registry.write_refusal is not None
    assert "takes writes again" not in caplog.text
    assert "reads, watches and requests go on" not in caplog.text
    await server.client.execute("DEL", index)
    await until(lambda: "takes writes again" in caplog.text)


@pytest.mark.parametrize("why", ["full"])
async def test_a_full_server_deletes_and_renews(server: Server, why: str) -> None:
    kv = KeyValue(server.client, RegistryKeys("full"))
    position = await kv.initialize()
    await kv.write([OwnedPut("own/1", b""), OwnedPut("own/2", b"")], lease=ME, ttl_s=10)
    await kv.write([PutOp("free", b"")])
    await server.refuse(why)
    assert (await kv.tick()).full
    connection = server.client.sync(3.0)
    try:
        renewal = await asyncio.to_thread(keep_alive, connection, kv.keys, position.incarnation, ME, 10.0)
    finally:
        connection.close()
    assert renewal.full
    with pytest.raises(StoreError):
        await kv.write([PutOp("more", b"")])
    assert (await kv.write([DeleteOp("free")])).change_count == 1
    await kv.revoke(ME)
    assert (await kv.snapshot(""))[0].records == ()
    assert not (await kv.read([], ME)).alive
    await server.allow(why)
    assert not (await kv.tick()).full


async def test_a_full_server_reaps_ended_leases(server: Server) -> None:
    kv = KeyValue(server.client, RegistryKeys("full"))
    await kv.initialize()
    await kv.write([OwnedPut("own", b"")], lease=ME, ttl_s=0.3)
    await server.refuse("full")
    async with asyncio.timeout(WAIT_S):
        while (await kv.tick()).lease_count:
            await asyncio.sleep(0.1)
    assert (await kv.snapshot(""))[0].records == ()


async def test_a_registry_lost_on_a_full_server_is_made_anew(server: Server) -> None:
    kv = KeyValue(server.client, RegistryKeys("full"))
    before = await kv.initialize()
    await server.refuse("full")
    await server.client.execute("DEL", kv.keys.structure("lk"))
    assert (await kv.initialize()).incarnation != before.incarnation
    assert (await kv.snapshot(""))[0].records == ()


async def test_a_lease_outlives_many_short_windows(
    server: Server, open_registry: Callable[[], RedisRegistry]
) -> None:
    worker, other = open_registry(), open_registry()
    for number, registry in enumerate((worker, other)):
        await registry.start()
        await registry.register(f"i/{number}", b"v")
    for _ in range(6):
        await server.refuse("replicas")
        await asyncio.sleep(1.0)
        await server.allow("replicas")
        await asyncio.sleep(0.1)
    await server.refuse("replicas")
    assert [len((await registry.get_prefix("i/")).records) for registry in (worker, other)] == [2, 2]
    await server.allow("replicas")
    assert (worker.lease_losses, other.lease_losses) == (0, 0)
