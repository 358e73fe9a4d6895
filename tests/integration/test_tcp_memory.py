"""What one peer, or many, can make the other side hold: nothing without a bound, nothing for ever."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import msgpack
import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.tcp_server import TcpServer
from dynamo_redis.wire import frame
from dynamo_redis.wire.codec import pack
from dynamo_redis.wire.handshake import ClientHandshake

SECRET = b"a secret of the instance, random"
INSTANCE = 7
KIB, MIB = 1 << 10, 1 << 20
WINDOW = 20


def settings(**overrides: Any) -> PlaneSettings:
    return PlaneSettings.load(tcp_host="127.0.0.1", channel_buffer_count=WINDOW, **overrides)


async def eventually(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        await asyncio.sleep(0.005)


# --------------------------------------------------------------------------- a server and bare callers


@asynccontextmanager
async def serving(**overrides: Any) -> AsyncIterator[TcpServer]:
    server = TcpServer(settings(**overrides), secret=SECRET, instance_id=INSTANCE)
    await server.start()

    async def echo(request: Any, _: Context) -> Any:
        return request

    async def hold(_: Any, context: Context) -> None:
        await context.async_killed_or_stopped()

    server.register("echo", echo)
    server.register("hold", hold)
    try:
        yield server
    finally:
        await server.aclose()


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
        """The next frame, or None at the end of the connection."""
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
        """Forget what has been read and not been received as frames; how many bytes that was."""
        return len(self._unpacker.read_bytes(1 << 30))

    async def receive_kind(self, kind: int) -> Any:
        while (received := await self.receive()) is not None and received[0] != kind:
            pass
        return received


@asynccontextmanager
async def calling(server: TcpServer, *, with_proof: bytes = b"") -> AsyncIterator[BareCaller]:
    """A caller that has shaken hands. `with_proof` goes out in the same segment as its last message."""
    host, port = server.address.rsplit(":", 1)
    peer = BareCaller(*await asyncio.open_connection(host, int(port)))
    handshake = ClientHandshake(SECRET, WINDOW, INSTANCE)
    peer.send(handshake.begin())
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
async def test_a_caller_that_stops_within_a_frame_is_told_and_dropped(
    unfinished: bytes, with_proof: bool
) -> None:
    async with (
        serving(keepalive_interval_s=0.05, max_message_bytes=2 * MIB) as server,
        calling(server, with_proof=unfinished if with_proof else b"") as peer,
    ):
        if not with_proof:
            peer.send(unfinished)
        assert (await peer.receive_kind(frame.GOAWAY))[2] == "protocol_violation"
        await eventually(lambda: server.connection_count == 0)


@pytest.mark.parametrize("kind", ["frame", "payload"])
async def test_a_caller_that_trickles_is_dropped_though_it_is_never_silent(kind: str) -> None:
    async with serving(keepalive_interval_s=0.1) as server, calling(server) as peer:
        peer.send(
            pack([frame.OPEN, 1, "echo", 0, None, "x" * 60_000])[:100]
            if kind == "frame"
            else pack(open_raw(1, "echo", MIB))
        )
        trickled_bytes = 0
        while server.connection_count and trickled_bytes < 2000:
            peer.send(b"x")
            trickled_bytes += 1
            await asyncio.sleep(0.01)
        assert trickled_bytes < 2000
        assert (await peer.receive_kind(frame.GOAWAY))[2] == "protocol_violation"


async def test_slow_is_not_stuck() -> None:
    """16 KiB in twice the keepalive interval are enough, of a payload or a frame, with or without streams."""
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


async def test_a_connection_without_requests_or_half_a_frame_is_left_alone() -> None:
    async with serving(keepalive_interval_s=0.02) as server, calling(server) as peer:
        peer.send([frame.PING, 0, 1])
        assert await peer.receive() == [frame.PONG, 0, 1]
        await asyncio.sleep(0.2)
        peer.send([frame.OPEN, 1, "echo", 0, None, "here"])
        assert await peer.receive() == [frame.LAST, 1, "here"]


async def test_many_who_stop_within_a_frame_leave_nothing() -> None:
    async with serving(keepalive_interval_s=0.1) as server, AsyncExitStack() as stack:
        for _ in range(50):
            peer = await stack.enter_async_context(calling(server))
            peer.send(UNFINISHED["half a frame"])
        await eventually(lambda: server.connection_count == 0)
