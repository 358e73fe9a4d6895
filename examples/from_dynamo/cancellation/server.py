"""The last of three processes: it counts for as long as its caller listens, and says when that ends.

DYN_REDIS_URL=redis://localhost:6379 python examples/from_dynamo/cancellation/server.py
"""

import asyncio
from collections.abc import AsyncIterator

import uvloop

from dynamo_redis.runtime import Context, DistributedRuntime, dynamo_worker


async def count(request: int, context: Context) -> AsyncIterator[int]:
    sent = 0
    try:
        while sent < request:
            if context.is_stopped():
                return
            yield sent
            sent += 1
            await asyncio.sleep(0.1)
    finally:
        print(f"server: {'stopped' if context.is_stopped() else 'ended'} after {sent} numbers", flush=True)


@dynamo_worker()
async def main(runtime: DistributedRuntime) -> None:
    await runtime.endpoint("cancellation.server.generate").serve_endpoint(count)


if __name__ == "__main__":
    uvloop.run(main())
