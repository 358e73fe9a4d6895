"""The worker process of `test_rolling_restart.py`: it prints that it serves, and ends on SIGTERM."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvloop

from dynamo_redis.runtime import DistributedRuntime, dynamo_worker


async def generate(request: dict[str, Any]) -> AsyncIterator[Any]:
    """Yield `count` items, `pause_s` apart, with the process id and their number; or one of `size_bytes`.

    With `then_hang` the answer does not end.
    """
    if "size_bytes" in request:
        yield bytes(request["size_bytes"])
        return
    for number in range(request["count"]):
        if request["pause_s"]:
            await asyncio.sleep(request["pause_s"])
        yield os.getpid(), number
    if request.get("then_hang"):
        await asyncio.Event().wait()


@dynamo_worker()
async def main(runtime: DistributedRuntime) -> None:
    """Serve until the shutdown."""
    endpoint = runtime.endpoint(sys.argv[1])
    serving = endpoint.serve_endpoint(generate)
    client = await endpoint.client()
    await client.wait_for_instances()
    sys.stdout.write("serving\n")
    sys.stdout.flush()
    await serving


if __name__ == "__main__":
    uvloop.run(main())
