"""A client: it finds the workers of hello_worker.py, sends a request to one, and prints the streamed answer.

DYN_REDIS_URL=redis://localhost:6379 python examples/hello_client.py one two three
"""

import sys

import uvloop

from dynamo_redis.runtime import DistributedRuntime, dynamo_worker


@dynamo_worker()
async def main(runtime: DistributedRuntime) -> None:
    client = await runtime.endpoint("demo.words.generate").client()
    await client.wait_for_instances(timeout_s=10)
    request = {"prompt": " ".join(sys.argv[1:]) or "one two three"}
    async for word in await client.round_robin(request, annotated=False):
        print(word, flush=True)


if __name__ == "__main__":
    uvloop.run(main())
