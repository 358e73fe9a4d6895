"""Calls an endpoint, and prints "answered" for each item: `long_caller.py ENDPOINT`."""

from __future__ import annotations

import asyncio
import sys

from dynamo_redis.runtime import DistributedRuntime


async def main(endpoint: str) -> None:
    async with DistributedRuntime() as runtime:
        client = await runtime.endpoint(endpoint).client()
        await client.wait_for_instances(10)
        async for _ in await client.round_robin(1000, annotated=False):
            print("answered", flush=True)


asyncio.run(main(sys.argv[1]))
