"""Makes many clients of one server, which call it all at once each time that a line comes on standard input.

Run as `tcp_storm.py ADDRESS COUNT`. Prints `"ready"`, then a JSON count of the answers for each line: `once`,
or `until answered`, which repeats retryable calls for 30 s. The line `stop` ends it.
"""

from __future__ import annotations

import asyncio
import collections
import json
import resource
import sys
import time
from typing import Any

import uvloop

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import PlaneError
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.tcp.client import TcpClient

SECRET = b"a secret of the instance, random"


async def call(client: TcpClient, target: Target, *, patient: bool) -> Any:
    """Return the answer, or the last error as text."""
    until = time.monotonic() + 30
    while True:
        try:
            return await anext(client.open(target, 1, None))
        except PlaneError as exc:
            if not patient or not exc.retryable or time.monotonic() > until:
                return f"{type(exc).__name__}: {exc}"


async def main(address: str, count: int) -> None:
    target = Target(7, address, "small", SECRET)
    clients = [TcpClient(PlaneSettings(connect_timeout_s=30)) for _ in range(count)]
    loop = asyncio.get_running_loop()
    print('"ready"', flush=True)
    while (word := (await loop.run_in_executor(None, sys.stdin.readline)).strip()) != "stop":
        calls = (call(client, target, patient=word == "until answered") for client in clients)
        print(json.dumps(collections.Counter(map(str, await asyncio.gather(*calls)))), flush=True)
    for client in clients:
        await client.aclose()


if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    uvloop.run(main(sys.argv[1], int(sys.argv[2])))
