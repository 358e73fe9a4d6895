"""Holds a lock and writes under it until the lock is lost.

Run as `lock_holder.py URL PREFIX`. Prints the fencing token, then "refused" at the first refused write,
"cancelled" when the block is cancelled, and "lost" when `hold` raises LockLost.
"""

from __future__ import annotations

import asyncio
import sys

from dynamo_redis.errors import LockLost
from dynamo_redis.store.base import HeldLock
from dynamo_redis.store.locks.redis_locks import RedisLocks
from dynamo_redis.store.redis.client import RedisClient


async def write_until_refused(held: HeldLock) -> None:
    """Write all the time; after the first refusal wait for the cancellation."""
    try:
        while True:
            await held.write(b"old")
            await asyncio.sleep(0.01)
    except LockLost:
        print("refused", flush=True)
        await asyncio.sleep(60)


async def main(url: str, prefix: str) -> None:
    locks = RedisLocks(RedisClient(url, timeout_s=1.0), prefix)
    try:
        async with locks.lock("a", ttl_s=0.6).hold() as held:
            print(held.fencing_token, flush=True)
            try:
                await write_until_refused(held)
            except asyncio.CancelledError:
                print("cancelled", flush=True)
                raise
    except LockLost:
        print("lost", flush=True)
    await locks.aclose()


asyncio.run(main(*sys.argv[1:]))
