"""Registers two keys, then blocks its event loop for a while.

Run as `hanging_worker.py URL PREFIX HANG_S LOOP_STALL_S WHERE`. WHERE "C" blocks in C, else in Python.
"""

from __future__ import annotations

import asyncio
import sys
import time

from dynamo_redis.config import StoreSettings
from dynamo_redis.store.registry.redis_registry import RedisRegistry


async def main(url: str, prefix: str, hang_s: str, loop_stall_s: str, where: str) -> None:
    registry = RedisRegistry(
        StoreSettings.load(redis_url=url, prefix=prefix, lease_ttl_s=1, loop_stall_s=float(loop_stall_s))
    )
    await registry.start()
    await registry.register("i/1", b"ready", stalled_value=b"not ready")
    await registry.register("i/2", b"plain")
    await asyncio.sleep(1)
    until = time.monotonic() + float(hang_s)
    if where == "C":
        time.sleep(until - time.monotonic())
    while time.monotonic() < until:
        pass
    await asyncio.sleep(60)


asyncio.run(main(*sys.argv[1:]))
