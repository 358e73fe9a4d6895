"""A planned failover behind one address: a replica is promoted, the old primary lives on as its replica, and
the address (a DNS name, a service, a virtual IP) leads to the new one. Open connections stay with the old.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dynamo_redis.config import EventSettings, StoreSettings
from dynamo_redis.errors import StoreError
from dynamo_redis.store.event_base import NewEntry, StreamName
from dynamo_redis.store.locks.redis_locks import RedisLocks
from dynamo_redis.store.objects.redis_objects import RedisObjectStore
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.server import EmbeddedServer
from dynamo_redis.store.streams.redis_streams import RedisEventStreams
from faults.proxy import Proxy

WAIT_S = 20.0
STREAM = StreamName("dynamo", "backend", "kv_events")


@dataclass
class Pair:
    """Two servers, and the address that leads to one of them."""

    old: RedisClient
    new: RedisClient
    proxy: Proxy
    new_url: str

    @property
    def url(self) -> str:
        return self.proxy.url

    async def switch(self) -> None:
        """Promote the replica, make the old primary its replica, and let the address lead to the new one."""
        await self.new.execute("REPLICAOF", "NO", "ONE")
        await self.old.execute("REPLICAOF", "127.0.0.1", self.new_url.rpartition(":")[2])
        self.proxy.target = self.new_url

    async def in_sync(self) -> None:
        """Wait until the replica is in sync."""
        async with asyncio.timeout(WAIT_S):
            while True:
                offsets = [
                    _offset(await client.execute("INFO", "replication")) for client in (self.old, self.new)
                ]
                if offsets[0] == offsets[1]:
                    return
                await asyncio.sleep(0.02)


def _offset(info: bytes) -> bytes:
    (line,) = [line for line in info.splitlines() if line.startswith(b"master_repl_offset:")]
    return line


@pytest.fixture
async def pair(own_redis_server: EmbeddedServer, tmp_path: Path) -> AsyncIterator[Pair]:
    """A primary, its replica, in sync, and an address."""
    directory = tmp_path / "replica"
    directory.mkdir()
    settings = {"replicaof": ("127.0.0.1", own_redis_server.url.rpartition(":")[2])}
    async with (
        EmbeddedServer(directory, port=0, settings=settings) as replica,
        Proxy(own_redis_server.url) as proxy,
    ):
        old, new = (RedisClient(server.url, timeout_s=WAIT_S) for server in (own_redis_server, replica))
        async with asyncio.timeout(WAIT_S):
            while b"master_link_status:up" not in await new.execute("INFO", "replication"):
                await asyncio.sleep(0.05)
        yield Pair(old, new, proxy, replica.url)
        await old.aclose()
        await new.aclose()


async def works_again(call: Callable[[], Awaitable[Any]]) -> Any:
    """Repeat a call that may be refused while the address changes; return its answer."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                return await call()
            except StoreError:
                await asyncio.sleep(0.05)


async def test_the_registry_goes_on_at_the_new_primary(pair: Pair, open_registry: Any, mirror: Any) -> None:
    worker, watcher = await open_registry(pair.url, ttl_s=4.0), await open_registry(pair.url, ttl_s=4.0)
    registration = await worker.register("i/1", b"v")
    view = await mirror(watcher, "i/")
    await asyncio.gather(*(worker.put(f"x/{number}", b"v") for number in range(20)))  # several connections
    await pair.in_sync()
    await pair.switch()
    for number in range(20):
        await worker.put(f"x/{number}", b"w")  # not one is refused: it is tried again at the new primary
    await registration.update(b"w")
    await view.until_state({"i/1": b"w"})
    await watcher.put("i/2", b"v")
    await view.until_state({"i/1": b"w", "i/2": b"v"})
    await asyncio.sleep(4.5)  # longer than a TTL: the keepalive's connection is replaced as well
    assert worker.lease_losses == 0
    assert worker.connected
    assert watcher.connected
    assert view.state == {"i/1": b"w", "i/2": b"v"}


async def test_every_connection_leaves_the_demoted_server(pair: Pair, open_registry: Any) -> None:
    worker = await open_registry(pair.url, ttl_s=2.0)
    await worker.register("i/1", b"v")
    await pair.in_sync()
    await pair.switch()
    await worker.put("k", b"v")
    name = f"name=dynamo-redis:{worker.lease_id:x}".encode()
    async with asyncio.timeout(WAIT_S):
        while name in await pair.old.execute("CLIENT", "LIST"):
            await asyncio.sleep(0.05)


async def test_a_lock_is_kept_and_acquired_at_the_new_primary(pair: Pair, dynamo_redis_prefix: str) -> None:
    settings = StoreSettings.load(redis_url=pair.url, prefix=dynamo_redis_prefix)
    locks, others = RedisLocks.from_settings(settings), RedisLocks.from_settings(settings)
    async with locks.lock("a", ttl_s=3.0).hold() as held:
        await held.write(b"before")
        async with others.lock("b").hold():
            pass
        await pair.in_sync()
        await pair.switch()
        async with others.lock("b").hold():
            pass
        await held.write(b"after")
        await asyncio.sleep(3.5)  # longer than the TTL: it is renewed at the new primary
        assert not held.lost
    value = await others.lock("a").read()
    assert value is not None
    assert value.value == b"after"
    await locks.aclose()
    await others.aclose()


async def test_objects_are_written_at_the_new_primary(pair: Pair, dynamo_redis_prefix: str) -> None:
    settings = StoreSettings.load(redis_url=pair.url, prefix=dynamo_redis_prefix)
    objects = RedisObjectStore.from_settings(settings)
    await objects.put("bucket", "old", b"a" * 3_000_000)
    await pair.in_sync()
    await pair.switch()
    await works_again(lambda: objects.put("bucket", "new", b"b" * 3_000_000))
    assert b"".join([part async for part in objects.get("bucket", "new")]) == b"b" * 3_000_000
    assert await works_again(lambda: objects.remove("bucket", "old"))
    assert [info.name for info in await objects.list()] == ["new"]
    await objects.aclose()


async def test_event_streams_go_on_at_the_new_primary(pair: Pair, dynamo_redis_prefix: str) -> None:
    settings = StoreSettings.load(redis_url=pair.url, prefix=dynamo_redis_prefix)
    publisher, router = (RedisEventStreams.from_settings(settings, EventSettings.load()) for _ in range(2))
    group, tail = router.group(STREAM, "router"), router.tail(STREAM, max_age_s=60.0)
    topic = await router.subscribe(STREAM)
    await group.create()
    await publisher.append(STREAM, [NewEntry(b"1", 1)])
    assert [entry.content for entry in await group.read(count=9, block_s=1.0)] == [b"1"]
    assert [entry.content for entry in await tail.read(count=9, block_s=1.0)] == [b"1"]
    await pair.in_sync()
    await pair.switch()
    await works_again(lambda: publisher.append(STREAM, [NewEntry(b"2", 1)]))
    assert await _next(group.read) == b"2"
    assert await _next(tail.read) == b"2"
    with pytest.raises(StoreError, match="subscribe again"):
        await topic.next(WAIT_S)  # the gap is reported
    topic = await works_again(lambda: router.subscribe(STREAM))
    await works_again(lambda: publisher.publish(STREAM, b"message"))
    assert await topic.next(WAIT_S) == b"message"
    await topic.aclose()
    await tail.aclose()
    await group.aclose()
    await publisher.aclose()
    await router.aclose()


async def _next(read: Callable[..., Awaitable[Any]]) -> bytes:
    """Return the content of the next entry."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                entries = await read(count=1, block_s=0.2)
            except StoreError:
                continue
            if entries:
                content: bytes = entries[0].content
                return content
