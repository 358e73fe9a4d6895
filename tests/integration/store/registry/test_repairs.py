"""Owners and readers with lost answers, broken histories and concurrent changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynamo_redis.errors import Compacted, StoreUnavailable
from dynamo_redis.store.base import LostReason, Watch
from dynamo_redis.store.keys import RegistryKeys
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.registry.scripts_api import KeyValue, OwnedPut, new_operation
from faults.proxy import Conditions

WAIT_S = 30.0


@pytest.fixture
async def kv(dynamo_redis_url: str, dynamo_redis_prefix: str) -> AsyncIterator[KeyValue]:
    """The registry as another process reads it, which changes nothing."""
    client = RedisClient(dynamo_redis_url, timeout_s=3.0)
    yield KeyValue(client, RegistryKeys(dynamo_redis_prefix))
    await client.aclose()


async def until_keys(kv: KeyValue, keys: list[str]) -> None:
    """Wait until the registry has exactly these keys."""
    found: list[str] = []
    try:
        async with asyncio.timeout(WAIT_S):
            while found != keys:
                await asyncio.sleep(0.01)
                found = [record.key for record in (await kv.snapshot(""))[0].records]
    except TimeoutError:
        assert found == keys


def _lose(kv: KeyValue, lease: str, key: str, last_write: str) -> list[tuple[str, ...]]:
    """Return the commands that undo a key's registration without a log entry, as a failover that loses it."""
    return [
        ("HDEL", kv.keys.structure("kv"), key),
        ("ZREM", kv.keys.structure("idx"), key),
        ("ZREM", kv.keys.structure("lk"), f"{lease}\0{key}"),
        ("HSET", kv.keys.structure("lr"), lease, last_write),
    ]


async def test_a_write_made_before_the_repair_does_not_hide_a_lost_one(
    dynamo_redis_url: str, open_registry: Any, kv: KeyValue
) -> None:
    worker = await open_registry(dynamo_redis_url, ttl_s=30)
    lost: list[LostReason] = []
    await worker.register("a", b"v", on_lost=lost.append)
    lease = f"{worker.lease_id:x}"
    await kv.client.pipeline(_lose(kv, lease, "a", "1-1 0123456789abcdef "), transaction=True)
    await worker.register("b", b"v")
    await until_keys(kv, ["a", "b"])
    assert lost == []
    assert worker.lease_losses == 0


async def test_grant_by_a_write_of_unknown_outcome_is_a_new_lease(
    dynamo_redis_url: str, open_registry: Any, kv: KeyValue
) -> None:
    worker = await open_registry(dynamo_redis_url, ttl_s=30)
    lost: list[LostReason] = []
    await worker.register("a", b"v", on_lost=lost.append)
    registrations = worker._registrations
    async with registrations._serial:  # before the owner looks
        operation = new_operation()
        registrations._chain.begin(operation)
        registrations._chain.in_doubt(operation)
        await kv.revoke(worker.lease_id)
        await kv.write([OwnedPut("c", b"v")], lease=worker.lease_id, ttl_s=30, operation=operation)
    await until_keys(kv, ["a"])
    assert lost == []


async def test_lease_granted_at_the_second_attempt_is_kept(
    dynamo_redis_url: str, open_registry: Any, open_proxy: Any, kv: KeyValue
) -> None:
    proxy = await open_proxy(dynamo_redis_url)
    worker = await open_registry(proxy.url, ttl_s=1.0, timeout_s=3.0)
    # The server knows the script, and there are connections for ticks and to spare.
    await asyncio.gather(*(worker.delete("a") for _ in range(4)))
    proxy.conditions = Conditions(swallow_answers=True)
    registering = asyncio.create_task(worker.register("a", b"v"))
    await until_keys(kv, ["a"])
    async with asyncio.timeout(WAIT_S):
        while not proxy.has_swallowed:  # the write is done; its answer may still be on its way
            await asyncio.sleep(0.005)
    proxy.heal()
    await registering
    await asyncio.sleep(1.6)
    assert [record.key for record in (await kv.snapshot(""))[0].records] == ["a"]
    assert worker.lease_losses == 0


async def test_unregistered_key_does_not_return_with_its_lease(
    dynamo_redis_url: str, open_registry: Any, kv: KeyValue
) -> None:
    worker = await open_registry(dynamo_redis_url, ttl_s=1.0)
    await worker.register("kept", b"v")
    lease = f"{worker.lease_id:x}"
    # A stalled server runs the write of a registration that was given up long ago: the log shows it.
    await kv.write([OwnedPut("late", b"v")], lease=worker.lease_id)
    await until_keys(kv, ["kept"])
    # A failover has lost the delete: the log shows nothing, the owner's mark is older than it should be.
    packed = await kv.client.execute("HGET", kv.keys.structure("kv"), "kept")
    await kv.client.pipeline(
        [
            ("HSET", kv.keys.structure("kv"), "ghost", packed),
            ("ZADD", kv.keys.structure("idx"), 0, "ghost"),
            ("ZADD", kv.keys.structure("lk"), 0, f"{lease}\0ghost"),
            ("HSET", kv.keys.structure("lr"), lease, "1-1 0123456789abcdef "),
        ],
        transaction=True,
    )
    await until_keys(kv, ["kept"])
    assert worker.lease_losses == 0


async def test_watches_may_come_and_go_while_everything_is_read_again(
    dynamo_redis_url: str, open_registry: Any, mirror: Any, kv: KeyValue, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = await open_registry(dynamo_redis_url)
    await reader.register("a/1", b"v")
    view, going = await mirror(reader, "a/"), reader.watch("b/")
    await asyncio.wait_for(anext(going), WAIT_S)
    snapshot = reader._kv.snapshot
    coming: list[Watch] = []

    async def interrupted(prefix: str) -> Any:
        if not coming:
            coming.append(reader.watch("a/1"))
            await going.aclose()
        return await snapshot(prefix)

    monkeypatch.setattr(reader._kv, "snapshot", interrupted)
    await kv.client.execute("DEL", kv.keys.meta)
    await view.until(lambda: bool(view.resyncs))
    await view.until_state({"a/1": b"v"})
    assert (await asyncio.wait_for(anext(coming[0]), WAIT_S)).resync is None
    await reader.put("a/2", b"w")
    await view.until_state({"a/1": b"v", "a/2": b"w"})
    await coming[0].aclose()


async def test_revision_before_a_wipe_or_of_a_lost_tail_is_compacted(
    dynamo_redis_url: str, open_registry: Any, kv: KeyValue
) -> None:
    reader = await open_registry(dynamo_redis_url)
    first = await reader.put("a", b"1")
    lost = await reader.put("a", b"2")
    position = await kv.position()
    assert position is not None
    # As after a failover that lost the tail, in the log and in the head.
    entry = (await kv.client.execute("XRANGE", kv.keys.log, lost, lost))[0][1]
    await kv.client.pipeline(
        [
            ("XDEL", kv.keys.log, lost),
            ("HSET", kv.keys.meta, "rev", entry[15], "op", entry[17]),
        ],
        transaction=True,
    )
    await reader.put("b", b"1")
    with pytest.raises(Compacted):
        await asyncio.wait_for(anext(reader.watch("", start_revision=lost)), WAIT_S)
    watch = reader.watch("", start_revision=first)
    assert len((await asyncio.wait_for(anext(watch), WAIT_S)).events) == 1
    await watch.aclose()
    await kv.client.execute("DEL", *kv.keys.structures)
    await reader.put("b", b"1")
    with pytest.raises(Compacted):
        await asyncio.wait_for(anext(reader.watch("", start_revision=first)), WAIT_S)


async def test_a_subscription_that_died_silently_is_noticed(dynamo_redis_url: str, open_proxy: Any) -> None:
    proxy = await open_proxy(dynamo_redis_url)
    client = RedisClient(proxy.url, timeout_s=0.2)
    subscription = await client.subscribe("channel*")
    assert await subscription.next_message(0.05) is None
    assert await subscription.next_message(0.05) is None, "it says that it is alive"
    proxy.conditions = Conditions(swallow_answers=True)
    with pytest.raises(StoreUnavailable):
        await subscription.next_message(0.05)
    await client.aclose()


async def test_the_log_is_read_without_the_fast_parser_too(
    dynamo_redis_url: str, open_registry: Any, mirror: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo_redis.store.redis.blocking.HAS_HIREDIS", False)
    registry = await open_registry(dynamo_redis_url)
    view = await mirror(registry, "a/")
    await registry.put("a/1", b"v" * 100_000)
    await view.until_state({"a/1": b"v" * 100_000})
