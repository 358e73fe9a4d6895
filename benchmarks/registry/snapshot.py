"""R3 and R4: the cost of a registry of 10,000 instances for a new process, in time and in memory.

R3  In a fresh process each round: from `watch` on a started registry to its first state, and, in turn, the
    same keys and records read from a stream with redis-py, raw, a page of as many entries at a time.
R4  The resident memory of a fresh process with a client of the endpoint, as a frontend has it, once on the
    10,000 and once on an empty endpoint.
"""

from __future__ import annotations

import asyncio
import gc
import time
from typing import Any

import psutil
import redis.asyncio
import uvloop

from benchmarks.harness.processes import in_fresh_process, redis_server
from benchmarks.harness.report import Measured
from benchmarks.registry.population import ENDPOINT, INSTANCES, PREFIX, key_of, leases, populate, record_of
from dynamo_redis.config import StoreSettings
from dynamo_redis.runtime import DistributedRuntime, Settings
from dynamo_redis.store.registry.redis_registry import RedisRegistry

FLOOR_STREAM = "bench:floor"
PAGE_ENTRIES = 1000
LONG_TTL_S = 3600.0
"""TTL of leases without keepalives, in seconds. None may end."""


def snapshots(rounds: int) -> dict[str, Measured]:
    """Measure R3, in ms."""
    ours: list[float] = []
    floor: list[float] = []
    with redis_server() as server:
        uvloop.run(_fill(server.url))
        for number in range(rounds):
            one, other = in_fresh_process(_snapshot_and_floor, server.url, number % 2 == 1)
            ours.append(one)
            floor.append(other)
            print(f"R3 round {number + 1}: {one:.0f} ms, the floor {other:.0f} ms", flush=True)
    return {"R3": Measured.against(ours, floor)}


async def _fill(redis_url: str) -> None:
    ids = leases()
    await populate(redis_url, ids, LONG_TTL_S)
    async with _raw_client(redis_url) as client:
        for begin in range(0, len(ids), PAGE_ENTRIES):
            pipe = client.pipeline(transaction=False)
            for lease in ids[begin : begin + PAGE_ENTRIES]:
                pipe.execute_command("XADD", FLOOR_STREAM, "*", "k", key_of(lease), "v", record_of(lease))
            await pipe.execute()


def _raw_client(redis_url: str) -> Any:
    client = redis.asyncio.Redis.from_url(redis_url, protocol=2)
    client.response_callbacks.clear()
    return client


def _snapshot_and_floor(redis_url: str, floor_first: bool) -> tuple[float, float]:
    async def both() -> tuple[float, float]:
        if floor_first:
            floor = await _time_floor(redis_url)
            return await _time_snapshot(redis_url), floor
        return await _time_snapshot(redis_url), await _time_floor(redis_url)

    return uvloop.run(both())


async def _time_snapshot(redis_url: str) -> float:
    registry = RedisRegistry(StoreSettings.load(redis_url=redis_url, prefix=PREFIX))
    await registry.start()
    try:
        began = time.perf_counter()
        seen = 0
        async with registry.watch(ENDPOINT.instances_prefix) as watch:
            while seen < INSTANCES:
                seen += len((await anext(aiter(watch))).events)
        return 1e3 * (time.perf_counter() - began)
    finally:
        await registry.aclose()


async def _time_floor(redis_url: str) -> float:
    async with _raw_client(redis_url) as client:
        await client.execute_command("PING")
        began = time.perf_counter()
        seen, after = 0, b"0"
        while seen < INSTANCES:
            reply = await client.execute_command(
                "XREAD", "COUNT", PAGE_ENTRIES, "STREAMS", FLOOR_STREAM, after
            )
            entries = reply[0][1]
            seen, after = seen + len(entries), entries[-1][0]
        return 1e3 * (time.perf_counter() - began)


def memory(rounds: int) -> dict[str, Measured]:
    """Measure R4, in MB."""
    figures: list[float] = []
    with redis_server() as server:
        uvloop.run(populate(server.url, leases(), LONG_TTL_S))
        for number in range(rounds):
            full = in_fresh_process(_resident_bytes, server.url, str(ENDPOINT), INSTANCES)
            empty = in_fresh_process(_resident_bytes, server.url, "dynamo.empty.generate", 0)
            figures.append((full - empty) / 1e6)
            print(
                f"R4 round {number + 1}: {full / 1e6:.1f} - {empty / 1e6:.1f} = {figures[-1]:.1f} MB",
                flush=True,
            )
    return {"R4": Measured.alone(figures)}


def _resident_bytes(redis_url: str, endpoint: str, instances: int) -> int:
    async def hold() -> int:
        settings = Settings.load(redis_url=redis_url, prefix=PREFIX)
        async with DistributedRuntime(settings=settings) as runtime:
            client = await runtime.endpoint(endpoint).client()
            while len(client.instance_ids()) < instances:
                await asyncio.sleep(0.01)
            gc.collect()
            return int(psutil.Process().memory_info().rss)

    return uvloop.run(hold())
