"""Leads a barrier that never fills: `barrier_leader.py URL`."""

from __future__ import annotations

import asyncio
import sys

from dynamo_redis.config import StoreSettings
from dynamo_redis.runtime.barrier import LeaderBarrier
from dynamo_redis.store.registry.redis_registry import RedisRegistry


async def main(url: str) -> None:
    registry = RedisRegistry(StoreSettings.load(redis_url=url, lease_ttl_s=2))
    await registry.start()
    await LeaderBarrier("group", 9, 60).sync(registry, "of the dead")


asyncio.run(main(sys.argv[1]))
