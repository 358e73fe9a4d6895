"""Shared parts of the tests of the nats and redis planes: their brokers, a worker and a caller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

from dynamo_redis.config import PlaneSettings
from dynamo_redis.planes.base import RequestPlaneClient, RequestPlaneServer, Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.select import make_client, make_server
from dynamo_redis.store.server import EmbeddedServer
from tests.nats_server import NatsServer
from tests.tcp_plane import INSTANCE, SECRET, echo


class Broker(Protocol):
    plane: str

    async def kill(self) -> None: ...
    async def start(self) -> None: ...


class NatsBroker:
    plane = "nats"

    def __init__(self, server: NatsServer) -> None:
        self._server = server
        self.url = server.url

    async def kill(self) -> None:
        await asyncio.to_thread(self._server.kill)

    async def start(self) -> None:
        await asyncio.to_thread(self._server.start)


class RedisBroker:
    plane = "redis"

    def __init__(self, server: EmbeddedServer) -> None:
        self._server = server

    async def kill(self) -> None:
        await self._server.kill()

    async def start(self) -> None:
        await self._server.start()


@asynccontextmanager
async def serving(
    plane: str, **overrides: Any
) -> AsyncIterator[tuple[RequestPlaneServer, RequestPlaneClient]]:
    settings = PlaneSettings.load(**{"request_plane": plane, "connect_timeout_s": 1.0, **overrides})
    server = make_server(settings, secret=SECRET, instance_id=INSTANCE)
    await server.start()
    server.register("echo", echo)
    client = make_client(settings)
    try:
        yield server, client
    finally:
        await client.aclose()
        await server.aclose()


def target(server: RequestPlaneServer, subject: str = "echo") -> Target:
    return Target(INSTANCE, server.address, subject, SECRET)


async def ask(client: RequestPlaneClient, to: Target, request: Any) -> list[Any]:
    return [item async for item in client.open(to, request, Context())]
