"""Damage by hand to the registry's structures: only the damaged value is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgpack
import pytest

from dynamo_redis.errors import InvalidRecord, KeyExists, StoreError, StoreRefused
from dynamo_redis.store.base import LostReason
from dynamo_redis.store.keys import STRUCTURES, RegistryKeys
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.registry.redis_registry import RedisRegistry
from dynamo_redis.store.server import EmbeddedServer
from tests.rubbish import WORST_MSGPACK

from .conftest import Mirror, OpenRegistry

NEW = "new"
BROKEN = [value for value in WORST_MSGPACK.values() if value]


class Hand:
    """A client for changes by hand."""

    def __init__(self, client: RedisClient, prefix: str) -> None:
        self.client = client
        self.keys = RegistryKeys(prefix)

    async def damage(self, key: str, value: bytes) -> None:
        await self.client.execute("HSET", self.keys.structure("kv"), key, value)

    async def add(self, key: str, value: bytes) -> None:
        await self.damage(key, value)
        await self.client.execute("ZADD", self.keys.structure("idx"), 0, key)


@pytest.fixture
async def hand(dynamo_redis_url: str, dynamo_redis_prefix: str) -> AsyncIterator[Hand]:
    client = RedisClient(dynamo_redis_url, timeout_s=10.0)
    yield Hand(client, dynamo_redis_prefix)
    await client.aclose()


Watching = Callable[[RedisRegistry, str], Awaitable[Mirror]]


@pytest.mark.parametrize("value", BROKEN, ids=[name for name, value in WORST_MSGPACK.items() if value])
async def test_damaged_record_costs_only_itself(
    dynamo_redis_url: str, open_registry: OpenRegistry, hand: Hand, value: bytes, mirror: Watching
) -> None:
    registry = await open_registry(dynamo_redis_url)
    await registry.put("good", b"v")
    await registry.put("bad", b"v")
    await hand.damage("bad", value)
    await hand.add("strange", value)

    snapshot = await registry.get_prefix("")
    assert [record.key for record in snapshot.records] == ["good"]
    assert [exc.key for exc in snapshot.invalid] == ["bad", "strange"]
    with pytest.raises(InvalidRecord, match=r"^bad is not a record of the registry: .*dynamo-redis del bad"):
        await registry.get("bad")
    watched = await mirror(registry, "")
    await watched.until_state({"good": b"v"})
    await registry.put("good", b"w")
    await registry.put("bad", b"mended")
    assert await registry.delete("strange")
    await watched.until_state({"good": b"w", "bad": b"mended"})
    assert not (await registry.get_prefix("")).invalid


async def test_damaged_record_counts_as_absent_for_writes(
    dynamo_redis_url: str, open_registry: OpenRegistry, hand: Hand
) -> None:
    registry = await open_registry(dynamo_redis_url)
    await registry.put("a", b"v")
    await hand.damage("a", b"{}")
    await registry.create("a", b"again")
    record = await registry.get("a")
    assert record is not None
    assert (record.value, record.version) == (b"again", 1)
    with pytest.raises(KeyExists):
        await registry.create("a", b"twice")
    await hand.damage("a", b"{}")
    await registry.compare_and_put("a", b"third", None)
    await hand.damage("a", b"{}")
    with pytest.raises(StoreError, match="found none"):
        await registry.compare_and_put("a", b"fourth", record.mod_revision)


async def test_owner_writes_a_damaged_record_again(
    dynamo_redis_url: str, open_registry: OpenRegistry, hand: Hand, mirror: Watching
) -> None:
    owner, other = await open_registry(dynamo_redis_url), await open_registry(dynamo_redis_url)
    lost: list[LostReason] = []
    await owner.register("mine", b"v", on_lost=lost.append)
    watched = await mirror(other, "")
    await hand.damage("mine", b"{}")
    assert await other.delete("mine"), "as the message says"
    await watched.until(lambda: len(watched.batches) >= 3)
    await watched.until_state({"mine": b"v"})
    await hand.damage("mine", b"{}")
    await hand.client.execute("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    async with asyncio.timeout(30):
        while (await other.get_prefix("")).invalid:
            await asyncio.sleep(0.02)
    assert [record.value for record in (await other.get_prefix("")).records] == [b"v"]
    assert not lost


async def test_damaged_key_ends_with_its_lease(
    dynamo_redis_url: str, open_registry: OpenRegistry, hand: Hand
) -> None:
    owner, other = await open_registry(dynamo_redis_url), await open_registry(dynamo_redis_url)
    registration = await owner.register("mine", b"v")
    await owner.register("more", b"v")
    await hand.damage("mine", b"{}")
    await registration.update(b"w")
    record = await other.get("mine")
    assert record is not None
    assert (record.value, record.lease) == (b"w", owner.lease_id)
    await hand.damage("mine", b"{}")
    await owner.aclose()
    async with asyncio.timeout(30):
        while (found := await other.get_prefix("")).records or found.invalid:
            await asyncio.sleep(0.02)


async def test_last_good_record_stays_over_a_resync(
    dynamo_redis_url: str, open_registry: OpenRegistry, hand: Hand, mirror: Watching
) -> None:
    registry = await open_registry(dynamo_redis_url)
    await registry.put("a", b"v")
    await registry.put("b", b"v")
    watched = await mirror(registry, "")
    await hand.damage("a", b"{}")
    await hand.client.pipeline(
        [
            ("HDEL", hand.keys.structure("kv"), "b"),
            ("ZREM", hand.keys.structure("idx"), "b"),
            ("HSET", hand.keys.meta, "op", "0" * 16),  # history is not what the reader has seen
        ],
        transaction=True,
    )
    await watched.until(lambda: bool(watched.resyncs))
    await watched.until_state({"a": b"v"})


async def test_foreign_log_entries_cost_no_resync(
    dynamo_redis_url: str, open_registry: OpenRegistry, hand: Hand, mirror: Watching
) -> None:
    registry = await open_registry(dynamo_redis_url)
    await registry.put("a", b"v")
    watched = await mirror(registry, "")
    for fields in (("foreign", "entry"), ("o", "p"), ("o", b"\xff", "k", b"\xff"), ("k", "a" * 100_000)):
        await hand.client.execute("XADD", hand.keys.log, "*", *fields)
        await registry.put(NEW, str(fields[0]).encode())
        await watched.until_state({"a": b"v", NEW: str(fields[0]).encode()})
    assert not watched.resyncs


async def test_forged_log_entry_is_left_behind(
    dynamo_redis_url: str, open_registry: OpenRegistry, hand: Hand, mirror: Watching
) -> None:
    registry = await open_registry(dynamo_redis_url)
    watched = await mirror(registry, "")
    forged = {"o": "p", "k": "a", "v": "x", "l": "", "c": "", "n": "1", "w": "0" * 16, "p": "1-1", "q": "y"}
    await hand.client.execute("XADD", hand.keys.log, "*", *(part for pair in forged.items() for part in pair))
    await registry.put(NEW, b"v")
    await watched.until_state({NEW: b"v"})


async def test_rubbish_in_other_structures_stops_nothing(
    dynamo_redis_url: str, open_registry: OpenRegistry, hand: Hand, mirror: Watching
) -> None:
    owner, other = await open_registry(dynamo_redis_url), await open_registry(dynamo_redis_url)
    await owner.register("mine", b"v")
    watched = await mirror(other, "")
    lease = f"{owner.lease_id:x}"
    kv, idx, leases, lk, lr = (hand.keys.structure(name) for name in ("kv", "idx", "leases", "lk", "lr"))
    commands: list[tuple[Any, ...]] = [
        ("ZADD", leases, 1, "no lease"),
        ("ZADD", leases, 1, b"\xff\xfe"),
        ("ZADD", leases, "-inf", "f" * 40),
        ("ZADD", lk, 0, "no lease\0key"),
        ("ZADD", lk, 0, "neither"),
        ("ZADD", lk, 0, f"{lease}\0".encode() + b"\xff\xfe"),
        ("HSET", lr, lease, "rubbish"),
        ("ZADD", idx, 0, b"no \xc3 text"),
        ("ZADD", idx, 0, "without a record"),
        ("HSET", kv, b"no \xc3 text", msgpack.packb([1])),
    ]
    await hand.client.pipeline(commands)
    await hand.client.execute("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    await other.put(NEW, b"v")
    await watched.until_state({"mine": b"v", NEW: b"v"})
    await owner.register("second", b"v")
    await watched.until_state({"mine": b"v", NEW: b"v", "second": b"v"})


@pytest.mark.parametrize("structure", STRUCTURES)
async def test_structure_of_a_wrong_type_is_named(
    own_redis_server: EmbeddedServer,
    open_registry: OpenRegistry,
    dynamo_redis_prefix: str,
    structure: str,
    mirror: Watching,
) -> None:
    owner = await open_registry(own_redis_server.url)
    await owner.register("mine", b"v")
    watched = await mirror(owner, "")
    await watched.until_state({"mine": b"v"})
    client = RedisClient(own_redis_server.url, timeout_s=10.0)
    key = RegistryKeys(dynamo_redis_prefix).structure(structure)
    try:
        await client.execute("SET", key, "a string")
        with pytest.raises(StoreRefused) as raised:
            await owner.register(NEW, b"v")
        assert f"{key} is a string and should be a " in str(raised.value)
        assert f"`redis-cli DEL '{key}'` mends it" in str(raised.value)
        await client.execute("DEL", key)
    finally:
        await client.aclose()
    await watched.until_state({"mine": b"v"})
    async with asyncio.timeout(30):
        while True:
            try:
                await owner.register(NEW, b"v")
                break
            except StoreRefused:
                await asyncio.sleep(0.05)
    await watched.until_state({"mine": b"v", NEW: b"v"})
