"""The tcp plane against bare peers: the effect of every frame on each side."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import product
from typing import Any

import msgpack
import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import (
    AuthenticationFailed,
    CannotConnect,
    ConfigError,
    ConnectionLost,
    Draining,
    EndpointNotFound,
    NotAccepted,
    Overloaded,
    PeerSilent,
    PlaneError,
    ProtocolViolation,
)
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.frames.connection import SILENT_S
from dynamo_redis.planes.frames.response_stream import FrameResponseStream
from dynamo_redis.planes.tcp.client import TcpClient
from dynamo_redis.planes.tcp.server import TcpServer
from dynamo_redis.wire import frame
from dynamo_redis.wire.codec import pack
from dynamo_redis.wire.handshake import ClientHandshake, ServerHandshake
from dynamo_redis.wire.session import (
    CLIENT_STEPS,
    KILL,
    OPEN_STREAMING,
    SERVER_STEPS,
    ClientStream,
    ServerStream,
)
from tests import tcp_plane
from tests.tcp_plane import INSTANCE, SECRET, eventually

WINDOW = 20
SMALL: dict[str, Any] = {"channel_buffer_count": WINDOW, "cancel_grace_s": 0}
running_server = partial(tcp_plane.running_server, **SMALL)
running_client = partial(tcp_plane.running_client, **SMALL)


class RawPeer:
    """A connection whose frames are written and read by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._unpacker = msgpack.Unpacker(strict_map_key=False)

    async def shake(self, handshake: ClientHandshake | ServerHandshake) -> None:
        if isinstance(handshake, ClientHandshake):
            self.writer.write(handshake.first_message())
        while not (handshake.server if isinstance(handshake, ClientHandshake) else handshake.done):
            data = await self.reader.read(4096)
            if not data:
                raise ConnectionResetError
            answer, rest = handshake.feed(memoryview(data))
            self.writer.write(answer)
            self._unpacker.feed(bytes(rest))

    def send(self, *frames: list[Any] | bytes) -> None:
        for one in frames:
            self.writer.write(one if isinstance(one, bytes) else pack(one))

    async def receive(self, timeout_s: float = 3.0) -> Any:
        """Return the next frame, or None at the end of the connection."""
        async with asyncio.timeout(timeout_s):
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

    async def receive_kind(self, kind: int, timeout_s: float = 3.0) -> Any:
        while (received := await self.receive(timeout_s)) is not None:
            if received[0] == kind:
                return received
        return None

    async def is_alive(self) -> bool:
        """Return whether the other side answers a PING. Frames before the PONG are dropped."""
        self.send([frame.PING, 0, 99])
        return bool(await self.receive_kind(frame.PONG))

    async def reason(self) -> str | None:
        """Return the code of the GOAWAY with which the other side closes."""
        goaway = await self.receive_kind(frame.GOAWAY)
        return None if goaway is None else str(goaway[2])

    async def close(self) -> None:
        self.writer.transport.abort()
        with suppress(OSError):
            await self.writer.wait_closed()


def settings(**overrides: Any) -> PlaneSettings:
    return PlaneSettings.load(**{**SMALL, **overrides})


@pytest.fixture
async def server() -> AsyncIterator[TcpServer]:
    async with running_server() as made:
        yield made


@asynccontextmanager
async def raw_client(server: TcpServer, *, shake: bool = True) -> AsyncIterator[RawPeer]:
    host, port = server.address.rsplit(":", 1)
    peer = RawPeer(*await asyncio.open_connection(host, int(port)))
    try:
        if shake:
            await peer.shake(ClientHandshake(SECRET, WINDOW, INSTANCE))
        yield peer
    finally:
        await peer.close()


def open_frame(stream_id: int, subject: str, request: Any = None, flags: int = 0) -> list[Any]:
    return [frame.OPEN, stream_id, subject, flags, None, request]


# --------------------------------------------------------------------------- the server, frame by frame

EXAMPLES: dict[int, list[Any]] = {
    frame.OPEN: open_frame(1, "wait"),
    OPEN_STREAMING: open_frame(1, "total", 0, frame.FLAG_REQUEST_STREAM),
    frame.DATA: [frame.DATA, 1, "x"],
    frame.BATCH: [frame.BATCH, 1, ["x", "y"]],
    frame.END: [frame.END, 1],
    frame.LAST: [frame.LAST, 1, "x"],
    frame.LAST_BATCH: [frame.LAST_BATCH, 1, ["x", "y"]],
    frame.ERROR: [frame.ERROR, 1, "overloaded", "full", None],
    frame.ACCEPT: [frame.ACCEPT, 1],
    frame.CREDIT: [frame.CREDIT, 1, 5],
    frame.CANCEL: [frame.CANCEL, 1, 1],
    KILL: [frame.CANCEL, 1, 2],
    frame.DATA_RAW: [frame.DATA_RAW, 1, 0, 1],
    frame.LAST_RAW: [frame.LAST_RAW, 1, 0, 1],
    0: [0, 1, None],
    17: [17, 1, None],
    63: [63, 1, None],
    -5: [-5, 1, None],
    200: [200, 1, None],
}
OPTIONAL_EXAMPLES: list[list[Any]] = [[64, 1, None], [100, 0, "a", "b"], [127, 77]]


async def reach_server_state(peer: RawPeer, state: ServerStream) -> None:
    if state is ServerStream.RECEIVING:
        peer.send(EXAMPLES[OPEN_STREAMING])
    elif state is ServerStream.RUNNING:
        peer.send(EXAMPLES[frame.OPEN])
    elif state is ServerStream.CLOSED:
        peer.send(open_frame(1, "echo"))
    assert await peer.is_alive()


@pytest.mark.parametrize("state", list(ServerStream))
async def test_server_accepts_exactly_the_frames_of_its_table(server: TcpServer, state: ServerStream) -> None:
    for kind, example in EXAMPLES.items():
        async with raw_client(server) as peer:
            await reach_server_state(peer, state)
            peer.send(example)
            if kind in SERVER_STEPS[state]:
                assert await peer.is_alive(), (state, kind)
            else:
                assert await peer.reason() == "protocol_violation", (state, kind)
                assert await peer.receive() is None
    await eventually(lambda: server.in_flight_count == 0)


@pytest.mark.parametrize("example", OPTIONAL_EXAMPLES)
async def test_unknown_optional_frames_are_skipped(server: TcpServer, example: list[Any]) -> None:
    async with raw_client(server) as peer:
        peer.send(example, open_frame(1, "echo", "hi"))
        assert await peer.receive() == [frame.LAST, 1, "hi"]


@pytest.mark.parametrize(
    "malformed",
    [
        b"\xc1",
        b"\x91" * 2000,
        [frame.OPEN, 1],
        [frame.OPEN, 1, "echo", 0, None],
        [frame.OPEN, 1, "echo", 0, None, 1, 2],
        [frame.OPEN, "1", "echo", 0, None, 1],
        [frame.OPEN, 0, "echo", 0, None, 1],
        [frame.OPEN, 2**31, "echo", 0, None, 1],
        [frame.OPEN, 1, 5, 0, None, 1],
        [frame.OPEN, 1, "echo", "0", None, 1],
        [frame.OPEN, 1, "echo", 0, [], 1],
        [frame.PING, 0],
        [frame.PING, 0, "x" * 100],
        [frame.CREDIT, 1],
        [frame.CREDIT, 1, 0],
        [frame.CREDIT, 1, -1],
        [frame.CREDIT, 1, "5"],
        [frame.CANCEL, 1],
        [frame.CANCEL, 1, 3],
        [frame.BATCH, 2, "xy"],
        [frame.BATCH, 2, []],
        [frame.DATA, 2],
        [[], 1],
        [frame.DATA, []],
        [frame.DATA, {}, 1],
        [frame.DATA_RAW, 2, 2**40, 1],
    ],
)
async def test_malformed_frames_close_the_connection_and_nothing_else(
    server: TcpServer, malformed: Any
) -> None:
    async with raw_client(server) as peer, raw_client(server) as other:
        if isinstance(malformed, list) and malformed[0] in (frame.CREDIT, frame.CANCEL):
            peer.send(open_frame(1, "wait"))
        elif malformed[1:2] == [2]:
            peer.send(open_frame(1, "echo"), open_frame(2, "total", 0, frame.FLAG_REQUEST_STREAM))
        peer.send(malformed)
        assert await peer.reason() == "protocol_violation"
        assert await peer.receive() is None
        assert await other.is_alive()
    await eventually(lambda: server.in_flight_count == 0)


async def test_stream_ids_go_up(server: TcpServer) -> None:
    async with raw_client(server) as peer:
        peer.send(open_frame(5, "echo"))
        assert await peer.receive() == [frame.LAST, 5, None]
        peer.send(open_frame(4, "echo"))
        assert await peer.reason() == "protocol_violation"


async def test_malformed_headers_fail_the_request_only(server: TcpServer) -> None:
    wrong: tuple[dict[str, Any], ...] = (
        {"id": 5},
        {"deadline_ms": -1},
        {"deadline_ms": 1.5},
        {"traceparent": 1},
        {"meta": []},
        {"meta": {"a": 1}},
        {"meta": {1: "a"}},
        {"meta": {"a": "b", "c": None}},
        {"deadline_ms": 2**53 + 1},
    )
    right: tuple[dict[str, Any], ...] = (
        {"of a later release": [1]},
        {"deadline_ms": 2**53},
        {"meta": {}},
        {"meta": {"a": "b"}},
    )
    async with raw_client(server) as peer:
        for number, headers in enumerate(wrong, 1):
            peer.send([frame.OPEN, number, "echo", 0, headers, 1])
            received = await peer.receive()
            assert received[:3] == [frame.ERROR, number, "invalid_request"]
        for number, headers in enumerate(right, 91):
            peer.send([frame.OPEN, number, "echo", 0, headers, 1])
            assert await peer.receive() == [frame.LAST, number, 1]


@pytest.mark.parametrize("subject", ["echo", "total"])
async def test_unknown_flags_fail_the_request_only(server: TcpServer, subject: str) -> None:
    async with raw_client(server) as peer:
        for number, flags in enumerate((2, 3, 2**63, 2**64 - 1, -1), 1):
            peer.send(open_frame(number, subject, "x", flags), [frame.DATA, number, "x"])
            assert (await peer.receive())[:3] == [frame.ERROR, number, "invalid_request"]
        assert await peer.is_alive()


async def test_more_messages_than_the_window_are_a_violation(server: TcpServer) -> None:
    async with raw_client(server) as peer:
        peer.send(
            open_frame(1, "unread", 0, frame.FLAG_REQUEST_STREAM), [frame.BATCH, 1, list(range(WINDOW))]
        )
        assert await peer.is_alive()
        peer.send([frame.DATA, 1, "one more"])
        assert await peer.reason() == "protocol_violation"


async def test_no_item_is_sent_without_credit(server: TcpServer) -> None:
    async def endless(_: Any, __: Context) -> AsyncIterator[int]:
        for number in range(10_000):
            yield number

    server.register("endless", endless)
    async with raw_client(server) as peer:
        peer.send(open_frame(1, "endless"))
        received = (await peer.receive())[2]
        assert received == list(range(WINDOW))
        assert await peer.is_alive()
        peer.send([frame.CREDIT, 1, 5])
        assert (await peer.receive())[2] == list(range(WINDOW, WINDOW + 5))


async def test_streams_that_bring_items_turn_after_turn_share_frames(
    server: TcpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items of a single stream, and the last ones before a pause, leave at once."""
    monkeypatch.setattr("dynamo_redis.planes.frames.connection._GATHER_S", 60.0)

    async def ticking(request: int, context: Context) -> AsyncIterator[int]:
        for number in range(request):
            await asyncio.sleep(0)
            yield number
        await context.async_killed_or_stopped()

    server.register("ticking", ticking)

    async def frame_count(peer: RawPeer, item_count: int) -> int:
        count = 0
        while item_count > 0:
            received = await peer.receive()
            item_count -= len(received[2]) if received[0] == frame.BATCH else 1
            count += 1
        return count

    async with raw_client(server, shake=False) as peer:
        await peer.shake(ClientHandshake(SECRET, 1000, INSTANCE))
        peer.send(open_frame(1, "ticking", 64))
        assert await frame_count(peer, 64) == 64
        peer.send(open_frame(2, "ticking", 64), open_frame(3, "ticking", 64))
        assert await frame_count(peer, 128) <= 128 / 4
        for stream_id in range(4, 8):
            peer.send(open_frame(stream_id, "ticking", 1))
            assert await peer.receive() == [frame.DATA, stream_id, 0]


async def test_request_that_keeps_quiet_is_accepted_within_a_second(server: TcpServer) -> None:
    async with raw_client(server) as peer:
        began = time.monotonic()
        peer.send(open_frame(1, "hang"))
        assert await peer.receive() == [frame.ACCEPT, 1]
        assert time.monotonic() - began < 8
        peer.send([frame.CANCEL, 1, 2])
        await eventually(lambda: server.in_flight_count == 0)


async def test_immediate_answer_needs_no_accept(server: TcpServer) -> None:
    async with raw_client(server) as peer:
        peer.send(open_frame(1, "wait"))
        assert await peer.receive() == [frame.DATA, 1, 1]
        await asyncio.sleep(1.2)
        assert (await peer.receive())[0] == frame.PING
        peer.send([frame.CANCEL, 1, 1])
        assert await peer.receive() == [frame.LAST, 1, 2]


async def test_end_rides_on_the_last_frame(server: TcpServer) -> None:
    async def burst(request: int, _: Context) -> AsyncIterator[int]:
        for number in range(request):
            yield number

    server.register("burst", burst)
    async with raw_client(server) as peer:
        for number, (count, expected) in enumerate(
            [(0, [frame.END, 1]), (1, [frame.LAST, 2, 0]), (3, [frame.LAST_BATCH, 3, [0, 1, 2]])], 1
        ):
            peer.send(open_frame(number, "burst", count))
            assert await peer.receive() == expected


@pytest.mark.parametrize("leave", ["close", "abort", "half-close"])
async def test_caller_that_vanishes_cancels_its_handlers_at_once(server: TcpServer, leave: str) -> None:
    async with raw_client(server) as peer:
        peer.send(*(open_frame(number, "hang") for number in range(1, 51)))
        await eventually(lambda: server.in_flight_count == 50)
        if leave == "abort":
            peer.writer.transport.abort()
        elif leave == "half-close":
            peer.writer.write_eof()
        else:
            peer.writer.close()
        await eventually(lambda: server.in_flight_count == 0, 0.5)
        await eventually(lambda: server.connection_count == 0, 0.5)


async def test_drain_waits_until_sent_answers_are_read(server: TcpServer) -> None:
    """The server has nothing left to write: the caller's PONG shows that it has read the answer."""
    may_answer = asyncio.Event()

    async def held(_: Any, __: Context) -> bytes:
        await may_answer.wait()
        return b"x" * 60_000

    server.register("held", held)
    async with raw_client(server) as peer:
        peer.send(open_frame(1, "held"))
        await eventually(lambda: server.in_flight_count == 1)
        may_answer.set()
        await eventually(lambda: server.in_flight_count == 0)
        draining = asyncio.create_task(server.drain(60))
        await asyncio.wait([draining], timeout=1.5)  # longer than callers that have read all are waited for
        assert not draining.done()
        assert await peer.receive() == [frame.LAST, 1, b"x" * 60_000]
        ping = await peer.receive_kind(frame.PING)
        peer.send([frame.PONG, 0, ping[2]])
        await asyncio.wait_for(draining, 10)


async def test_caller_that_reads_nothing_is_read_from_no_more(server: TcpServer) -> None:
    async with raw_client(server) as peer, raw_client(server) as other:
        sent, request = 0, pack(open_frame(0, "echo", b"x" * 60_000))
        head = len(pack([frame.OPEN]))
        stalled = False
        while not stalled and sent < 4000:
            sent += 1
            peer.send(request[:head] + pack(sent) + request[head + 1 :])
            try:
                await asyncio.wait_for(peer.writer.drain(), 0.5)
            except TimeoutError:
                stalled = True
        assert stalled
        await eventually(lambda: server.connection_count == 1, 60)  # and it is given up in the end
        assert await other.is_alive()


# --------------------------------------------------------------------------- the server's door


async def test_handshake_that_never_ends_is_ended() -> None:
    async with running_server(connect_timeout_s=0.2) as server:
        async with raw_client(server, shake=False) as peer:
            hello = ClientHandshake(SECRET, WINDOW, INSTANCE).first_message()
            for byte in hello[:-1]:
                peer.writer.write(bytes((byte,)))
            await peer.reader.read()
        async with raw_client(server, shake=False) as peer:
            peer.writer.write(ClientHandshake(SECRET, WINDOW, INSTANCE).first_message())
            await peer.reader.read()
        await eventually(lambda: server.connection_count == 0)


async def test_recorded_handshake_cannot_be_replayed(server: TcpServer) -> None:
    recorded: list[bytes] = []
    async with raw_client(server, shake=False) as peer:
        handshake = ClientHandshake(SECRET, WINDOW, INSTANCE)
        recorded.append(handshake.first_message())
        peer.writer.write(recorded[0])
        proof, _ = handshake.feed(memoryview(await peer.reader.read(4096)))
        recorded.append(proof)
        peer.writer.write(proof)
        assert await peer.is_alive()
    async with raw_client(server, shake=False) as peer:
        peer.writer.write(recorded[0])
        await peer.reader.read(4096)
        peer.send(recorded[1], open_frame(1, "echo"))
        received = await peer.receive()
        assert received[:3] == [frame.GOAWAY, 0, "authentication_failed"]
        assert await peer.receive() is None


async def test_frames_before_the_proof_are_not_served(server: TcpServer) -> None:
    async with raw_client(server, shake=False) as peer:
        peer.send(open_frame(1, "echo"))
        refused = await peer.reader.read()
        assert b"protocol_violation" in refused
        assert server.in_flight_count == 0


async def test_connections_are_bounded() -> None:
    async with running_server(max_connections_count=3) as server:
        async with raw_client(server) as one, raw_client(server) as two, raw_client(server) as three:
            async with raw_client(server, shake=False) as fourth:
                assert b"overloaded" in await fourth.reader.read()
            for peer in (one, two, three):
                assert await peer.is_alive()
        await eventually(lambda: server.connection_count == 0)
        async with raw_client(server) as peer:
            assert await peer.is_alive()


async def test_explicit_port_in_use_is_a_clear_error(server: TcpServer) -> None:
    port = int(server.address.rsplit(":", 1)[1])
    second = TcpServer(settings(tcp_host="127.0.0.1", tcp_port=port), secret=SECRET, instance_id=8)
    with pytest.raises(ConfigError, match=f"DYN_TCP_RPC_PORT={port}: 127.0.0.1:{port} is in use"):
        await second.start()
    await second.aclose()


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
async def test_ipv6() -> None:
    try:
        async with running_server(tcp_host="::1") as server:
            assert server.address.startswith("[::1]:")
            client = TcpClient(settings())
            target = Target(INSTANCE, server.address, "echo", SECRET)
            assert await anext(client.open(target, "hi", Context())) == "hi"
            await client.aclose()
    except ConfigError:
        pytest.skip("no IPv6 loopback here")


async def test_advertised_address_is_that_of_the_settings() -> None:
    async with running_server(tcp_advertise_host="worker.example", tcp_advertise_port=1234) as server:
        assert server.address == "worker.example:1234"


# --------------------------------------------------------------------------- the client, frame by frame


@asynccontextmanager
async def raw_server(
    serve: Callable[[RawPeer], Awaitable[None]], *, shake: bool = True
) -> AsyncIterator[Target]:
    """Run a bare server whose connections `serve` handles."""
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = RawPeer(reader, writer)
        tasks.add(task) if (task := asyncio.current_task()) else None
        try:
            if shake:
                await peer.shake(ServerHandshake(SECRET, WINDOW, INSTANCE))
            await serve(peer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            await peer.close()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    try:
        yield Target(INSTANCE, f"127.0.0.1:{port}", "test", SECRET)
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def items_of(stream: FrameResponseStream) -> tuple[list[Any], Exception | None]:
    """Return the items of a stream, and the error that ends it."""
    items: list[Any] = []
    try:
        while True:
            items.append(await anext(stream))
    except StopAsyncIteration:
        return items, None
    except PlaneError as exc:
        return items, exc


@pytest.mark.parametrize(("state", "kind"), list(product(ClientStream, EXAMPLES)))
async def test_client_accepts_exactly_the_frames_of_its_table(state: ClientStream, kind: int) -> None:
    verdict: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()

    async def serve(peer: RawPeer) -> None:
        await peer.receive_kind(frame.OPEN)
        example = list(EXAMPLES[kind])
        if state is ClientStream.ANSWERED:
            peer.send([frame.ACCEPT, 1])
        elif state is ClientStream.CLOSED:
            peer.send([frame.END, 1])
        elif state is ClientStream.UNOPENED:
            example[1] = 2
        peer.send(example, [frame.PING, 0, 1])
        while (received := await peer.receive()) is not None:
            if received[0] in (frame.PONG, frame.GOAWAY):
                verdict.set_result(None if received[0] == frame.PONG else received[2])
                return

    async with raw_server(serve) as target, running_client() as client:
        stream = client.open(target, None, Context())
        reader = asyncio.ensure_future(items_of(stream))
        allowed = kind in CLIENT_STEPS[state]
        assert await asyncio.wait_for(verdict, 30) == (None if allowed else "protocol_violation")
        await stream.aclose()
        _, error = await reader
        if not allowed and state is not ClientStream.CLOSED:
            assert isinstance(error, ProtocolViolation)
        assert client.pending_count == 0


@pytest.mark.parametrize(
    "malformed",
    [
        b"\xc1",
        [frame.DATA, 1],
        [frame.LAST, 1],
        [frame.BATCH, 1, "x"],
        [frame.LAST_BATCH, 1],
        [frame.LAST_BATCH, 1, []],
        [frame.LAST_BATCH, 1, list(range(WINDOW + 1))],
        [frame.ERROR, 1],
        [frame.ERROR, 1, 5, "x", None],
        [frame.ERROR, 1, "overloaded", "x", "y"],
        [frame.GOAWAY, 0],
        [frame.PONG, 0, "x"],
    ],
)
async def test_malformed_frames_end_the_requests_with_the_reason(malformed: Any) -> None:
    async def serve(peer: RawPeer) -> None:
        await peer.receive()
        peer.send(malformed)
        assert await peer.reason() == "protocol_violation"

    async with raw_server(serve) as target, running_client() as client:
        reading = asyncio.ensure_future(items_of(client.open(target, None, Context())))
        later = client.open(target, None, Context())
        assert isinstance((await asyncio.wait_for(reading, 30))[1], ProtocolViolation)
        assert isinstance((await items_of(later))[1], ProtocolViolation)
        assert client.pending_count == 0


@pytest.mark.parametrize("example", OPTIONAL_EXAMPLES)
async def test_client_skips_unknown_optional_frames(example: list[Any]) -> None:
    async def serve(peer: RawPeer) -> None:
        await peer.receive()
        peer.send(example, [frame.LAST, 1, "hi"])
        await peer.receive()

    async with raw_server(serve) as target, running_client() as client:
        assert await items_of(client.open(target, None, Context())) == (["hi"], None)


async def test_server_that_sends_past_the_window_is_cut_off() -> None:
    async def serve(peer: RawPeer) -> None:
        await peer.receive()
        for number in range(WINDOW + 2):
            peer.send([frame.DATA, 1, number])
        assert await peer.reason() == "protocol_violation"

    async with raw_server(serve) as target, running_client() as client:
        stream = client.open(target, None, Context())
        await eventually(lambda: client.pending_count == 0)
        items, error = await items_of(stream)
        assert items == list(range(len(items)))
        assert isinstance(error, ProtocolViolation)


async def test_credit_comes_back_as_items_are_read() -> None:
    async def serve(peer: RawPeer) -> None:
        await peer.receive()
        peer.send([frame.BATCH, 1, list(range(WINDOW))])
        assert await peer.receive() == [frame.CREDIT, 1, WINDOW // 2]
        assert await peer.receive() == [frame.CREDIT, 1, WINDOW // 2]
        peer.send([frame.END, 1])
        await peer.receive()

    async with raw_server(serve) as target, running_client() as client:
        assert await items_of(client.open(target, None, Context())) == (list(range(WINDOW)), None)


async def test_cut_connection_delivers_received_items() -> None:
    async def serve(peer: RawPeer) -> None:
        await peer.receive()
        peer.send([frame.BATCH, 1, ["a", "b"]], b"\x93\x02\x01")
        await peer.writer.drain()

    async with raw_server(serve) as target, running_client() as client:
        items, error = await items_of(client.open(target, None, Context()))
        assert items == ["a", "b"]
        assert isinstance(error, ConnectionLost)
        assert error.retryable


async def test_request_that_is_not_accepted_in_time() -> None:
    async def serve(peer: RawPeer) -> None:
        while (received := await peer.receive(10)) is not None:
            if received[0] == frame.PING:
                peer.send([frame.PONG, 0, received[2]])

    async with (
        raw_server(serve) as target,
        running_client(accept_timeout_s=0.6, keepalive_interval_s=0.2) as client,
    ):
        began = time.monotonic()
        _, error = await items_of(client.open(target, None, Context()))
        assert isinstance(error, NotAccepted)
        assert 0.5 < time.monotonic() - began < 8


async def test_accepted_request_has_no_time_limit() -> None:
    async def serve(peer: RawPeer) -> None:
        await peer.receive()
        peer.send([frame.ACCEPT, 1])
        await asyncio.sleep(1)
        peer.send([frame.LAST, 1, "late"])
        await peer.receive_kind(frame.OPEN)

    async with raw_server(serve) as target, running_client(accept_timeout_s=0.3) as client:
        assert await items_of(client.open(target, None, Context())) == (["late"], None)


async def test_server_without_a_handshake() -> None:
    async def serve(peer: RawPeer) -> None:
        await peer.reader.read()

    async with raw_server(serve, shake=False) as target, running_client(connect_timeout_s=0.2) as client:
        _, error = await items_of(client.open(target, None, Context()))
        assert isinstance(error, CannotConnect)
        with pytest.raises(CannotConnect):
            await client.probe(target, 0.1)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00", b"", b"\x00\x05hello"])
async def test_server_that_speaks_something_else(answer: bytes) -> None:
    async def serve(peer: RawPeer) -> None:
        await peer.reader.read(10)
        peer.writer.write(answer)

    async with raw_server(serve, shake=False) as target, running_client() as client:
        _, error = await items_of(client.open(target, None, Context()))
        assert isinstance(error, ProtocolViolation | CannotConnect)


async def test_address_that_is_none() -> None:
    async with running_client() as client:
        for address in ("nowhere", "::1:80", "127.0.0.1:x", "127.0.0.1:99999", ":80"):
            _, error = await items_of(client.open(Target(1, address, "test", SECRET), None, Context()))
            assert isinstance(error, CannotConnect), address


async def test_goaway_diverts_new_requests_and_finishes_the_rest() -> None:
    async def serve(peer: RawPeer) -> None:
        await peer.receive()
        peer.send([frame.GOAWAY, 0, "draining", "bye"])
        await asyncio.sleep(0.1)
        peer.send([frame.LAST, 1, "done"])
        assert await peer.receive() is None

    async with raw_server(serve) as target, running_client() as client:
        under_way = asyncio.ensure_future(items_of(client.open(target, None, Context())))
        await asyncio.sleep(0.05)
        _, error = await items_of(client.open(target, None, Context()))
        assert isinstance(error, Draining)
        assert await under_way == (["done"], None)
        await eventually(lambda: client.connection_count == 0)


async def test_stream_ids_that_run_out_open_another_connection(
    server: TcpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame, "MAX_STREAM_ID", 10)
    async with running_client() as client:
        target = Target(INSTANCE, server.address, "echo", SECRET)
        for number in range(35):
            assert await items_of(client.open(target, number, Context())) == ([number], None)
        assert client.connection_count <= 1


async def test_worker_restarted_on_its_port_with_a_new_secret(server: TcpServer) -> None:
    async with running_client() as client:
        old = Target(INSTANCE, server.address, "echo", SECRET)
        assert await items_of(client.open(old, 1, Context())) == ([1], None)
        await server.aclose()
        await eventually(lambda: client.connection_count == 0)
        port = int(server.address.rsplit(":", 1)[1])
        second = TcpServer(
            settings(tcp_host="127.0.0.1", tcp_port=port), secret=b"new" * 11, instance_id=INSTANCE
        )
        await second.start()
        await eventually(lambda: client.connection_count == 0)
        _, error = await items_of(client.open(old, 1, Context()))
        assert isinstance(error, AuthenticationFailed)
        fresh = Target(INSTANCE, second.address, "echo", b"new" * 11)
        _, error = await items_of(client.open(fresh, 1, Context()))
        assert isinstance(error, EndpointNotFound)
        await second.aclose()


async def test_refusal_reaches_all_waiting_requests() -> None:
    async with (
        running_server(max_connections_count=1) as server,
        raw_client(server),
        running_client() as client,
    ):
        target = Target(INSTANCE, server.address, "echo", SECRET)
        answers = await asyncio.gather(*(items_of(client.open(target, 1, Context())) for _ in range(5)))
        assert all(isinstance(error, Overloaded) for _, error in answers)


# --------------------------------------------------------------------------- keepalive


async def test_silent_peer_is_probed_and_given_up() -> None:
    frames: list[Any] = []

    async def serve(peer: RawPeer) -> None:
        while (received := await peer.receive(60)) is not None:
            frames.append(received)

    async with (
        raw_server(serve) as target,
        running_client(keepalive_interval_s=0.2, accept_timeout_s=60) as client,
    ):
        began = time.monotonic()
        _, error = await items_of(client.open(target, None, Context()))
        assert isinstance(error, PeerSilent)
        assert "silent" in str(error)
        assert time.monotonic() - began > SILENT_S
        assert frame.PING in [received[0] for received in frames]


async def test_peer_that_answers_probes_is_kept() -> None:
    async def serve(peer: RawPeer) -> None:
        await peer.receive()
        for _ in range(5):
            ping = await peer.receive()
            assert ping[:2] == [frame.PING, 0]
            peer.send([frame.PONG, 0, ping[2]])
        peer.send([frame.LAST, 1, "still here"])
        await peer.receive()

    async with raw_server(serve) as target, running_client(keepalive_interval_s=0.1) as client:
        assert await items_of(client.open(target, None, Context())) == (["still here"], None)


async def test_server_gives_up_a_silent_caller() -> None:
    async with running_server(keepalive_interval_s=0.2) as server, raw_client(server) as peer:
        peer.send(open_frame(1, "hang"))
        await eventually(lambda: server.in_flight_count == 1)
        await eventually(lambda: server.in_flight_count == 0, 60)
        assert await peer.receive_kind(frame.PING) is not None


async def test_slow_upload_gets_pings() -> None:
    async with running_server(keepalive_interval_s=0.1) as server, raw_client(server) as peer:
        size = 200_000
        peer.send([frame.OPEN_RAW, 1, "echo", 0, None, size, 1])
        for _ in range(20):
            peer.send(bytes(size // 20))
            await asyncio.sleep(0.03)
        kinds = []
        while (received := await peer.receive())[0] != frame.LAST_RAW:
            kinds.append(received[0])
        assert kinds.count(frame.PING) >= 5
