"""Registers the key `i/killed`, prints the lease's id, and sleeps: `registry_worker.py URL PREFIX`."""

from __future__ import annotations

import asyncio
import sys

from dynamo_redis.config import StoreSettings
from dynamo_redis.store.registry.redis_registry import RedisRegistry


async def main(url: str, prefix: str) -> None:
    registry = RedisRegistry(StoreSettings.load(redis_url=url, prefix=prefix, lease_ttl_s=1.5))
    await registry.start()
    await registry.register("i/killed", b"v")
    print(registry.lease_id, flush=True)
    await asyncio.sleep(60)


asyncio.run(main(*sys.argv[1:]))
