"""The one ACL user of docs/security.md: enough rights for all stores on every kind of server, no more.

Whole deployments run under users with roles, in `tests/integration/cli/test_acl_roles.py`."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from importlib import resources
from pathlib import Path

import pytest

from dynamo_redis.config import EventSettings, StoreSettings
from dynamo_redis.errors import StoreError, StoreRefused
from dynamo_redis.store.event_base import NewEntry, StreamName
from dynamo_redis.store.locks.redis_locks import RedisLocks
from dynamo_redis.store.objects.redis_objects import RedisObjectStore
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.registry.redis_registry import RedisRegistry
from dynamo_redis.store.server import EmbeddedServer
from dynamo_redis.store.streams.redis_streams import RedisEventStreams
from faults.servers import installed_servers

KINDS = {kind.name: kind for kind in installed_servers()}
PASSWORD = "s3cret"

REFUSED = """
FLUSHALL
FLUSHDB
SWAPDB 0 1
MIGRATE 127.0.0.1 1 {dynamo}:kv 0 100
SCRIPT FLUSH
SCRIPT KILL
SCRIPT LOAD x
FUNCTION FLUSH
KEYS *
RANDOMKEY
DBSIZE
CONFIG GET requirepass
CONFIG SET save x
CONFIG RESETSTAT
ACL LIST
ACL SETUSER dyn allkeys
CLIENT LIST
CLIENT KILL TYPE normal
CLIENT PAUSE 1
MONITOR
SHUTDOWN NOSAVE
REPLICAOF 127.0.0.1 1
SAVE
BGREWRITEAOF
SELECT 1
MOVE {dynamo}:kv 1
RENAME {dynamo}:kv {dynamo}:x
RESTORE {dynamo}:x 0 x
PUBSUB CHANNELS
GET bank
SET bank 0
DEL bank
XADD bank * a b
PUBLISH bank x
PSUBSCRIBE *
SUBSCRIBE bank
"""
"""Commands that would harm another tenant of the server, or its operator."""


def rights(repository: Path) -> str:
    """The line of docs/security.md."""
    page = (repository / "docs" / "security.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith("ACL SETUSER dyn ")]
    return line


@pytest.fixture(params=sorted(KINDS))
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    """A server of each kind on this machine."""
    directory = tmp_path / "redis"
    directory.mkdir()
    async with EmbeddedServer(directory, port=0, binary=KINDS[request.param].binary) as running:
        yield running


@pytest.fixture
async def admin(server: EmbeddedServer, repository: Path) -> AsyncIterator[RedisClient]:
    """A client of the operator, which has made the user `dyn` and a key of another program."""
    client = RedisClient(server.url, timeout_s=10.0)
    await client.execute(*rights(repository).replace("PASSWORD", PASSWORD).split())
    await client.execute("SET", "bank", "100")
    await client.execute("HSET", "{dynamo}:kv", "k", "v")
    yield client
    await client.aclose()


@pytest.fixture
def url(server: EmbeddedServer) -> str:
    """The URL with the user's name and password."""
    return server.url.replace("redis://", f"redis://dyn:{PASSWORD}@")


def test_only_commands_are_granted_each_by_its_name(repository: Path) -> None:
    words = rights(repository).split()
    granted = {word[1:].upper() for word in words if word.startswith("+")}
    assert "-@all" in words
    assert not any(name.startswith("@") for name in granted)
    folder = resources.files("dynamo_redis.store") / "scripts"
    scripts = [file.read_text("utf-8") for file in folder.iterdir() if file.name.endswith(".lua")]
    called = {name for script in scripts for name in re.findall(r"\w\('([A-Z]{3,})'", script)}
    assert len(called) > 20
    assert called <= granted


async def test_harm_to_other_tenants_is_refused(admin: RedisClient, url: str) -> None:
    user = RedisClient(url, timeout_s=10.0)
    for command in REFUSED.strip().splitlines():
        with pytest.raises(StoreError) as error:
            await user.execute(*command.split())
        assert re.search("NOPERM|unknown command", str(error.value)), command
    for source, keys in (
        ("return redis.call('FLUSHALL')", ()),
        ("return redis.call('GET', KEYS[1])", ("bank",)),
        ("return redis.call('SET', 'bank', '0')", ("{dynamo}:kv",)),
        ("return redis.call('SWAPDB', '0', '1')", ("{dynamo}:kv",)),
    ):
        with pytest.raises(StoreRefused, match=r"docs/security\.md"):
            await user.execute("EVAL", source, len(keys), *keys)
    await user.aclose()
    assert await admin.execute("GET", "bank") == b"100"


async def test_all_stores_work_with_the_least_rights(admin: RedisClient, url: str, tmp_path: Path) -> None:
    await admin.execute("DEL", "{dynamo}:kv")
    await admin.execute("ACL", "LOG", "RESET")
    settings = StoreSettings.load(redis_url=url, prefix="dynamo", lease_ttl_s=2)
    await _keep_keys(settings)
    await _keep_objects(settings, tmp_path)
    await _hold_locks(settings)
    await _pass_events(RedisEventStreams.from_settings(settings, EventSettings.load()))
    entries = await admin.execute("ACL", "LOG", 1000)
    denied = {_denied(entry) for entry in entries}
    assert {name for name in denied if not name.startswith("config")} == set()


def _denied(entry: list[bytes | int]) -> str:
    """Return the command or key of an entry of ACL LOG, a flat list of names and values."""
    found = dict(zip(entry[::2], entry[1::2], strict=True))
    return bytes(found[b"object"]).decode().lower()


async def _keep_keys(settings: StoreSettings) -> None:
    """All operations of a registry, with an owner that dies."""
    worker, watcher = RedisRegistry(settings), RedisRegistry(settings)
    await worker.start()
    await watcher.start()
    registration = await worker.register("i/1", b"v")
    await registration.update(b"w")
    await worker.register("i/2", b"v", exclusive=True)
    revision = await watcher.put("k", b"v")
    assert await watcher.delete("k")
    async with watcher.watch("", start_revision=revision) as watch:
        await anext(watch)
    worker._registrations._held = False  # so that closing it does not revoke the lease
    await worker.aclose()
    async with asyncio.timeout(20):
        while (await watcher.get_prefix("i/")).records:
            await asyncio.sleep(0.05)
    await watcher.aclose()


async def _keep_objects(settings: StoreSettings, directory: Path) -> None:
    objects = RedisObjectStore.from_settings(settings)
    for content in (b"content" * 1000, b"other" * 500_000, b"other" * 500_000):
        await objects.put("bucket", "name", content)
    await objects.fetch("bucket", "name", directory / "fetched")
    assert [info.name for info in await objects.list()] == ["name"]
    assert await objects.remove("bucket", "name")
    await objects.aclose()


async def _hold_locks(settings: StoreSettings) -> None:
    locks = RedisLocks.from_settings(settings)
    lock = locks.lock("name", ttl_s=1.0)
    async with lock.hold() as held:
        await held.write(b"v")
        await asyncio.sleep(0.8)  # renewed
        assert await lock.holder() is not None
    assert await lock.read() is not None
    await locks.aclose()


async def _pass_events(streams: RedisEventStreams) -> None:
    """All operations of publishers, routers and the command line on event streams."""
    name = StreamName("dynamo", "backend", "test_events")
    group, tail = streams.group(name, "router"), streams.tail(name, max_age_s=60.0)
    await group.create()
    await streams.append(name, [NewEntry(b"x", 1)], max_age_s=60.0)
    (entry,) = await group.read(count=1, block_s=1.0)
    await group.acknowledge([entry.entry_id])
    assert await group.read(count=1, block_s=0.0) == []
    await group.seek(entry.entry_id)
    assert await tail.read(count=1, block_s=1.0) == [entry]
    assert await streams.trim(name, entry.entry_id) == entry.entry_id
    assert len(await streams.list()) == 1
    topic = await streams.subscribe(name)
    await streams.publish(name, b"message")
    assert await topic.next(5.0) == b"message"
    await topic.aclose()
    await tail.aclose()
    await group.aclose()
    assert await streams.delete(name)
    await streams.aclose()
