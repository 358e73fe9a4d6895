"""Rules of the scripts and of repairs whose breach another mechanism would hide from users."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynamo_redis.errors import KeyExists, LeaseNotFound
from dynamo_redis.store.base import Compare, LeaseId, LostReason, PutOp
from dynamo_redis.store.keys import RegistryKeys
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.registry.change_log import Change
from dynamo_redis.store.registry.scripts_api import (
    CompareFailed,
    KeyValue,
    OtherIncarnation,
    OwnedDelete,
    OwnedPut,
    keep_alive,
    new_operation,
)

ME, OTHER = LeaseId(1), LeaseId(2)


@pytest.fixture
async def kv(dynamo_redis_url: str, dynamo_redis_prefix: str) -> AsyncIterator[KeyValue]:
    """A registry without ticks."""
    client = RedisClient(dynamo_redis_url, timeout_s=3.0)
    storage = KeyValue(client, RegistryKeys(dynamo_redis_prefix))
    await storage.initialize()
    yield storage
    await client.aclose()


async def _pass_time(kv: KeyValue, seconds: float) -> None:
    """Advance the service clock; reap no more than one call does, at the end."""
    meta = kv.keys.meta
    clock = int(await kv.client.execute("HGET", meta, "clock"))
    await kv.client.execute("HSET", meta, "clock", clock + round(seconds * 1000))


async def test_reads_hide_all_keys_of_an_ended_lease(kv: KeyValue) -> None:
    for n in range(200):
        await kv.write([OwnedPut(f"k/{n:03}", b"")], lease=LeaseId(n + 10), ttl_s=10)
    await kv.write([PutOp("k/free", b"")])
    await _pass_time(kv, 11)
    snapshot, _ = await kv.snapshot("k/")
    assert [record.key for record in snapshot.records] == ["k/free"]
    assert (await kv.tick()).overdue_count > 0, "the first calls have not reaped them all"
    assert (await kv.read([f"k/{n:03}" for n in range(200)])).records == {}


async def test_a_key_of_an_ended_lease_can_be_created_at_once(kv: KeyValue) -> None:
    for n in range(200):
        await kv.write([OwnedPut(f"k/{n:03}", b"old")], lease=LeaseId(n + 10), ttl_s=10)
    await _pass_time(kv, 11)
    for n in (199, 0, 100):
        written = await kv.write([PutOp(f"k/{n:03}", b"new")], compares=[Compare(f"k/{n:03}", None)])
        record = (await kv.read([f"k/{n:03}"])).records[f"k/{n:03}"]
        assert (record.version, record.create_revision, record.lease) == (1, written.revision, None)


async def test_a_lease_that_has_ended_is_not_revived(kv: KeyValue) -> None:
    position = await kv.initialize()
    await kv.write([OwnedPut("k", b"")], lease=ME, ttl_s=10)
    connection = kv.client.sync(3.0, key=kv.keys.meta)
    try:
        renewal = await asyncio.to_thread(keep_alive, connection, kv.keys, position.incarnation, ME, 10.0)
        written = await kv.position()
        assert written is not None
        assert renewal.last_write == f"{written.revision} {written.operation} "
        incarnation = position.incarnation
        await _pass_time(kv, 11)
        with pytest.raises(LeaseNotFound):
            await asyncio.to_thread(keep_alive, connection, kv.keys, incarnation, ME, 10.0)
        with pytest.raises(LeaseNotFound):
            await kv.write([OwnedPut("k", b"")], lease=ME)
        with pytest.raises(OtherIncarnation):
            await asyncio.to_thread(keep_alive, connection, kv.keys, "another", ME, 10.0)
    finally:
        connection.close()
    assert not (await kv.read([], ME)).alive
    assert await kv.client.execute("ZSCORE", kv.keys.structure("leases"), "1") is None


async def test_the_clock_does_not_follow_steps_of_the_server_s(kv: KeyValue) -> None:
    meta = kv.keys.meta
    before = int(await kv.client.execute("HGET", meta, "clock"))
    for step in (-3_600_000, 3_600_000):
        seen = int(await kv.client.execute("HGET", meta, "seen"))
        await kv.client.execute("HSET", meta, "seen", seen + step)
        await kv.tick()
    after = int(await kv.client.execute("HGET", meta, "clock"))
    assert 0 <= after - before <= 900, "a step counts for nothing, whichever way it goes"
    for _ in range(4):
        await asyncio.sleep(0.2)
        await kv.tick()
    assert int(await kv.client.execute("HGET", meta, "clock")) - after >= 200, "time passes by ticks"


async def test_a_failed_comparison_grants_no_lease(kv: KeyValue) -> None:
    await kv.write([PutOp("k", b"")])
    with pytest.raises(CompareFailed):
        await kv.write([OwnedPut("k", b"")], compares=[Compare("k", None)], lease=ME, ttl_s=10)
    assert not (await kv.read([], ME)).alive
    assert await kv.client.execute("EXISTS", kv.keys.lease(ME)) == 0


async def test_owned_operations_touch_nothing_of_others(kv: KeyValue) -> None:
    await kv.write([OwnedPut("theirs", b"v")], lease=OTHER, ttl_s=10)
    await kv.write([OwnedPut("mine", b"v")], lease=ME, ttl_s=10)
    written = await kv.write(
        [OwnedPut("theirs", b"w", owned=True), OwnedDelete("theirs"), OwnedPut("none", b"", owned=True)],
        lease=ME,
    )
    assert written.change_count == 0
    assert [record.value for record in (await kv.snapshot(""))[0].records] == [b"v", b"v"]


async def test_key_that_changes_its_lease_survives_the_old_one(kv: KeyValue) -> None:
    await kv.write([OwnedPut("k/1", b""), OwnedPut("k/2", b"")], lease=OTHER, ttl_s=10)
    await kv.write([OwnedPut("k/1", b"")], lease=ME, ttl_s=10)
    await kv.write([PutOp("k/2", b"")])
    await kv.revoke(OTHER)
    assert [record.key for record in (await kv.snapshot(""))[0].records] == ["k/1", "k/2"]
    await kv.revoke(ME)
    assert [record.key for record in (await kv.snapshot(""))[0].records] == ["k/2"]
    assert await kv.client.execute("ZCARD", kv.keys.structure("lk")) == 1, "its own mark"


async def test_repeated_operation_without_effect_is_evaluated_again(kv: KeyValue) -> None:
    operation = new_operation()
    await kv.write([PutOp("k", b"")])
    with pytest.raises(CompareFailed):
        await kv.write([PutOp("k", b"")], compares=[Compare("k", None)], operation=operation)
    assert (await kv.write([PutOp("j", b"1"), PutOp("k", b"1")], operation=operation)).change_count == 2


async def test_update_before_the_log_is_read_revives_no_deleted_key(
    dynamo_redis_url: str, open_registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, other = await open_registry(dynamo_redis_url), await open_registry(dynamo_redis_url)
    monkeypatch.setattr(worker._registrations, "note", lambda changes: None)
    lost: list[LostReason] = []
    registration = await worker.register("k", b"v", on_lost=lost.append)
    await other.delete("k")
    with pytest.raises(LeaseNotFound, match="deleted"):
        await registration.update(b"w")
    assert lost == ["deleted"]
    assert await other.get("k") is None


async def test_key_taken_and_deleted_by_another_owner_is_lost(
    dynamo_redis_url: str, open_registry: Any
) -> None:
    """After a lost tail a resync may miss the other owner's put; then the log has only its delete."""
    one, two = await open_registry(dynamo_redis_url), await open_registry(dynamo_redis_url)
    lost: list[LostReason] = []
    registration = await one.register("port", b"one", exclusive=True, on_lost=lost.append)
    revision = await two.put("later", b"")
    one._registrations.note([Change(revision, "d", "port", two.lease_id, "", (registration.revision, ""))])
    assert lost == ["conflict"]


async def test_restored_exclusive_key_overwrites_no_other_owner(
    dynamo_redis_url: str, dynamo_redis_prefix: str, open_registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = await open_registry(dynamo_redis_url), await open_registry(dynamo_redis_url)
    monkeypatch.setattr(one._registrations, "note", lambda changes: None)
    hold, restoring = asyncio.Event(), asyncio.Event()
    lost: list[LostReason] = []

    async def take_long() -> None:
        restoring.set()
        await hold.wait()

    await one.register("slow", b"", prepare=take_long)
    await one.register("port", b"one", exclusive=True, on_lost=lost.append)
    await two._client.execute("DEL", *RegistryKeys(dynamo_redis_prefix).structures)
    await asyncio.wait_for(restoring.wait(), 30)
    await two.register("port", b"two", exclusive=True)
    hold.set()
    async with asyncio.timeout(30):
        while not lost:
            await asyncio.sleep(0.01)
    assert lost == ["conflict"]
    assert (await two.get("port")).value == b"two"
    with pytest.raises(KeyExists):
        await one.register("port", b"one", exclusive=True)
