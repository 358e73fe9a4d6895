"""A router of row E4, which consists of its indexer alone.

Prints `ready`. The line `begin` discards all that it has noted. A number makes it wait for so many blocks;
then it prints, as JSON, the time at which each came into its index, in ns of this machine's monotonic clock.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import time
from collections.abc import Sequence

import uvloop

from dynamo_redis.config import RouterSettings
from dynamo_redis.router.base import Worker
from dynamo_redis.router.index import indexer
from dynamo_redis.router.index.prefix_index import KvIndex
from dynamo_redis.runtime.runtime import DistributedRuntime
from dynamo_redis.wire.kv_event import KvEvent

SEEN: dict[int, int] = {}
POLL_S = 0.01
PATIENCE_S = 60.0


class TimedIndex(KvIndex):
    """An index that notes the time at which each block comes."""

    def apply(self, worker: Worker, events: Sequence[KvEvent]) -> None:
        super().apply(worker, events)
        now = time.monotonic_ns()
        for event in events:
            for block in event.hashes:
                SEEN[block] = now


async def main() -> None:
    """Answer the suite's lines until the input ends."""
    vars(indexer)["KvIndex"] = TimedIndex
    async with DistributedRuntime() as runtime:
        router = indexer.Indexer(
            runtime, "bench", "backend", RouterSettings.load(), router_id=secrets.token_hex(4)
        )
        await router.start()
        print("ready", flush=True)
        while line := (await asyncio.to_thread(sys.stdin.readline)).strip():
            if line == "begin":
                SEEN.clear()
                print("begun", flush=True)
                continue
            async with asyncio.timeout(PATIENCE_S):
                while len(SEEN) < int(line):
                    await asyncio.sleep(POLL_S)
            print(json.dumps(SEEN), flush=True)
        await router.aclose()


if __name__ == "__main__":
    uvloop.run(main())
