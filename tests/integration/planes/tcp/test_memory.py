"""The memory that peers can make the other side hold is bounded, and freed."""

from __future__ import annotations

import asyncio
import socket
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import msgpack
import psutil
import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import ConnectionLost, PayloadBudgetExceeded
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.frames import connection as tcp_connection
from dynamo_redis.planes.frames.client_connection import ClientConnection
from dynamo_redis.planes.frames.connection import WRITE_HIGH_WATER_BYTES
from dynamo_redis.planes.tcp.client import TcpClient
from dynamo_redis.planes.tcp.server import TcpServer
from dynamo_redis.wire import frame
from dynamo_redis.wire.codec import pack
from dynamo_redis.wire.handshake import ClientHandshake, ServerHandshake
from tests.tcp_plane import INSTANCE, SECRET, eventually

KIB, MIB = 1 << 10, 1 << 20
WINDOW = 20


def settings(**overrides: Any) -> PlaneSettings:
    return PlaneSettings.load(tcp_host="127.0.0.1", channel_buffer_count=WINDOW, **overrides)


# --------------------------------------------------------------------------- a server and bare callers


@asynccontextmanager
async def serving(**overrides: Any) -> AsyncIterator[TcpServer]:
    server = TcpServer(settings(**overrides), secret=SECRET, instance_id=INSTANCE)
    await server.start()

    async def echo(request: Any, _: Context) -> Any:
        return request

    async def hold(_: Any, context: Context) -> None:
        await context.async_killed_or_stopped()

    async def unread(_: Any, context: Context) -> None:
        await context.async_killed_or_stopped()

    async def total(messages: AsyncIterator[bytes], _: Context) -> int:
        return sum([len(message) async for message in messages])

    server.register("echo", echo)
    server.register("hold", hold)
    server.register("unread", unread, request_stream=True)
    server.register("total", total, request_stream=True)
    try:
        yield server
    finally:
        await server.aclose()
        assert server.payload_bytes == 0


class BareCaller:
    """A connection whose bytes are written and read by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._unpacker = msgpack.Unpacker(strict_map_key=False, max_buffer_size=0)

    def send(self, *frames: list[Any] | bytes) -> None:
        for one in frames:
            self.writer.write(one if isinstance(one, bytes) else pack(one))

    async def receive(self) -> Any:
        """Return the next frame, or None at the end of the connection."""
        async with asyncio.timeout(20):
            while True:
                with suppress(msgpack.OutOfData):
                    return self._unpacker.unpack()
                try:
                    data = await self.reader.read(65_536)
                except ConnectionError:
                    return None
                if not data:
                    return None
                self._unpacker.feed(data)

    def drop_buffered(self) -> int:
        """Drop the bytes that were read and are no frames yet; return their count."""
        return len(self._unpacker.read_bytes(1 << 30))

    async def receive_kind(self, kind: int) -> Any:
        while (received := await self.receive()) is not None and received[0] != kind:
            pass
        return received


@asynccontextmanager
async def calling(
    server: TcpServer, *, with_proof: bytes = b"", receive_buffer_bytes: int | None = None
) -> AsyncIterator[BareCaller]:
    """Connect a caller, and do the handshake. `with_proof` leaves in the same segment as its last message."""
    host, port = server.address.rsplit(":", 1)
    sock = socket.socket()
    if receive_buffer_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
    peer = BareCaller(*await asyncio.open_connection(sock=sock))
    handshake = ClientHandshake(SECRET, WINDOW, INSTANCE)
    peer.send(handshake.first_message())
    while handshake.server is None:
        answer, _ = handshake.feed(memoryview(await peer.reader.read(4096)))
        peer.send(answer + with_proof if answer else b"")
    try:
        yield peer
    finally:
        peer.writer.transport.abort()
        with suppress(OSError):
            await peer.writer.wait_closed()


def open_raw(stream_id: int, subject: str, size_bytes: int) -> list[Any]:
    return [frame.OPEN_RAW, stream_id, subject, 0, None, size_bytes, 1]


# --------------------------------------------------------------------------- what never comes to its end

UNFINISHED = {
    "half a frame": pack([frame.OPEN, 1, "echo", 0, None, "x" * 100])[:50],
    "one byte": pack([frame.PING, 0, 1])[:1],
    "no payload": pack(open_raw(1, "echo", MIB)),
    "half a payload": pack(open_raw(1, "echo", MIB)) + bytes(MIB // 2),
    "a payload that is skipped": pack(open_raw(1, "echo", 3 * MIB)),
}


@pytest.mark.parametrize("unfinished", UNFINISHED.values(), ids=UNFINISHED)
@pytest.mark.parametrize("with_proof", [False, True])
async def test_caller_that_stops_within_a_frame_is_dropped(unfinished: bytes, with_proof: bool) -> None:
    async with (
        serving(keepalive_interval_s=0.05, max_message_bytes=2 * MIB) as server,
        calling(server, with_proof=unfinished if with_proof else b"") as peer,
    ):
        if not with_proof:
            peer.send(unfinished)
        assert (await peer.receive_kind(frame.GOAWAY))[2] == "protocol_violation"
        await eventually(lambda: server.connection_count == 0)


@pytest.mark.parametrize("kind", ["frame", "payload"])
async def test_trickling_caller_is_dropped(kind: str) -> None:
    async with serving(keepalive_interval_s=0.1) as server, calling(server) as peer:
        peer.send(
            pack([frame.OPEN, 1, "echo", 0, None, "x" * 60_000])[:100]
            if kind == "frame"
            else pack(open_raw(1, "echo", MIB))
        )
        reason = asyncio.ensure_future(peer.receive_kind(frame.GOAWAY))
        for _ in range(2000):
            peer.send(b"x")
            await asyncio.sleep(0.01)
            if reason.done():
                break
        assert (await reason)[2] == "protocol_violation"


async def test_slow_is_not_stuck() -> None:
    """A payload or frame must progress by 16 KiB in two keepalive intervals, with or without streams."""
    async with serving(keepalive_interval_s=0.25) as server, calling(server) as peer:
        for whole in (
            pack(open_raw(1, "echo", MIB)) + bytes(MIB),
            pack([frame.OPEN, 2, "echo", 0, None, bytes(120_000)]),
        ):
            piece_bytes = len(whole) // 40
            for start in range(0, len(whole), piece_bytes):
                peer.send(whole[start : start + piece_bytes])
                await asyncio.sleep(0.015)
            answer = await peer.receive()
            while answer[0] == frame.PING:
                answer = await peer.receive()
            assert answer[0] == frame.LAST_RAW
            await peer.reader.readexactly(answer[2] - peer.drop_buffered())


async def test_idle_connection_is_kept() -> None:
    async with serving(keepalive_interval_s=0.02) as server, calling(server) as peer:
        peer.send([frame.PING, 0, 1])
        assert await peer.receive() == [frame.PONG, 0, 1]
        await asyncio.sleep(0.2)
        peer.send([frame.OPEN, 1, "echo", 0, None, "here"])
        assert await peer.receive() == [frame.LAST, 1, "here"]


async def test_many_callers_that_stop_within_a_frame_leave_nothing() -> None:
    async with serving(keepalive_interval_s=0.1) as server, AsyncExitStack() as stack:
        for _ in range(50):
            peer = await stack.enter_async_context(calling(server))
            peer.send(UNFINISHED["half a frame"])
        await eventually(lambda: server.connection_count == 0)


# --------------------------------------------------------------------------- large payloads


async def test_large_requests_are_bounded_together() -> None:
    async with (
        serving(max_payload_in_flight_bytes=6 * MIB) as server,  # a connection never has more than is left
        calling(server) as peer,
    ):
        for stream_id in (1, 2, 3):
            peer.send(open_raw(stream_id, "hold", MIB), bytes(MIB))
        await eventually(lambda: server.in_flight_count == 3)
        assert server.payload_bytes == 3 * MIB
        peer.send(open_raw(4, "hold", MIB), bytes(MIB), [frame.OPEN, 5, "echo", 0, None, "small"])
        _, stream_id, code, message, details = await peer.receive_kind(frame.ERROR)
        assert (stream_id, code) == (4, "overloaded")
        assert "DYN_TCP_MAX_PAYLOAD_BYTES_IN_FLIGHT" in message
        assert details["retry_after_ms"] > 0
        assert await peer.receive_kind(frame.LAST) == [frame.LAST, 5, "small"]  # no other stream is concerned
        peer.send([frame.CANCEL, 1, 2])
        await eventually(lambda: server.payload_bytes == 2 * MIB)
        peer.send(open_raw(6, "echo", MIB), bytes(MIB))
        assert (await peer.receive_kind(frame.LAST_RAW))[1] == 6
        await eventually(lambda: server.payload_bytes == 2 * MIB)


async def test_greedy_caller_leaves_room_for_others() -> None:
    async with serving(max_payload_in_flight_bytes=12 * MIB) as server, AsyncExitStack() as stack:
        greedy, second, third = [await stack.enter_async_context(calling(server)) for _ in range(3)]
        for peer, share in ((greedy, 6), (second, 3), (third, 2)):
            for stream_id in range(1, share + 2):
                peer.send(open_raw(stream_id, "hold", MIB), bytes(MIB))
            assert (await peer.receive_kind(frame.ERROR))[1:3] == [share + 1, "overloaded"]
        assert (server.in_flight_count, server.payload_bytes) == (11, 11 * MIB)
        greedy.writer.transport.abort()
        await eventually(lambda: server.payload_bytes == 5 * MIB)
        third.send(open_raw(4, "hold", MIB), bytes(MIB))
        await eventually(lambda: server.payload_bytes == 6 * MIB)


async def test_announced_payload_counts_before_its_bytes_come() -> None:
    async with serving() as server, AsyncExitStack() as stack:
        before = psutil.Process().memory_info().rss
        peers = [await stack.enter_async_context(calling(server)) for _ in range(34)]
        for peer in peers[:32]:
            peer.send(open_raw(1, "hold", 32 * MIB))
        await eventually(lambda: server.payload_bytes == 1 << 30)
        for peer in peers[32:]:
            peer.send(open_raw(1, "hold", 32 * MIB))
            assert (await peer.receive_kind(frame.ERROR))[2] == "overloaded"
        assert psutil.Process().memory_info().rss - before < 200 * MIB
        for peer in peers[:32]:
            peer.writer.transport.abort()
        await eventually(lambda: server.payload_bytes == 0)


async def test_large_payload_is_in_memory_once_a_side() -> None:
    """Beside the caller's request there is one copy of the echo at the worker and one at the caller."""
    content = bytes(32 * MIB)
    async with serving() as server:
        client = TcpClient(settings())
        target = Target(INSTANCE, server.address, "echo", SECRET)
        await anext(client.open(target, b"connect", None))
        tracemalloc.start()
        try:
            answer = await anext(client.open(target, content, None))
            held_bytes, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert answer == content
        assert held_bytes >= len(content), "it does count payloads"
        assert peak_bytes < 2.1 * len(content)
        await client.aclose()


async def test_payload_over_the_budget_passes_alone() -> None:
    async with serving(max_payload_in_flight_bytes=MIB) as server, calling(server) as peer:
        for stream_id in (1, 2):
            peer.send(open_raw(stream_id, "hold", 2 * MIB), bytes(2 * MIB))
        assert (await peer.receive_kind(frame.ERROR))[1:3] == [2, "overloaded"]
        assert server.in_flight_count == 1


@pytest.mark.parametrize("queued_count", [0, 1])
async def test_waiting_or_refused_large_request_frees_its_bytes(
    queued_count: int,
) -> None:
    async with (
        serving(max_in_flight_count=1, max_queued_count=queued_count) as server,
        calling(server) as peer,
    ):
        for stream_id in (1, 2, 3):
            peer.send(open_raw(stream_id, "hold", MIB), bytes(MIB))
        refused = [await peer.receive_kind(frame.ERROR) for _ in range(2 - queued_count)]
        assert [error[1:3] for error in refused][-1] == [3, "overloaded"]
        assert server.payload_bytes == (1 + queued_count) * MIB
        peer.send([frame.CANCEL, 2, 2])
        await eventually(lambda: server.payload_bytes == MIB)


async def test_unread_messages_of_a_request_stream_count_until_it_ends() -> None:
    async with serving(max_payload_in_flight_bytes=MIB + MIB // 2) as server, calling(server) as peer:
        for stream_id in (1, 2):
            peer.send([frame.OPEN, stream_id, "unread", frame.FLAG_REQUEST_STREAM, None, "first"])
            peer.send([frame.DATA_RAW, stream_id, MIB, 1], bytes(MIB))
        assert (await peer.receive_kind(frame.ERROR))[1:3] == [2, "overloaded"]
        assert (server.in_flight_count, server.payload_bytes) == (1, MIB)
        peer.send([frame.CANCEL, 1, 2])
        await eventually(lambda: server.payload_bytes == 0)


async def test_messages_that_are_read_count_no_more() -> None:
    async with serving(max_payload_in_flight_bytes=2 * MIB) as server, calling(server) as peer:
        peer.send([frame.OPEN, 1, "total", frame.FLAG_REQUEST_STREAM, None, b""])
        for _ in range(10):
            peer.send([frame.DATA_RAW, 1, MIB, 1], bytes(MIB))
            await peer.receive_kind(frame.CREDIT)
        peer.send([frame.END, 1])
        assert await peer.receive_kind(frame.LAST) == [frame.LAST, 1, 10 * MIB]


# --------------------------------------------------------------------------- callers that read nothing


def unsent_bytes(server: TcpServer) -> int:
    return sum(connection.transport.get_write_buffer_size() for connection in server._connections)


async def ask_for_large_answers(server: TcpServer, peer: BareCaller, count: int) -> None:
    """Have `count` answers of 1 MiB made at once, until the connection takes no more."""
    made = asyncio.Event()

    async def answer(_: Any, __: Context) -> bytes:
        await made.wait()
        return bytes(MIB)

    server.register("large", answer)
    for stream_id in range(1, count + 1):
        peer.send([frame.OPEN, stream_id, "large", 0, None, None])
    await eventually(lambda: server.in_flight_count == count)
    made.set()
    await eventually(lambda: unsent_bytes(server) > WRITE_HIGH_WATER_BYTES)


async def test_large_answers_wait_for_a_caller_that_reads() -> None:
    async with serving(keepalive_interval_s=30.0) as server, calling(server) as peer:
        await ask_for_large_answers(server, peer, 60)
        await asyncio.sleep(0.1)
        assert unsent_bytes(server) <= WRITE_HIGH_WATER_BYTES + 2 * MIB
        assert server.in_flight_count > 30
        await peer.reader.readexactly(60 * MIB)
        await eventually(lambda: server.in_flight_count == 0)


FLOODS: dict[str, Callable[[int], bytes]] = {
    "ping": lambda number: pack([frame.PING, 0, number]),
    "unknown endpoint": lambda number: pack([frame.OPEN, number, "nowhere", 0, None, None]),
    "overload": lambda number: pack([frame.OPEN, number, "hold", 0, None, None]),
    "malformed headers": lambda number: pack([frame.OPEN, number, "echo", 0, {"id": 1}, None]),
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
async def test_unread_answers_to_a_flood_are_bounded(flood: Callable[[int], bytes]) -> None:
    async with (
        serving(keepalive_interval_s=30.0, max_in_flight_count=1, max_queued_count=0) as server,
        calling(server, receive_buffer_bytes=4096) as peer,
    ):
        [connection] = server._connections
        connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        number, most = 1, 0
        while number < 2_000_000:
            peer.send(b"".join(map(flood, range(number, number + 5000))))
            number += 5000
            try:
                await asyncio.wait_for(peer.writer.drain(), 0.3)
            except TimeoutError:
                break
            most = max(most, unsent_bytes(server))
        assert number < 2_000_000, "it is still read from"
        assert most < 4 * MIB
        assert len(connection.streams) <= 1


async def test_caller_cannot_open_more_streams_than_may_run_or_wait() -> None:
    async with serving(max_in_flight_count=10, max_queued_count=20) as server, calling(server) as peer:
        for stream_id in range(1, 2001):
            peer.send([frame.OPEN, stream_id, "hold", 0, None, None])
        for stream_id in range(31, 2001):
            assert (await peer.receive_kind(frame.ERROR))[1:3] == [stream_id, "overloaded"]
        [connection] = server._connections
        assert sorted(connection.streams) == list(range(1, 31))


async def test_closed_connection_frees_unread_payloads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tcp_connection, "_LINGER_S", 0.1)
    async with serving(keepalive_interval_s=30.0) as server, calling(server) as peer:
        await ask_for_large_answers(server, peer, 30)
        [connection] = server._connections
        connection.close()
        assert server.connection_count == 0
        await eventually(lambda: server.in_flight_count == 0)
        await eventually(lambda: connection.transport.get_write_buffer_size() == 0)


# --------------------------------------------------------------------------- a client and bare servers


class BareServer(BareCaller):
    """The same at the serving side."""


@asynccontextmanager
async def called_by_client(**overrides: Any) -> AsyncIterator[tuple[TcpClient, Target, BareServer]]:
    """Connect a client to a bare server, after the handshake."""
    arrived: asyncio.Future[BareServer] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handshake = ServerHandshake(SECRET, WINDOW, INSTANCE)
        while not handshake.done:
            answer, _ = handshake.feed(memoryview(await reader.read(4096)))
            if handshake.asks_for_life:
                writer.transport.abort()
                return
            writer.write(answer)
        arrived.set_result(BareServer(reader, writer))

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    target = Target(INSTANCE, f"127.0.0.1:{port}", "test", SECRET)
    client = TcpClient(settings(**overrides))
    opening = asyncio.ensure_future(client.probe(target, 20))
    server = await arrived
    _, _, token = await server.receive_kind(frame.PING)
    server.send([frame.PONG, 0, token])
    await opening
    try:
        yield client, target, server
    finally:
        await client.aclose()
        server.writer.transport.abort()
        listener.close()
        assert client.payload_bytes == 0


def only_connection(client: TcpClient) -> ClientConnection:
    [pool] = client._pools.values()
    [connection] = pool._connections
    return connection


async def test_unread_large_items_are_bounded_together() -> None:
    async with called_by_client(max_payload_in_flight_bytes=4 * MIB) as (client, target, server):
        streams = [client.open(target, None, Context()) for _ in range(3)]
        for stream_id in (1, 2, 3):
            server.send([frame.LAST_RAW, stream_id, MIB, 1], bytes(MIB))
        with pytest.raises(PayloadBudgetExceeded) as caught:
            await anext(streams[2])
        assert not caught.value.retryable
        assert client.payload_bytes == 2 * MIB
        assert len(await anext(streams[0])) == MIB
        assert client.payload_bytes == MIB
        del streams  # not closed, only forgotten
        await eventually(lambda: client.payload_bytes == 0)


async def test_large_items_past_the_window_are_a_violation() -> None:
    async with called_by_client() as (client, target, server):
        stream = client.open(target, None, Context())
        for _ in range(10):  # a window of 20 lets two through, of 17 credits each
            server.send([frame.DATA_RAW, 1, MIB, 1], bytes(MIB))
        assert (await server.receive_kind(frame.GOAWAY))[2] == "protocol_violation"
        assert client.payload_bytes <= 2 * MIB
        await stream.aclose()
        assert client.payload_bytes == 0


async def test_large_items_of_a_stream_that_has_ended_are_dropped() -> None:
    async with called_by_client() as (client, target, server):
        first, second = client.open(target, None, Context()), client.open(target, None, Context())
        server.send([frame.LAST, 1, "end"])
        for _ in range(5):
            server.send([frame.DATA_RAW, 1, MIB, 1], bytes(MIB))
        server.send([frame.LAST, 2, "end"])
        assert [await anext(first), await anext(second)] == ["end", "end"]
        assert client.payload_bytes == 0


async def test_server_that_announces_and_stops_is_given_up() -> None:
    async with called_by_client(keepalive_interval_s=0.1) as (client, target, server):
        stream = client.open(target, None, Context())
        server.send([frame.LAST_RAW, 1, 32 * MIB, 1], b"x")
        await eventually(lambda: client.payload_bytes == 32 * MIB)
        with pytest.raises(ConnectionLost):
            await anext(stream)
        assert client.payload_bytes == 0


async def test_pongs_do_not_pile_up_for_a_server_that_does_not_read() -> None:
    async with called_by_client(keepalive_interval_s=30.0) as (client, target, server):
        streams = [client.open(target, None, Context()) for _ in range(2)]
        connection = only_connection(client)
        connection.pause_writing()  # as when the server has not read for long
        server.send(b"".join(pack([frame.PING, 0, number]) for number in range(1000)), [frame.LAST, 1, "end"])
        assert await anext(streams[0]) == "end"
        connection.resume_writing()
        server.send([frame.PING, 0, 1000], [frame.LAST, 2, "end"])
        assert await server.receive_kind(frame.PONG) == [frame.PONG, 0, 1000]


async def test_credit_waits_for_a_server_that_does_not_read() -> None:
    async with called_by_client(keepalive_interval_s=30.0) as (client, target, server):
        stream = client.open(target, None, Context())
        connection = only_connection(client)
        connection.pause_writing()
        for number in range(5):
            server.send([frame.BATCH, 1, [number] * WINDOW])  # as if it had been granted credit
            for _ in range(WINDOW):
                assert await anext(stream) == number
        connection.resume_writing()
        assert await server.receive_kind(frame.CREDIT) == [frame.CREDIT, 1, 5 * WINDOW]
        await stream.aclose()
