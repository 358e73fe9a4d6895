"""Serves a few endpoints over the tcp plane, until it is killed.

Run as `tcp_worker.py SECRET PORT`, the secret in hexadecimal digits. Prints the server's address.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import uvloop

from dynamo_redis.config import PlaneSettings
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.tcp.server import TcpServer


async def echo(request: Any, _: Context) -> Any:
    return request


async def tick(request: int, _: Context) -> AsyncIterator[bytes]:
    while True:
        yield b"x" * request
        await asyncio.sleep(0.005)


async def quiet(_: Any, __: Context) -> None:
    await asyncio.sleep(60)


async def block(request: float, _: Context) -> str:
    """Hold the event loop for `request` seconds."""
    time.sleep(request)
    return "done"


async def main(secret: bytes, port: int) -> None:
    server = TcpServer(PlaneSettings.load(tcp_host="127.0.0.1", tcp_port=port), secret=secret, instance_id=1)
    for handler in (echo, tick, quiet, block):
        server.register(handler.__name__, handler)
    await server.start()
    print(server.address, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(bytes.fromhex(sys.argv[1]), int(sys.argv[2])))
