"""The rate of retries of a process that a server refuses, and its number of connections."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.server import EmbeddedServer

REFUSALS_COUNT = 60
REFUSE = {
    "replicas": ("CONFIG", "SET", "min-replicas-to-write", "1"),
    "replica": ("REPLICAOF", "127.0.0.1", "1"),
}


async def _number(admin: RedisClient, section: str, pattern: str) -> int:
    """Return a number from INFO; 0 if it is absent."""
    found = re.search(pattern, (await admin.execute("INFO", section)).decode())
    return int(found[1]) if found else 0


@pytest.mark.parametrize(("why", "share"), [("replicas", 0.5), ("replica", 1.0)], ids=["replicas", "replica"])
async def test_refused_process_keeps_its_connections(
    own_redis_server: EmbeddedServer, open_registry: Any, why: str, share: float
) -> None:
    """A process at the wrong server reconnects about once a second, not at each refusal."""
    registry = await open_registry(own_redis_server.url, ttl_s=2.0)
    await registry.register("i/1", b"v")
    admin = RedisClient(own_redis_server.url, timeout_s=20.0)
    await admin.execute(*REFUSE[why])

    async def refused() -> int:
        return await _number(admin, "commandstats", r"cmdstat_evalsha:.*failed_calls=(\d+)")

    async def connections() -> int:
        return await _number(admin, "stats", r"total_connections_received:(\d+)")

    refused_before, connections_before = await refused(), await connections()
    async with asyncio.timeout(60):
        while (refused_count := await refused() - refused_before) < REFUSALS_COUNT:
            await asyncio.sleep(0.1)
    made_count = await connections() - connections_before
    assert made_count <= share * refused_count, f"{made_count} connections, {refused_count} refusals"
    await admin.aclose()


async def test_waiting_registrations_are_owed(
    own_redis_server: EmbeddedServer, open_registry: Any, mirror: Any
) -> None:
    """Also a write that was never sent, since the write before it was refused all the time."""
    view = await mirror(await open_registry(own_redis_server.url), "i/")
    worker = await open_registry(own_redis_server.url, timeout_s=5.0)
    admin = RedisClient(own_redis_server.url, timeout_s=20.0)
    await admin.execute(*REFUSE["replicas"])
    await asyncio.gather(*(worker.register(f"i/{number}", b"v") for number in range(6)))
    await admin.execute("CONFIG", "SET", "min-replicas-to-write", "0")
    await view.until_state({f"i/{number}": b"v" for number in range(6)})
    await admin.aclose()
