"""A process that watches nothing, where there are many processes: it reads no log, and misses nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from dynamo_redis.store.base import LostReason, Put
from dynamo_redis.store.event_base import StreamName
from dynamo_redis.store.keys import RegistryKeys
from dynamo_redis.store.redis import pool
from dynamo_redis.store.registry import log_reader, reaper
from dynamo_redis.store.registry.redis_registry import RedisRegistry

WAIT_S = 30.0


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a process rest beside any other."""
    monkeypatch.setattr(log_reader, "ALL_FOLLOW_COUNT", 0)
    monkeypatch.setattr(log_reader, "BLOCK_S", 0.1)
    monkeypatch.setattr(log_reader, "COMPARE_S", 0.1)
    monkeypatch.setattr(log_reader, "COMPARE_ANYWAY_S", 0.2)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.01)


async def connections(url: str, registry: RedisRegistry) -> list[str]:
    """Return the last command of each connection of a registry's process."""
    async with Redis.from_url(url) as redis:
        clients = await redis.client_list()
    return [each["cmd"] for each in clients if each["name"] == f"dynamo-redis:{registry.lease_id:x}"]


async def test_resting_process_reads_no_log(dynamo_redis_url: str, open_registry: Any) -> None:
    worker = await open_registry(dynamo_redis_url)
    await worker.register("a", b"v")
    await until(lambda: worker._reader.rests)
    assert not [command for command in await connections(dynamo_redis_url, worker) if "xread" in command]
    async with worker.watch("") as watch:
        await anext(aiter(watch))
        await until(lambda: not worker._reader.rests)
    await until(lambda: worker._reader.rests)  # once nothing is watched


async def test_process_follows_while_there_are_few(
    dynamo_redis_url: str, open_registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await open_registry(dynamo_redis_url)
    await worker.register("a", b"v")
    await until(lambda: worker._reader.rests)
    monkeypatch.setattr(log_reader, "ALL_FOLLOW_COUNT", 64)  # the next tick or renewal tells the number
    await until(lambda: not worker._reader.rests)


async def test_resting_process_finds_its_deleted_key(dynamo_redis_url: str, open_registry: Any) -> None:
    worker, other = await open_registry(dynamo_redis_url), await open_registry(dynamo_redis_url)
    lost: list[LostReason] = []
    await worker.register("a", b"v", on_lost=lost.append)
    await until(lambda: worker._reader.rests)
    await other.delete("a")
    await until(lambda: lost == ["deleted"])


async def test_resting_process_repairs_a_damaged_record(
    dynamo_redis_url: str, dynamo_redis_prefix: str, open_registry: Any
) -> None:
    worker, other = await open_registry(dynamo_redis_url), await open_registry(dynamo_redis_url)
    await worker.register("a", b"v")
    await until(lambda: worker._reader.rests)
    async with Redis.from_url(dynamo_redis_url) as redis:
        await redis.hset(RegistryKeys(dynamo_redis_prefix).structure("kv"), "a", "rubbish")
    async with asyncio.timeout(WAIT_S):
        while (await other.get_prefix("a")).invalid:
            await asyncio.sleep(0.01)
    record = await other.get("a")
    assert record is not None
    assert record.value == b"v"


async def test_resting_process_registers_again_after_a_wipe(
    dynamo_redis_url: str, dynamo_redis_prefix: str, open_registry: Any
) -> None:
    worker, other = await open_registry(dynamo_redis_url), await open_registry(dynamo_redis_url)
    await worker.register("a", b"v")
    await until(lambda: worker._reader.rests)
    async with Redis.from_url(dynamo_redis_url) as redis:
        await redis.delete(*RegistryKeys(dynamo_redis_prefix).structures)
    async with asyncio.timeout(WAIT_S):
        while await other.get("a") is None:
            await asyncio.sleep(0.01)


async def test_watch_that_ends_a_rest_misses_no_change(dynamo_redis_url: str, open_registry: Any) -> None:
    worker, other = await open_registry(dynamo_redis_url), await open_registry(dynamo_redis_url)
    await worker.register("a", b"v")
    for _ in range(5):
        await until(lambda: worker._reader.rests)
        seen: list[bytes] = []

        async def put_on() -> None:
            for number in range(50):
                await other.put("n", b"%d" % number)

        putting = asyncio.create_task(put_on())
        await asyncio.sleep(0)
        async with worker.watch("n") as watch, asyncio.timeout(WAIT_S):
            async for batch in watch:
                assert batch.resync is None
                seen += [event.record.value for event in batch.events if isinstance(event, Put)]
                if seen[-1:] == [b"49"]:
                    break
        await putting
        first = int(seen[0]) if seen else 0
        assert seen == [b"%d" % number for number in range(first, 50)]
        await other.delete("n")


async def test_resting_runtime_has_two_connections(
    dynamo_redis_url: str, dynamo_runtime_factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for commands of all parts of the store, and one for the lease's thread."""
    monkeypatch.setattr(pool, "IDLE_S", 0.5)
    monkeypatch.setattr(reaper, "LISTENERS_COUNT", 0)
    runtime = await dynamo_runtime_factory()

    async def serve(request: Any) -> Any:
        yield request

    await runtime.endpoint("test.backend.generate").start_serving(serve)
    await asyncio.gather(*(runtime.objects.list() for _ in range(8)))
    await runtime.events.publish(StreamName("test", "backend", "load"), b"")
    async with asyncio.timeout(WAIT_S):
        while len(await connections(dynamo_redis_url, runtime.registry)) > 2:
            await asyncio.sleep(0.05)
    assert runtime.registry._reader.rests
