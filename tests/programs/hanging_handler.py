"""Serves an endpoint; some of its requests block the event loop for a while.

Run as `hanging_handler.py URL PREFIX ENDPOINT HANG_S`. The request "sleep" blocks in C, "spin" in Python.
Answers each request with the request.
"""

from __future__ import annotations

import sys
import time

import uvloop

from dynamo_redis.runtime import Context, DistributedRuntime, Settings


async def main(url: str, prefix: str, endpoint: str, hang_s: str) -> None:
    async def handler(request: str, context: Context) -> str:
        until = time.monotonic() + float(hang_s)
        if request == "sleep":
            time.sleep(until - time.monotonic())  # C that releases the interpreter
        while request == "spin" and time.monotonic() < until:
            pass
        return request

    settings = Settings.load(redis_url=url, prefix=prefix, lease_ttl_s=1, tcp_host="127.0.0.1")
    async with DistributedRuntime(settings=settings) as runtime:
        await runtime.endpoint(endpoint).serve_endpoint(handler)


uvloop.run(main(*sys.argv[1:]))
