"""A client for the echo workers, on either runtime.

`python echo_client.py MODULE INSTANCES`, then one line of `REQUESTS CONCURRENCY` on standard input for each
round; it answers a line of JSON: seconds and CPU seconds.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
import time
from typing import Any

import uvloop

runtime_module = importlib.import_module(sys.argv[1])
INSTANCES = int(sys.argv[2])
PAYLOAD = "x" * 128


async def requests(client: Any, count: int) -> None:
    """Send requests one after the other."""
    for _ in range(count):
        async for item in await client.round_robin(PAYLOAD, annotated=False):
            assert item == PAYLOAD


async def timed_round(client: Any, count: int, concurrency: int) -> dict[str, float]:
    """Send `count` requests, `concurrency` at a time. Returns the seconds and CPU seconds."""
    started, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(requests(client, count // concurrency) for _ in range(concurrency)))
    return {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}


@runtime_module.dynamo_worker()  # type: ignore[untyped-decorator]
async def main(runtime: Any) -> None:
    """Wait for the workers, then do a round for each line read."""
    client = await runtime.endpoint("bench.echo.generate").client()
    await client.wait_for_instances()
    while len(client.instance_ids()) < INSTANCES:
        await asyncio.sleep(0.05)
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        count, concurrency = map(int, line.split())
        print(json.dumps(await timed_round(client, count, concurrency)), flush=True)
    # The rival's threads outlive its loop, and the process needs no clean-up.
    os._exit(0)


uvloop.run(main())
