"""Settings of the http plane, seen by the other side of a connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest
from h2.settings import SettingCodes

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import ConnectionLost, PlaneError
from dynamo_redis.planes.base import RequestPlaneClient, Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.http.forward import HttpClient
from dynamo_redis.planes.select import make_client
from tests.http_plane import INSTANCE, SECRET, WITHIN_S, connect, hosted, read_all

WIDE_BYTES, PLAIN_BYTES = 1 << 20, (1 << 16) - 1


@asynccontextmanager
async def calling(**settings: Any) -> AsyncIterator[RequestPlaneClient]:
    client = make_client(PlaneSettings.load(request_plane="http", **settings))
    try:
        yield client
    finally:
        await client.aclose()


async def first_settings(
    side: h2.connection.H2Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> dict[int, int]:
    """Return the settings that the peer sends first."""
    side.initiate_connection()
    writer.write(side.data_to_send())
    async with asyncio.timeout(WITHIN_S):
        while True:
            for event in side.receive_data(await reader.read(1 << 16)):
                if isinstance(event, h2.events.RemoteSettingsChanged):
                    writer.write(side.data_to_send())
                    return {int(code): one.new_value for code, one in event.changed_settings.items()}


@asynccontextmanager
async def listening(shown: list[dict[int, int]]) -> AsyncIterator[Target]:
    """Be a server that notes the settings of its callers, and then answers nothing."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        side = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        shown.append(await first_settings(side, reader, writer))
        await read_all(reader)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        yield Target(INSTANCE, f"127.0.0.1:{port}", "echo", None)


SHOWN = [
    ({"http2_max_frame_bytes": 32_768}, SettingCodes.MAX_FRAME_SIZE, 32_768),
    ({"http2_max_frame_bytes": "2MiB"}, SettingCodes.MAX_FRAME_SIZE, 2 << 20),
    ({"http2_adaptive_window": True}, SettingCodes.INITIAL_WINDOW_SIZE, WIDE_BYTES),
    ({"http2_adaptive_window": False}, SettingCodes.INITIAL_WINDOW_SIZE, PLAIN_BYTES),
]


@pytest.mark.parametrize(
    ("chosen", "code", "value"),
    [*SHOWN, ({"http2_max_concurrent_streams": 7}, SettingCodes.MAX_CONCURRENT_STREAMS, 7)],
)
async def test_server_announces_its_settings(chosen: dict[str, Any], code: int, value: int) -> None:
    async with hosted(**chosen) as host, connect(host) as (reader, writer):
        shown = await first_settings(h2.connection.H2Connection(), reader, writer)
        assert shown.get(code, PLAIN_BYTES) == value


@pytest.mark.parametrize(("chosen", "code", "value"), SHOWN)
async def test_client_announces_its_settings(chosen: dict[str, Any], code: int, value: int) -> None:
    shown: list[dict[int, int]] = []
    async with calling(**chosen) as client, listening(shown) as to:
        stream = client.open(to, 1, Context())
        async with asyncio.timeout(WITHIN_S):
            while not shown:
                await asyncio.sleep(0.01)
        await stream.aclose()
    assert shown[0].get(code, PLAIN_BYTES) == value


async def test_client_gives_up_a_server_that_answers_no_ping() -> None:
    chosen: dict[str, Any] = {"http2_keep_alive_interval_s": 0.2, "http2_keep_alive_timeout_s": 0.3}
    async with calling(**chosen) as client, listening([]) as to, asyncio.timeout(WITHIN_S):
        with pytest.raises(ConnectionLost, match="silent"):
            await anext(client.open(to, 1, Context()))


async def test_server_gives_up_a_caller_that_answers_no_ping() -> None:
    chosen: dict[str, Any] = {"http2_keep_alive_interval_s": 0.2, "http2_keep_alive_timeout_s": 1}
    async with hosted(**chosen) as host, connect(host) as (reader, writer):
        caller = h2.connection.H2Connection()
        await first_settings(caller, reader, writer)
        caller.send_headers(1, host.headers("wait"))
        caller.send_data(1, b"1", end_stream=True)
        writer.write(caller.data_to_send())
        await read_all(reader)  # until the server ends it; the time-out of this is shorter than the default's


async def test_few_idle_connections_are_kept() -> None:
    chosen: dict[str, Any] = {"http2_max_concurrent_streams": 1, "http2_pool_max_idle_count": 2}
    async with hosted(**chosen) as host, calling(**chosen) as client:
        assert isinstance(client, HttpClient)
        to = Target(INSTANCE, host.server.address, "wait", SECRET)
        streams = [client.open(to, 1, Context()) for _ in range(5)]
        for stream in streams:
            assert await anext(stream) == 1
        [server] = client._http._servers.values()
        peer = server.peer
        assert len(peer._connections) >= 5
        for stream in streams:
            await stream.aclose()
        async with asyncio.timeout(WITHIN_S):
            while any(connection.exchange_count for connection in peer._connections):
                await asyncio.sleep(0.01)
        peer.close_idle()
        assert len(peer._connections) == 2


async def test_root_path_is_part_of_every_address() -> None:
    async with hosted(http_root_path="/api/llm/") as host:
        body = b'"hi"'
        head = host.request("echo", body)
        assert (await host.ask(head))[0] == 404
        assert await host.ask(head.replace(b"/v1/rpc/", b"/api/llm/")) == (200, b'"hi"\n')
        assert (await host.ask(b"GET /api/llm/-/live HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == 204
        to = Target(INSTANCE, host.server.address, "echo", SECRET)
        async with calling(http_root_path="api/llm") as client:
            assert [item async for item in client.open(to, "hi", Context())] == ["hi"]
        async with calling() as client:
            with pytest.raises(PlaneError):
                await anext(client.open(to, "hi", Context()))


async def test_advertised_address_is_that_of_the_settings() -> None:
    async with hosted(http_advertise_host="worker.example", http_advertise_port=1234) as host_at:
        assert host_at.server.address == "worker.example:1234"
