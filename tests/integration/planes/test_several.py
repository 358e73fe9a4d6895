"""One process that serves several planes at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import ConnectionLost
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.select import make_client, make_server
from tests.tcp_plane import INSTANCE, SECRET


@pytest.mark.parametrize("planes", ["http,tcp", "tcp,http"])
async def test_close_ends_requests_of_all_planes_alike(planes: str) -> None:
    """The plane that closed first cancelled the other's handlers, whose callers got HandlerFailed."""
    settings = PlaneSettings.load(
        request_plane=planes, http_rpc_port=0, http_rpc_host="127.0.0.1", tcp_host="127.0.0.1"
    )
    server = make_server(settings, secret=SECRET, instance_id=INSTANCE)
    await server.start()

    async def hang(_: Any, __: Context) -> AsyncIterator[int]:
        yield 1
        await asyncio.sleep(60)

    server.register("hang", hang)
    clients = {plane: make_client(PlaneSettings.load(request_plane=plane)) for plane in settings.planes}
    streams = {
        plane: client.open(Target(INSTANCE, server.addresses[plane], "hang", SECRET), None, Context())
        for plane, client in clients.items()
    }
    for stream in streams.values():
        assert await anext(stream) == 1
    await server.aclose()
    for stream in streams.values():
        with pytest.raises(ConnectionLost):
            await anext(stream)
    for client in clients.values():
        await client.aclose()
    assert not server.in_flight_count
