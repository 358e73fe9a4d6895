"""A client of worker.py: it prints the greetings as they come.

DYN_REDIS_URL=redis://localhost:6379 python examples/from_dynamo/hello_world/client.py moon,sun
"""

import sys

import uvloop

from dynamo_redis.runtime import DistributedRuntime, dynamo_worker


@dynamo_worker()
async def main(runtime: DistributedRuntime) -> None:
    client = await runtime.endpoint("hello_world.backend.generate").client()
    await client.wait_for_instances()
    async for greeting in await client.generate(sys.argv[1] if len(sys.argv) > 1 else "world,moon"):
        print(greeting.data(), flush=True)


if __name__ == "__main__":
    uvloop.run(main())
