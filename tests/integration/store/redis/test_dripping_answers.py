"""A connection over which a byte comes at times, and never a complete answer."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from dynamo_redis.store.registry.lease import Keepalive
from dynamo_redis.store.server import EmbeddedServer

WAIT_S = 60.0


class Dripper:
    """An address that leads to a server. Connections made while `drips` is set get no answer."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.drips = False
        self.dripping: set[int] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        drips = self.drips
        if drips:
            self.dripping.add(writer.get_extra_info("peername")[1])
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self._port)

        async def pass_on() -> None:
            while data := await reader.read(1 << 16):
                if not drips:
                    to_server.write(data)
            raise ConnectionError

        async def answer() -> None:
            while data := await from_server.read(1 << 16):
                writer.write(data)

        async def drip() -> None:
            content = b"+"
            while True:
                await asyncio.sleep(0.1)
                if drips:
                    writer.write(content)
                    content = b"x"

        with contextlib.suppress(OSError, ExceptionGroup):
            async with asyncio.TaskGroup() as tasks:
                for work in (pass_on, answer, drip):
                    tasks.create_task(work())
        writer.close()
        to_server.close()


async def test_keepalive_leaves_a_dripping_connection(
    own_redis_server: EmbeddedServer, open_registry: Any
) -> None:
    dripper = Dripper(int(own_redis_server.url.rpartition(":")[2]))
    async with await asyncio.start_server(dripper.serve, "127.0.0.1", 0) as address:
        port = address.sockets[0].getsockname()[1]
        worker = await open_registry(f"redis://127.0.0.1:{port}", ttl_s=1.0, timeout_s=1.0)
        renewed: list[object] = []
        worker._keepalive._on_renewed = renewed.append
        await worker.put("before", b"the pool has a connection")
        dripper.drips = True
        await worker.register("i/1", b"v")
        async with asyncio.timeout(WAIT_S):
            while not dripper.dripping & _own_ports(worker._keepalive):
                await asyncio.sleep(0.02)
            dripper.drips = False
            while not renewed:
                await asyncio.sleep(0.02)
        await worker.aclose()


def _own_ports(keepalive: Keepalive) -> set[int]:
    """Return the local ports of the connections that the thread uses now."""
    connection: Any = keepalive._connection
    under_way: Any = connection and tuple(connection._pool._in_use_connections)
    return {found._sock.getsockname()[1] for found in under_way or () if found._sock is not None}
