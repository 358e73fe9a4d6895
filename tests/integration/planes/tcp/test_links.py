"""Links that are slow, and connections that went stale while they were idle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from dynamo_redis.errors import CannotConnect, ConnectionLost, InstanceRemoved
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.frames import client_connection
from dynamo_redis.planes.tcp.client import TcpClient
from dynamo_redis.wire import frame
from dynamo_redis.wire.handshake import ServerHandshake
from dynamo_redis.wire.session import ClientStream
from faults.proxy import BLACK_HOLE, Proxy
from tests.fuzz.watch import Newcomers, settled
from tests.integration.planes.tcp.test_memory import (
    MIB,
    WINDOW,
    BareServer,
    called_by_client,
    only_connection,
    serving,
    settings,
)
from tests.tcp_plane import INSTANCE, SECRET, eventually, running_client


async def ask(client: TcpClient, target: Target, request: Any = 1) -> list[Any]:
    async with asyncio.timeout(30):
        return [item async for item in client.open(target, request, None)]


def target_at(port: int, subject: str = "test") -> Target:
    return Target(INSTANCE, f"127.0.0.1:{port}", subject, SECRET)


async def pass_time(seconds: float) -> None:
    """Wait until the event loop's clock has advanced."""
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    await eventually(lambda: loop.time() > until)


async def has_been_idle(client: TcpClient) -> None:
    """Wait until a connection counts as idle: its next request may find it gone."""
    connection = only_connection(client)
    await eventually(lambda: not connection.sweeping)
    await pass_time(2 * connection._sweep_interval_s)


# --------------------------------------------------------------------------- idle, and busy


async def test_busy_connection_is_not_closed_as_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_connection, "IDLE_CLOSE_S", 1.0)
    async with called_by_client(keepalive_interval_s=0.4) as (client, target, server):
        connection = only_connection(client)
        stream = client.open(target, None, None)
        assert (await server.receive_kind(frame.OPEN))[1] == 1
        await stream.aclose()
        await eventually(lambda: not connection.sweeping)
        server.send([frame.DATA_RAW, 1, MIB, 1], bytes(MIB // 2))  # late, of the stream that was closed
        await eventually(lambda: connection.sweeping)
        following = client.open(target, None, None)
        server.send(bytes(MIB // 2))
        for _ in range(20):
            await pass_time(0.1)
            server.send([frame.PONG, 0, 0])
        server.send([frame.LAST, 2, "late"])
        assert [item async for item in following] == ["late"]


async def test_probe_keeps_an_idle_connection_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_connection, "IDLE_CLOSE_S", 0.1)
    async with called_by_client() as (client, target, server):
        probing = asyncio.ensure_future(client.probe(target, 20))
        _, _, token = await server.receive_kind(frame.PING)
        await pass_time(0.5)
        server.send([frame.PONG, 0, token])
        await probing


async def test_forget_spares_the_dial_of_other_endpoints() -> None:
    async with bare_servers() as (port, arrived):
        client = TcpClient(settings())
        left, stays = client.open(target_at(port, "left"), 1, None), client.open(target_at(port), 1, None)
        server, handshake = await arrived()
        client.forget(target_at(port, "left"))
        with pytest.raises(InstanceRemoved):
            await anext(left)
        await shake(server, handshake)
        _, stream_id, subject, *_ = await server.receive_kind(frame.OPEN)
        assert subject == "test"
        server.send([frame.LAST, stream_id, "here"])
        assert [item async for item in stays] == ["here"]
        await client.aclose()


# --------------------------------------------------------------------------- slow links


async def test_accept_timeout_waits_for_the_own_upload() -> None:
    async with called_by_client(accept_timeout_s=1.0, pool_size=1) as (client, target, server):
        answer = asyncio.ensure_future(ask(client, target, bytes(24 * MIB)))
        for _ in range(25):  # nothing is read here, and most of it cannot leave there
            await pass_time(0.1)
            server.send([frame.PONG, 0, 0])
        assert not answer.done()
        await server.receive_kind(frame.OPEN_RAW)
        left_bytes = 24 * MIB - server.drop_buffered()
        while left_bytes:
            left_bytes -= len(await server.reader.read(min(left_bytes, MIB)))
        server.send([frame.LAST, 1, "all of it"])
        assert await answer == ["all of it"]


async def test_small_request_waits_for_a_dial_not_an_upload() -> None:
    async with bare_servers() as (port, arrived):
        client = TcpClient(settings())
        probing = asyncio.ensure_future(client.probe(target_at(port), 20))
        stuck = await shake(*await arrived())
        _, _, token = await stuck.receive_kind(frame.PING)
        stuck.send([frame.PONG, 0, token])
        await probing
        upload = client.open(target_at(port), bytes(24 * MIB), None)  # of which nothing is read
        small = asyncio.ensure_future(ask(client, target_at(port)))
        await answer_one(await shake(*await arrived()), "passed")
        assert await small == ["passed"]
        await upload.aclose()
        await client.aclose()


async def test_failed_dial_sends_small_request_to_busy_connection() -> None:
    async with serving() as server, Proxy(server.address) as proxy:
        client = TcpClient(settings())
        target = target_at(int(proxy.url.rpartition(":")[2]), "echo")
        await ask(client, target)
        proxy.refuse = True
        upload = asyncio.ensure_future(ask(client, target, bytes(1 << 25)))
        await pass_time(0)
        assert await ask(client, target, "small") == ["small"]
        assert await upload == [bytes(1 << 25)]
        assert client.connection_count == 1
        await client.aclose()


async def test_probe_does_not_wait_behind_an_upload() -> None:
    async with bare_servers() as (port, arrived):
        client = TcpClient(settings())
        upload = asyncio.ensure_future(ask(client, target_at(port), bytes(24 * MIB)))
        await shake(*await arrived())  # and reads no more
        await eventually(lambda: only_connection(client).paused)
        probing = asyncio.ensure_future(client.probe(target_at(port), 20))
        free = await shake(*await arrived())
        _, _, token = await free.receive_kind(frame.PING)
        free.send([frame.PONG, 0, token])
        await probing
        upload.cancel()
        await client.aclose()


# --------------------------------------------------------------------------- stale connections


@asynccontextmanager
async def bare_servers() -> AsyncIterator[tuple[int, Callable[[], Any]]]:
    """Yield a port, and a function that waits for the next connection there, before its handshake."""
    came: asyncio.Queue[tuple[BareServer, ServerHandshake]] = asyncio.Queue()
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        came.put_nowait((BareServer(reader, writer), ServerHandshake(SECRET, WINDOW, INSTANCE)))

    async def arrived() -> tuple[BareServer, ServerHandshake]:
        async with asyncio.timeout(20):
            return await came.get()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield listener.sockets[0].getsockname()[1], arrived
    finally:
        listener.close()
        for writer in writers:
            writer.transport.abort()


async def shake(server: BareServer, handshake: ServerHandshake) -> BareServer:
    while not handshake.done:
        answer, _ = handshake.feed(memoryview(await server.reader.read(4096)))
        server.writer.write(answer)
    return server


async def answer_one(server: BareServer, item: Any) -> None:
    _, stream_id, *_ = await server.receive_kind(frame.OPEN)
    server.send([frame.LAST, stream_id, item])


async def test_forgotten_connection_is_replaced() -> None:
    async with serving() as server:
        runs: list[Any] = []

        async def count(request: Any, _: Context) -> Any:
            runs.append(request)
            return request

        server.register("count", count)
        quiet: list[Target] = []
        async with Proxy(server.address) as proxy:
            client = TcpClient(settings(keepalive_interval_s=2.0), quiet.append)
            target = target_at(int(proxy.url.rpartition(":")[2]), "count")
            assert await ask(client, target, "first") == ["first"]
            await has_been_idle(client)
            for connection in proxy.connections:
                connection.conditions = BLACK_HOLE
            answers = await asyncio.gather(*(ask(client, target, n) for n in range(10)))
            assert answers == [[n] for n in range(10)]
            assert runs == ["first", *range(10)]
            assert client.connection_count == 1
            await client.probe(target, 20)
            await client.aclose()


@pytest.mark.parametrize("by_reset", [False, True])
async def test_closed_connection_costs_no_request(by_reset: bool) -> None:
    async with bare_servers() as (port, arrived):
        client = TcpClient(settings(keepalive_interval_s=0.4))
        first = asyncio.ensure_future(ask(client, target_at(port)))
        stale = await shake(*await arrived())
        await answer_one(stale, "first")
        assert await first == ["first"]
        await has_been_idle(client)
        second = asyncio.ensure_future(ask(client, target_at(port), "again"))
        await stale.receive_kind(frame.OPEN)
        if by_reset:
            stale.writer.transport.abort()
        else:
            stale.writer.close()
        await answer_one(await shake(*await arrived()), "second")
        assert await second == ["second"]
        await client.aclose()


async def test_lost_request_is_sent_again_once() -> None:
    async with bare_servers() as (port, arrived):
        client = TcpClient(settings(keepalive_interval_s=0.4))
        first = asyncio.ensure_future(ask(client, target_at(port)))
        server = await shake(*await arrived())
        await answer_one(server, "first")
        await first
        await has_been_idle(client)
        second = asyncio.ensure_future(ask(client, target_at(port)))
        await server.receive_kind(frame.OPEN)
        server.writer.transport.abort()
        server = await shake(*await arrived())
        await server.receive_kind(frame.OPEN)
        server.writer.transport.abort()
        with pytest.raises(ConnectionLost):
            await second
        await client.aclose()


async def test_request_that_ends_its_worker_is_known_as_lost() -> None:
    async with serving() as server, Proxy(server.address) as proxy:
        client = TcpClient(settings(keepalive_interval_s=0.4))
        target = target_at(int(proxy.url.rpartition(":")[2]), "echo")
        await ask(client, target)
        await has_been_idle(client)
        stream = client.open(target_at(int(proxy.url.rpartition(":")[2]), "hold"), 1, None)
        await eventually(lambda: server.in_flight_count == 1)
        proxy.refuse = True
        proxy.cut()
        with pytest.raises(ConnectionLost):
            await anext(stream)
        assert stream.sent
        await client.aclose()


async def test_answered_connection_is_not_stale() -> None:
    async with bare_servers() as (port, arrived):
        client = TcpClient(settings(keepalive_interval_s=0.4))
        first = asyncio.ensure_future(ask(client, target_at(port)))
        server = await shake(*await arrived())
        await answer_one(server, "first")
        await first
        await has_been_idle(client)
        stream = client.open(target_at(port), 1, None)
        _, stream_id, *_ = await server.receive_kind(frame.OPEN)
        server.send([frame.ACCEPT, stream_id])
        await eventually(lambda: stream.state is not ClientStream.WAITING)
        server.writer.transport.abort()
        with pytest.raises((ConnectionLost, CannotConnect)):
            await anext(stream)
        assert client.connection_count == 0
        await client.aclose()


async def test_killed_requests_without_an_answer_are_freed() -> None:
    """The connection stays, though its peer says nothing on it since it was idle."""
    new = Newcomers()

    def left_count() -> int:
        return new.census("planes.frames")["FrameResponseStream"]

    async def kill_one(client: TcpClient, port: int) -> None:
        async with client.open(target_at(port), 1, None) as stream:
            await eventually(lambda: stream.sent)

    async with bare_servers() as (port, arrived), running_client(keepalive_interval_s=0.4) as client:
        first = asyncio.ensure_future(ask(client, target_at(port)))
        await answer_one(await shake(*await arrived()), "first")
        await first
        await has_been_idle(client)
        await kill_one(client, port)
        await settled(lambda: not left_count(), left_count)
        assert client.connection_count == 1
