"""Waits for an instance of an endpoint: `waiting_client.py ENDPOINT`."""

from __future__ import annotations

import asyncio
import sys

from dynamo_redis.runtime import DistributedRuntime, dynamo_worker


@dynamo_worker()
async def main(runtime: DistributedRuntime) -> None:
    client = await runtime.endpoint(sys.argv[1]).client()
    await client.wait_for_instances()


asyncio.run(main())
