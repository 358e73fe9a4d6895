"""Bounds that hold for a registry of any size: of scripts, pages, watches and hints."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from dynamo_redis.store.base import LeaseId, Put, PutOp
from dynamo_redis.store.keys import RegistryKeys
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.redis.page_size import PAGE_BYTES
from dynamo_redis.store.registry.scripts_api import (
    KeyValue,
    Operation,
    OutcomeUnknown,
    OwnedPut,
    encode_write,
    keep_alive,
    new_operation,
    parse_written,
)

ME = LeaseId(1)
REAP_KEYS = 256


@pytest.fixture
async def kv(dynamo_redis_url: str, dynamo_redis_prefix: str) -> AsyncIterator[KeyValue]:
    """A registry without ticks."""
    client = RedisClient(dynamo_redis_url, timeout_s=60.0)
    storage = KeyValue(client, RegistryKeys(dynamo_redis_prefix))
    await storage.initialize()
    yield storage
    await client.aclose()


async def fill(kv: KeyValue, operations: list[Operation], **lease: Any) -> None:
    for start in range(0, len(operations), 500):
        await kv.write(operations[start : start + 500], **lease)


async def pass_time(kv: KeyValue, seconds: float) -> None:
    """Advance the service clock."""
    clock = int(await kv.client.execute("HGET", kv.keys.meta, "clock"))
    await kv.client.execute("HSET", kv.keys.meta, "clock", clock + round(seconds * 1000))


@pytest.fixture
def most_deletes(kv: KeyValue, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the number of log entries that each script call from here on has added."""
    lengths: list[int] = []
    script = kv.client.script

    async def counted(*arguments: Any) -> Any:
        before = await kv.client.execute("XLEN", kv.keys.log)
        answer = await script(*arguments)
        lengths.append(await kv.client.execute("XLEN", kv.keys.log) - before)
        return answer

    monkeypatch.setattr(kv.client, "script", counted)
    return lengths


async def count(kv: KeyValue, kind: bytes) -> int:
    entries = await kv.client.execute("XRANGE", kv.keys.log, "-", "+")
    return sum(fields[1] == kind for _, fields in entries)


async def test_lease_of_thousands_of_keys_is_revoked_in_bounded_calls(
    kv: KeyValue, most_deletes: list[int]
) -> None:
    await fill(kv, [OwnedPut(f"k/{n:04}", b"") for n in range(1500)], lease=ME, ttl_s=10)
    await kv.client.script(kv._REVOKE, (*kv.keys.structures, kv.keys.lease(ME)), ("", new_operation(), "1"))
    assert (await kv.snapshot(""))[0].records == (), "after the first call no read shows any"
    assert (await kv.read(["k/1499"])).records == {}
    await kv.revoke(ME)
    assert await count(kv, b"r") == 1500
    assert max(most_deletes[3:]) <= 2 * REAP_KEYS
    assert await kv.client.execute("ZCARD", kv.keys.structure("lk")) == 1
    assert await kv.client.execute("EXISTS", kv.keys.lease(ME)) == 0


async def test_new_grant_revives_no_key_of_the_ended_lease(kv: KeyValue, most_deletes: list[int]) -> None:
    await fill(kv, [OwnedPut(f"k/{n:04}", b"") for n in range(1500)], lease=ME, ttl_s=10)
    await pass_time(kv, 11)
    written = await kv.write([OwnedPut("k/0000", b"new")], lease=ME, ttl_s=10)
    assert written.granted
    assert [record.value for record in (await kv.snapshot(""))[0].records] == [b"new"]
    assert await count(kv, b"x") == 1500
    assert max(most_deletes[3:]) <= 2 * REAP_KEYS + 1


async def test_put_over_a_key_of_an_ended_lease_logs_its_end_first(kv: KeyValue) -> None:
    await fill(kv, [OwnedPut(f"k/{n:04}", b"") for n in range(600)], lease=ME, ttl_s=10)
    await pass_time(kv, 11)
    written = await kv.write([PutOp("k/0599", b"new")])
    entries = await kv.client.execute("XREVRANGE", kv.keys.log, written.revision, "-", "COUNT", 2)
    assert [(fields[1], fields[3]) for _, fields in entries] == [(b"p", b"k/0599"), (b"x", b"k/0599")]


async def test_repeated_write_searches_back_to_the_callers_last_entry(kv: KeyValue) -> None:
    await kv.write([PutOp("before", b"")])
    bottom, operation = kv._seen, new_operation()

    async def send_again(bottom: str) -> Any:
        args = encode_write("", operation, bottom, None, 0.0, (), [PutOp("k", b"v")])
        return parse_written([], await kv.client.script(kv.WRITE, kv.keys.structures, args))

    first = await kv.write([PutOp("k", b"v")], operation=operation)
    assert (await send_again(bottom)).revision == first.revision
    await fill(kv, [PutOp("other", b"") for _ in range(600)])
    assert (await send_again(bottom)).revision == first.revision
    await fill(kv, [PutOp("other", b"") for _ in range(600)])
    with pytest.raises(OutcomeUnknown):
        await send_again(bottom)
    record = (await kv.read(["k"])).records["k"]
    assert record.version == 1, "not made twice"
    operation = new_operation()
    assert (await send_again(kv._seen)).change_count == 1, "it certainly was not made before"


async def test_page_ends_at_its_limit_of_bytes(kv: KeyValue) -> None:
    value = b"v" * (PAGE_BYTES // 40)
    await fill(kv, [PutOp(f"k/{n:03}", value) for n in range(150)])
    answer = await kv._page("", "k/", b"")
    assert 40 <= (len(answer) - 4) // 2 <= 90
    snapshot, _ = await kv.snapshot("k/")
    assert [record.key for record in snapshot.records] == [f"k/{n:03}" for n in range(150)]


async def test_structure_of_another_registry_is_found_within_1_s(kv: KeyValue) -> None:
    before = await kv.initialize()
    await kv.client.execute("HSET", kv.keys.structure("lr"), "", "another")
    async with asyncio.timeout(30):
        while (await kv.position()) == before:
            await kv.tick()
            await asyncio.sleep(0.05)
    assert (await kv.initialize()).incarnation != before.incarnation


async def test_each_of_a_thousand_watches_sees_its_prefix(dynamo_redis_url: str, open_registry: Any) -> None:
    reader, writer = await open_registry(dynamo_redis_url), await open_registry(dynamo_redis_url)
    apart = [reader.watch(f"k/{n:03}/") for n in range(500)]
    together = [reader.watch("k/") for _ in range(500)]
    async with asyncio.timeout(20):
        for watch in (*apart, *together):
            assert (await anext(watch)).events == ()
        await writer.transact([], [PutOp(f"k/{n:03}/x", b"%d" % n) for n in range(500)])
        for n, watch in enumerate(apart):
            (event,) = (await anext(watch)).events
            assert isinstance(event, Put)
            assert (event.record.key, event.record.value) == (f"k/{n:03}/x", b"%d" % n)
        for watch in together:
            seen: list[object] = []
            while len(seen) < 500:
                seen += (await anext(watch)).events
            assert len(seen) == 500
    await reader.aclose()
    assert reader._reader.fanout.views == {}
    assert not reader._reader.fanout._lengths


async def test_few_survivors_notice_many_deaths_without_hints(
    dynamo_redis_url: str, open_registry: Any, mirror: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    survivor, victim = (
        await open_registry(dynamo_redis_url, ttl_s=1),
        await open_registry(dynamo_redis_url, ttl_s=1),
    )
    view = await mirror(survivor, "i/")
    await survivor.register("i/survivor", b"")
    await victim.register("i/victim", b"")
    await view.until(lambda: len(view.state) == 2)
    monkeypatch.setattr(survivor._reaper, "_follow_hint", lambda channel: asyncio.sleep(60))
    survivor._reaper._pace.lease_count = 10_000  # as if most had died at once
    survivor._reaper._pace._is_alone = False
    victim._registrations._held = False  # so that closing it does not revoke the lease
    await victim.aclose()
    began_at = time.monotonic()
    await view.until_state({"i/survivor": b""})
    assert time.monotonic() - began_at < 20


async def test_no_lease_is_lost_while_ten_thousand_keys_are_read(
    kv: KeyValue, record_property: Callable[[str, object], None]
) -> None:
    await fill(kv, [PutOp(f"k/{n:05}", b"v" * 300) for n in range(10_000)])
    await kv.write([OwnedPut("mine", b"")], lease=ME, ttl_s=6)
    incarnation = (await kv.initialize()).incarnation
    done = asyncio.Event()

    async def read() -> None:
        while not done.is_set():
            await kv.snapshot("k/")

    readers = [asyncio.create_task(read()) for _ in range(4)]
    connection, times_ms = kv.client.sync(60.0, key=kv.keys.meta), []
    try:
        for _ in range(30):
            began_at = time.monotonic()
            await asyncio.to_thread(keep_alive, connection, kv.keys, incarnation, ME, 6.0)
            times_ms.append(1000 * (time.monotonic() - began_at))
            await asyncio.sleep(0.01)
    finally:
        done.set()
        await asyncio.gather(*readers)
        connection.close()
    times_ms.sort()
    record_property("renewal_beside_snapshots_ms", {"median": times_ms[15], "worst": times_ms[-1]})
    assert (await kv.read([], ME)).alive
