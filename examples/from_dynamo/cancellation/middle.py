"""The second of three processes: it passes requests on, each with its context, and so its cancellation.

DYN_REDIS_URL=redis://localhost:6379 python examples/from_dynamo/cancellation/middle.py
"""

from collections.abc import AsyncIterator

import uvloop

from dynamo_redis.runtime import Client, Context, DistributedRuntime, dynamo_worker


class Middle:
    def __init__(self, server: Client) -> None:
        self.server = server

    async def generate(self, request: int, context: Context) -> AsyncIterator[int]:
        async for number in await self.server.round_robin(request, annotated=False, context=context):
            yield number
        print(f"middle: {'stopped' if context.is_stopped() else 'ended'}", flush=True)


@dynamo_worker()
async def main(runtime: DistributedRuntime) -> None:
    server = await runtime.endpoint("cancellation.server.generate").client()
    await server.wait_for_instances()
    await runtime.endpoint("cancellation.middle.generate").serve_endpoint(Middle(server).generate)


if __name__ == "__main__":
    uvloop.run(main())
