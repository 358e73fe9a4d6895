"""Serves an endpoint, asks it as often as the argument says, and ends."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

from dynamo_redis.runtime import DistributedRuntime, dynamo_worker


async def count(request: int) -> AsyncIterator[int]:
    for number in range(request):
        yield number


@dynamo_worker()
async def main(runtime: DistributedRuntime) -> None:
    endpoint = runtime.endpoint("dynamo.traced.count")
    await endpoint.start_serving(count)
    client = await endpoint.client()
    await client.wait_for_instances()
    for _ in range(int(sys.argv[1])):
        items = [item async for item in await client.generate(3, annotated=False)]
        assert items == [0, 1, 2]
    print("all answered", flush=True)


asyncio.run(main())
