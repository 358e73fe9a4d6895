"""R5 and R6: the cost of 10,000 leases, and the time until the registry shows that a tenth of them has died.

R5  Redis's CPU time (INFO cpu) over `WINDOW_S` of a settled deployment: keepalives by a few drivers, ticks at
    the rate that 10,000 processes have together, and `WATCHERS` whole registries, each with its lease and its
    watch of all instances. Expiry notifications are on, and clients listen to them.
R6  The time from the moment at which the drivers drop 1,000 leases, plus the TTL, until one of those
registries
    has seen the last of their keys go.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import uvloop

from benchmarks.harness.processes import redis_server
from benchmarks.harness.report import Measured
from benchmarks.registry.lease_drivers import SETTLE_S, TTL_S, LeaseDrivers, Ticker, lease_drivers
from benchmarks.registry.population import ENDPOINT, INSTANCES, PREFIX
from dynamo_redis.config import StoreSettings
from dynamo_redis.store.base import Put
from dynamo_redis.store.keys import RegistryKeys
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.registry.reaper import FLAGS
from dynamo_redis.store.registry.redis_registry import RedisRegistry

WATCHERS = 8
WINDOW_S = 20.0
DEATHS = 1000
PATIENCE_S = 30.0


def idle_leases(rounds: int) -> dict[str, Measured]:
    """Measure R5, in % of a core."""
    with redis_server() as server, lease_drivers(server.url, INSTANCES):
        return {"R5": Measured.alone(uvloop.run(_idle(server.url, rounds)))}


async def _idle(redis_url: str, rounds: int) -> list[float]:
    figures = []
    async with _rest_of_deployment(redis_url) as (client, view):
        for number in range(rounds):
            before, began = await _cpu_s(client), time.monotonic()
            await asyncio.sleep(WINDOW_S)
            figures.append(100 * (await _cpu_s(client) - before) / (time.monotonic() - began))
            print(f"R5 round {number + 1}: {figures[-1]:.1f} % of a core", flush=True)
            if len(view.keys) < INSTANCES:
                raise RuntimeError(f"{INSTANCES - len(view.keys)} leases ended though they were kept")
    return figures


def deaths(rounds: int) -> dict[str, Measured]:
    """Measure R6, in s."""
    with redis_server() as server, lease_drivers(server.url, INSTANCES) as drivers:
        return {"R6": Measured.alone(uvloop.run(_deaths(server.url, drivers, rounds)))}


async def _deaths(redis_url: str, drivers: LeaseDrivers, rounds: int) -> list[float]:
    figures = []
    async with _rest_of_deployment(redis_url) as (_, view):
        for number in range(rounds):
            died_at = await asyncio.to_thread(drivers.kill, DEATHS)
            gone_at = await view.until(INSTANCES - DEATHS)
            figures.append(gone_at - died_at - TTL_S)
            print(f"R6 round {number + 1}: the last key went {figures[-1]:.2f} s after the TTL", flush=True)
            await asyncio.to_thread(drivers.revive)
            await view.until(INSTANCES)
            await asyncio.sleep(SETTLE_S)
    return figures


async def _cpu_s(client: RedisClient) -> float:
    """Return the CPU time of the server and its children (which rewrite the append-only file), in seconds."""
    lines = (await client.execute("INFO", "cpu")).decode().split()
    fields = dict(line.split(":") for line in lines if ":" in line)
    names = ("used_cpu_sys", "used_cpu_user", "used_cpu_sys_children", "used_cpu_user_children")
    return sum(float(fields[name]) for name in names)


class View:
    """The instances that one registry's watch shows, and the time of the last change."""

    def __init__(self, registry: RedisRegistry) -> None:
        self.keys: set[str] = set()
        self._changed = asyncio.Event()
        self._changed_at = 0.0
        self._watch = registry.watch(ENDPOINT.instances_prefix)
        self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        async for batch in self._watch:
            for event in batch.events:
                if isinstance(event, Put):
                    self.keys.add(event.record.key)
                else:
                    self.keys.discard(event.key)
            self._changed_at = time.monotonic()
            self._changed.set()

    async def until(self, count: int) -> float:
        """Wait until `count` instances are there, and return the time at which that was so (monotonic)."""
        async with asyncio.timeout(PATIENCE_S):
            while len(self.keys) != count:
                self._changed.clear()
                await self._changed.wait()
        return self._changed_at

    async def aclose(self) -> None:
        """End the watch."""
        await self._watch.aclose()
        await self._task


@asynccontextmanager
async def _rest_of_deployment(redis_url: str) -> AsyncIterator[tuple[RedisClient, View]]:
    """Run the watching registries and the ticks; yield a client, and the first registry's view."""
    settings = StoreSettings.load(redis_url=redis_url, prefix=PREFIX, lease_ttl_s=TTL_S)
    async with AsyncExitStack() as stack:
        client = RedisClient(redis_url, timeout_s=3, client_name="benchmark")
        stack.push_async_callback(client.aclose)
        await client.execute("CONFIG", "SET", "notify-keyspace-events", FLAGS)
        subscription = await client.subscribe(RegistryKeys(PREFIX).lease_channel)
        stack.push_async_callback(subscription.aclose)
        ticker = Ticker(client)
        stack.push_async_callback(ticker.aclose)
        views = []
        for number in range(WATCHERS):
            registry = RedisRegistry(settings)
            await registry.start()
            stack.push_async_callback(registry.aclose)
            await registry.register(f"v1/processes/{number}", b"{}")
            views.append(View(registry))
            stack.push_async_callback(views[-1].aclose)
        await views[0].until(INSTANCES)
        await asyncio.sleep(SETTLE_S)
        yield client, views[0]
