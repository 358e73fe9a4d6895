"""The worker of row E4: publishes stored blocks on a schedule.

Prints `ready`. Then it answers each line of JSON, `[EVENTS_PER_S, SECONDS]`, by one: the time of publication
of each block, by sequence hash, in ns of this machine's monotonic clock.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time

import uvloop

from dynamo_redis.events.block_hashes import chain, local_hashes
from dynamo_redis.events.kv_publisher import KvPublisher
from dynamo_redis.events.worker_events import WorkerEvents
from dynamo_redis.runtime.runtime import DistributedRuntime

BLOCK_SIZE = 4
TURN_S = 0.001


async def publish_stored(
    rank: KvPublisher, numbers: itertools.count[int], rate: float, seconds: float
) -> dict[str, int]:
    """Publish events at `rate` a second; those that are due in one turn of the loop together. Returns the
    time of each, in ns, by sequence hash."""
    published: dict[str, int] = {}
    began = time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        while len(published) < passed * rate:
            number = next(numbers)
            tokens = [number >> 16, number & 0xFFFF, 1, 2]
            (block,) = chain(local_hashes(tokens, BLOCK_SIZE))
            published[str(block)] = time.monotonic_ns()
            rank.stored([number], tokens, None)
        await asyncio.sleep(TURN_S)
    return published


async def main() -> None:
    """Answer the suite's lines until the input ends."""
    numbers = itertools.count(1)
    async with DistributedRuntime() as runtime:
        events = WorkerEvents(runtime, "bench", "backend", block_size=BLOCK_SIZE)
        rank = events.rank(0)
        await events.start()
        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(await publish_stored(rank, numbers, *json.loads(line))), flush=True)
        await events.aclose()


if __name__ == "__main__":
    uvloop.run(main())
