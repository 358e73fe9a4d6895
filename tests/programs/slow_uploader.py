"""Puts an object, stops in its middle, prints "uploading", and waits: `slow_uploader.py URL PREFIX`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

from dynamo_redis.store.objects.redis_objects import RedisObjectStore
from dynamo_redis.store.redis.client import RedisClient


async def pieces() -> AsyncIterator[bytes]:
    yield bytes(2500)
    print("uploading", flush=True)
    await asyncio.sleep(60)


async def main(url: str, prefix: str) -> None:
    await RedisObjectStore(RedisClient(url, timeout_s=3), prefix, chunk_bytes=1000).put("b", "n", pieces())


asyncio.run(main(*sys.argv[1:]))
