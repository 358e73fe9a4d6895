"""Settings of the request plane that act on the nats and redis planes as on tcp."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import CannotConnect, ConnectionLost, NotAccepted, Overloaded
from dynamo_redis.planes.base import RequestPlaneServer
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.select import make_client, make_server
from dynamo_redis.planes.tunnel.server import TunnelServer
from tests.broker_plane import Broker, ask, serving, target
from tests.tcp_plane import INSTANCE, SECRET

WAIT_S = 30.0


class Hearing:
    """The owner of a link whose process takes no message any more."""

    def on_message(self, message: bytes, sender: str) -> None: ...
    def on_unreachable(self, connection_id: bytes, reason: str = "") -> None: ...
    def on_lost(self, reason: str) -> None: ...


def freeze(server: RequestPlaneServer) -> None:
    """Have a server take no message any more, while its link stays: its process hangs."""
    assert isinstance(server, TunnelServer)
    server._link._owner = Hearing()  # type: ignore[attr-defined]


async def test_connect_timeout_bounds_the_handshake(broker: Broker) -> None:
    async with serving(broker.plane, connect_timeout_s=0.2) as (server, client):
        freeze(server)
        with pytest.raises(CannotConnect, match=r"no answer from .* in \d"):
            await ask(client, target(server), 1)
    async with serving(broker.plane, connect_timeout_s=60.0) as (server, client):
        freeze(server)
        with pytest.raises(TimeoutError):  # longer than the default
            async with asyncio.timeout(4):
                await ask(client, target(server), 1)


async def test_request_timeout_bounds_the_acceptance(broker: Broker) -> None:
    async with serving(
        broker.plane, accept_timeout_s=3.0, keepalive_interval_s=10.0, connect_timeout_s=WAIT_S
    ) as (server, client):
        assert await ask(client, target(server), 1) == [1]
        freeze(server)
        with pytest.raises(NotAccepted):
            await ask(client, target(server), 2)


async def test_keepalive_finds_a_worker_that_hangs(broker: Broker) -> None:
    async with serving(broker.plane, keepalive_interval_s=0.2, connect_timeout_s=WAIT_S) as (server, client):

        async def wait(_: Any, context: Context) -> AsyncIterator[int]:
            yield 1
            await context.async_killed_or_stopped()

        server.register("wait", wait)
        stream = client.open(target(server, "wait"), None, Context())
        assert await anext(stream) == 1
        freeze(server)
        began_at = time.monotonic()
        with pytest.raises(ConnectionLost):  # of the side that notices it first
            await anext(stream)
        assert time.monotonic() - began_at < WAIT_S


async def test_connections_of_callers_are_bounded(broker: Broker) -> None:
    async with serving(broker.plane, max_connections_count=1, connect_timeout_s=WAIT_S) as (server, client):
        assert await ask(client, target(server), 1) == [1]
        second = make_client(PlaneSettings.load(request_plane=broker.plane, connect_timeout_s=WAIT_S))
        try:
            with pytest.raises(Overloaded, match="DYN_TCP_MAX_CONNECTIONS=1"):
                await ask(second, target(server), 2)
        finally:
            await second.aclose()
        assert await ask(client, target(server), 3) == [3]


async def test_prefix_keeps_deployments_apart(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers with one instance id, on one broker."""
    settings = PlaneSettings.load(request_plane=broker.plane, connect_timeout_s=WAIT_S)
    made = []
    try:
        for prefix in ("one", "two", "un.usual*name>"):
            monkeypatch.setenv("DYN_REDIS_PREFIX", prefix)
            server = make_server(settings, secret=SECRET, instance_id=INSTANCE)
            client = make_client(settings)
            made.append((prefix, server, client))
            await server.start()
            server.register("echo", naming(prefix))
        for _ in range(5):
            for prefix, server, client in made:
                assert await ask(client, target(server), 1) == [prefix]
    finally:
        for _, server, client in made:
            await client.aclose()
            await server.aclose()


def naming(prefix: str) -> Any:
    async def answer(_: Any, __: Context) -> str:
        return prefix

    return answer
