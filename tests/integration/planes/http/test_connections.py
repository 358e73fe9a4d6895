"""HTTP connections between callers and workers: their windows, their dials, and what is left of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import CannotConnect, InvalidRequest, Overloaded
from dynamo_redis.planes.base import RequestPlaneServer, Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.http import app, forward
from dynamo_redis.planes.http.forward import HttpCarrier, HttpClient, HttpPeer
from dynamo_redis.planes.http.h2_client import H2ClientConnection
from dynamo_redis.planes.http.server import HttpServer
from dynamo_redis.planes.select import make_server
from tests.tcp_plane import INSTANCE, SECRET, echo, eventually, wait


def settings(**overrides: Any) -> PlaneSettings:
    return PlaneSettings.load(
        request_plane="http",
        http_rpc_host="127.0.0.1",
        http_rpc_port=0,
        http_advertise_host="127.0.0.1",
        **overrides,
    )


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[RequestPlaneServer, HttpClient]]:
    server = make_server(settings(), secret=SECRET, instance_id=INSTANCE)
    await server.start()
    server.register("echo", echo)
    client = HttpClient(settings(channel_buffer_count=4))
    try:
        yield server, client
    finally:
        await client.aclose()
        await server.aclose()


def target(server: RequestPlaneServer, subject: str = "echo") -> Target:
    return Target(INSTANCE, server.address, subject, SECRET)


@asynccontextmanager
async def silent_server() -> AsyncIterator[tuple[str, set[asyncio.StreamWriter]]]:
    """Accept connections, and say nothing; yield the address and the open connections."""
    opened: set[asyncio.StreamWriter] = set()

    async def read_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.add(writer)
        while await reader.read(65_536):
            pass
        opened.discard(writer)
        writer.close()

    server = await asyncio.start_server(read_on, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", opened
    finally:
        for writer in tuple(opened):
            writer.close()
        server.close()
        await server.wait_closed()


def never_made(*_: Any) -> Any:
    raise AssertionError("there is no connection to make a session for")


def has_much_unread(connection: H2ClientConnection) -> bool:
    unread_bytes = sum(size for exchange in connection._exchanges.values() for _, size in exchange._chunks)
    return unread_bytes > 300_000  # h2 may give half a window of 1 MiB back later


async def test_answers_given_up_take_no_room_from_later_ones() -> None:
    """The bytes of an answer that came and were not read counted for ever against the connection's window."""
    async with serving() as (server, client):

        async def big(_: Any, __: Context) -> AsyncIterator[bytes]:
            while True:
                yield bytes(100_000)

        server.register("big", big)
        for _ in range(64):
            async with asyncio.timeout(20), client.open(target(server, "big"), None, Context()) as stream:
                await anext(stream)
                (connection,) = client._http._servers.copy().popitem()[1].peer._connections
                await eventually(partial(has_much_unread, connection))
        await eventually(lambda: not connection.exchange_count)
        async with asyncio.timeout(20):
            assert len(await anext(client.open(target(server), bytes(200_000), Context()))) == 200_000


async def test_requests_that_wait_for_a_dial_share_its_error() -> None:
    async with silent_server() as (address, _):
        peer = HttpPeer(Target(INSTANCE, address, "", SECRET), settings(connect_timeout_s=0.5), None)
        began_at = time.monotonic()
        found = await asyncio.gather(*(peer.connect() for _ in range(40)), return_exceptions=True)
        assert {type(error) for error in found} == {CannotConnect}
        assert time.monotonic() - began_at < 10  # 20 s one after the other
        peer.close()


async def test_a_dial_that_is_not_wanted_leaves_no_connection() -> None:
    async with silent_server() as (address, opened):
        peer = HttpPeer(Target(INSTANCE, address, "", SECRET), settings(), None)
        waiting = asyncio.create_task(peer.connect())
        await eventually(lambda: opened)
        waiting.cancel()
        await asyncio.wait([waiting])
        peer.close()
        await eventually(lambda: not opened)


async def test_a_dial_without_an_answer_ends_its_connection() -> None:
    async with silent_server() as (address, opened):
        peer = HttpPeer(Target(INSTANCE, address, "", SECRET), settings(connect_timeout_s=0.3), None)
        with pytest.raises(CannotConnect, match="no answer"):
            await peer.connect()
        await eventually(lambda: not opened)


async def test_dial_keeps_its_time_limit() -> None:
    async with silent_server() as (address, _):
        carrier = HttpCarrier(settings(connect_timeout_s=60))
        loop = asyncio.get_running_loop()
        dial = carrier.dial(
            Target(INSTANCE, address, "echo", SECRET), never_made, never_made, loop.time() + 0.2
        )
        async with asyncio.timeout(30):
            with pytest.raises(CannotConnect):
                await dial
        await carrier.aclose()


@pytest.mark.parametrize("traceparent", ["a\r\nb: c", "\n", "é"])
async def test_traceparent_that_is_no_header_is_invalid(traceparent: str) -> None:
    async with serving() as (server, client):
        with pytest.raises(InvalidRequest):
            await anext(client.open(target(server), 1, Context(traceparent=traceparent)))
        assert await anext(client.open(target(server), 1, Context())) == 1


async def test_refusal_that_never_ends_keeps_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a proxy that breaks."""
    monkeypatch.setattr(forward, "_PROBLEM_S", 0.2)
    head = b"HEAD"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        connection.initiate_connection()
        while data := await reader.read(65_536):
            for event in connection.receive_data(data):
                if isinstance(event, h2.events.RequestReceived):
                    connection.send_headers(event.stream_id, [(":status", "503")])
                    connection.send_data(event.stream_id, head)
            writer.write(connection.data_to_send())
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as proxy:
        address = f"127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
        client = HttpClient(settings())
        async with asyncio.timeout(30):
            with pytest.raises(CannotConnect, match="HTTP 503 of a proxy: HEAD"):
                await client.probe(Target(INSTANCE, address, "echo", SECRET), 20)
        await client.aclose()


async def test_instances_that_left_are_forgotten() -> None:
    client = HttpClient(settings(http2_pool_idle_timeout_s=0.1))
    for instance_id in range(1, 4):
        server = make_server(settings(), secret=SECRET, instance_id=instance_id)
        await server.start()
        server.register("echo", echo)
        to = Target(instance_id, server.address, "echo", SECRET)
        await client.probe(to, 10)
        assert await anext(client.open(to, 1, Context())) == 1
        client.forget(to)
        await server.aclose()
    await eventually(lambda: not client._http._servers)
    assert client._http._sweep_timer is None
    await client.aclose()


async def test_callers_that_connect_anew_leave_few_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each HTTP connection has a session in the worker, which cannot see the connection's end."""
    monkeypatch.setattr(app, "MAX_IDLE_SESSIONS", 4)
    server = HttpServer(settings(), secret=SECRET, instance_id=INSTANCE)
    await server.start()
    server.register("echo", echo)
    for _ in range(12):
        client = HttpClient(settings())
        assert await anext(client.open(target(server), 1, Context())) == 1
        await client.aclose()
    await eventually(lambda: server.connection_count <= 4)
    await server.aclose()
    assert not server.connection_count


async def test_a_drain_waits_for_callers_that_still_read() -> None:
    """The handler is done long before: the answer waits in the worker's HTTP server and on its way."""
    async with serving() as (server, client):
        done = asyncio.Event()

        async def many(_: Any, __: Context) -> AsyncIterator[bytes]:
            for _number in range(120):
                yield bytes(50_000)
            done.set()

        server.register("many", many)
        stream = client.open(target(server, "many"), None, Context())
        count = len([await anext(stream)])

        async def end() -> None:
            await server.drain(30)
            await server.aclose()

        ending = asyncio.create_task(end())
        await done.wait()
        await asyncio.wait([ending], timeout=1)
        async for _ in stream:
            count += 1
        assert count == 120
        await ending


async def test_full_connections_are_no_sign_of_death() -> None:
    async with serving() as (server, _):
        server.register("wait", wait)
        client = HttpClient(settings(pool_size=1, http2_max_concurrent_streams=2))
        target = Target(INSTANCE, server.address, "wait", SECRET)
        streams = [client.open(target, None, None) for _ in range(2)]
        assert [await anext(stream) for stream in streams] == [1, 1]
        with pytest.raises(Overloaded):
            await anext(client.open(target, None, None))
        await client.probe(target, 20)
        for stream in streams:
            await stream.aclose()
        await client.aclose()
