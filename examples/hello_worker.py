"""A worker: it answers a prompt word by word. Start as many as you like; Ctrl-C shuts one down cleanly.

DYN_REDIS_URL=redis://localhost:6379 python examples/hello_worker.py
"""

from collections.abc import AsyncIterator

import uvloop

from dynamo_redis.runtime import Context, DistributedRuntime, dynamo_worker


async def generate(request: dict[str, str], context: Context) -> AsyncIterator[str]:
    for word in request["prompt"].split():
        if context.is_stopped():
            return
        yield word


@dynamo_worker()
async def main(runtime: DistributedRuntime) -> None:
    await runtime.endpoint("demo.words.generate").serve_endpoint(generate)


if __name__ == "__main__":
    uvloop.run(main())
