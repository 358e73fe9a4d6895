"""Serves an endpoint that answers with its instance's id: `runtime_worker.py ENDPOINT`.

Prints the instance's id and its address.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvloop

from dynamo_redis.runtime import Context, DistributedRuntime


async def main(endpoint: str) -> None:
    runtime = DistributedRuntime()

    async def who(request: Any, context: Context) -> AsyncIterator[int]:
        yield runtime.instance_id

    served = await runtime.endpoint(endpoint).start_serving(who)
    print(runtime.instance_id, served.instance.transport.address, flush=True)
    await asyncio.Event().wait()


uvloop.run(main(sys.argv[1]))
