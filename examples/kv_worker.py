"""A worker with a custom engine that publishes its KV events and load for routers.

DYN_REDIS_URL=redis://localhost:6379 python examples/kv_worker.py
"""

from collections.abc import AsyncIterator
from typing import Any

import uvloop

from dynamo_redis.llm import KvEventPublisher, WorkerMetricsPublisher
from dynamo_redis.runtime import DistributedRuntime, dynamo_worker

BLOCK_SIZE = 4
TOTAL_BLOCKS = 1000


@dynamo_worker()
async def main(runtime: DistributedRuntime) -> None:
    endpoint = runtime.endpoint("demo.llm.generate")
    events = KvEventPublisher(endpoint, kv_block_size=BLOCK_SIZE)
    load = WorkerMetricsPublisher()
    await load.create_endpoint(endpoint)
    cache: dict[int, None] = {}  # the engine's hashes of its blocks, oldest first

    async def generate(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        tokens, parent = request["token_ids"], None
        for end in range(BLOCK_SIZE, len(tokens) + 1, BLOCK_SIZE):
            block = hash(tuple(tokens[:end]))
            if block not in cache:
                cache[block] = None
                events.publish_stored(tokens[end - BLOCK_SIZE : end], [BLOCK_SIZE], [block], parent)
            parent = block
        while len(cache) > TOTAL_BLOCKS:
            oldest = next(iter(cache))
            del cache[oldest]
            events.publish_removed([oldest])
        load.publish(kv_used_blocks=len(tokens) // BLOCK_SIZE, kv_total_blocks=TOTAL_BLOCKS)
        yield {"token_ids": tokens[::-1], "finish_reason": "stop"}

    await endpoint.serve_endpoint(generate)


if __name__ == "__main__":
    uvloop.run(main())
