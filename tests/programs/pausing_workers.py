"""Serves several instances of one endpoint over the tcp plane, until it is killed.

Run as `pausing_workers.py HOST ENDPOINT ID...`. Prints the address of each instance. The request "pause"
blocks the event loop for 1.2 s. The answer to "tick" has 60 items, the answer to "who" is the instance's id.
All other items are the request.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator

import uvloop

from dynamo_redis.config import PlaneSettings
from dynamo_redis.names import EndpointName, InstanceId
from dynamo_redis.planes.base import Handler
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.tcp.server import TcpServer


def handler_of(number: int) -> Handler:
    async def handler(request: str, _: Context) -> AsyncIterator[int | str]:
        if request == "pause":
            time.sleep(1.2)
        for _item in range(60 if request == "tick" else 1):
            await asyncio.sleep(0.01)
            yield number if request == "who" else request

    return handler


async def main(host: str, endpoint: str, *numbers: str) -> None:
    name = EndpointName.parse(endpoint)
    for number in map(int, numbers):
        server = TcpServer(PlaneSettings.load(tcp_host=host, auth="off"), secret=None, instance_id=number)
        server.register(name.subject(InstanceId(number)), handler_of(number))
        await server.start()
        print(server.address, flush=True)
    await asyncio.Event().wait()


uvloop.run(main(*sys.argv[1:]))
