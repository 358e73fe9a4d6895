"""Runs a server in a process that has no file left for a connection, and calls it.

Run as `tcp_file_limit.py uvloop|asyncio`. Prints the address and the error of a call while no file is left,
then frees 20 files. Prints the process's CPU seconds for each line `cpu`; any other line ends it.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import time
from typing import Any

import uvloop

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import PlaneError
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.tcp.client import TcpClient
from dynamo_redis.planes.tcp.server import TcpServer

SECRET = b"a secret of the instance, random"


async def echo(request: Any, _: Context) -> Any:
    return request


def take_all_files() -> list[int]:
    """Lower the limit of open files, and open files up to it."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
    taken: list[int] = []
    try:
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return taken


async def main() -> None:
    loop = asyncio.get_running_loop()
    server = TcpServer(PlaneSettings.load(tcp_host="127.0.0.1"), secret=SECRET, instance_id=7)
    server.register("small", echo)
    await server.start()
    await loop.run_in_executor(None, time.sleep, 0)  # its thread needs files, too
    taken = take_all_files()
    client = TcpClient(PlaneSettings())
    error = None
    try:
        await anext(client.open(Target(7, server.address, "small", SECRET), 1, Context()))
    except PlaneError as exc:
        error = [exc.code, str(exc)]
    for file in taken[:20]:
        os.close(file)
    print(json.dumps([server.address, error]), flush=True)
    while (await loop.run_in_executor(None, sys.stdin.readline)).strip() == "cpu":
        print(json.dumps(time.process_time()), flush=True)
    await client.aclose()
    await server.aclose()


if __name__ == "__main__":
    if sys.argv[1] == "uvloop":
        uvloop.run(main())
    else:
        asyncio.run(main())
