"""Sizes exactly at the limits, one below and one above, in both directions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import ConfigError, PayloadTooLarge
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.tcp.client import TcpClient
from dynamo_redis.planes.tcp.server import TcpServer
from dynamo_redis.wire import frame
from dynamo_redis.wire.codec import MAX_FRAME_BYTES, MAX_HEADERS_BYTES, MAX_INLINE_BYTES, pack
from dynamo_redis.wire.handshake import ClientHandshake, ServerHandshake
from tests.fuzz.peer import Heard, Peer
from tests.tcp_plane import INSTANCE, SECRET

WINDOW = 10
KIB = 1024
LIMIT_BYTES = 300 * KIB
AROUND = (-1, 0, 1)
NESTED_DEPTHS = (1021, 1022, 1023)


@pytest.fixture
async def server() -> AsyncIterator[TcpServer]:
    made = TcpServer(PlaneSettings.load(max_message_bytes=LIMIT_BYTES), secret=SECRET, instance_id=INSTANCE)
    await made.start()

    async def echo(request: Any, _: Context) -> Any:
        return request

    async def twice(request: Any, _: Context) -> AsyncIterator[Any]:
        yield request
        yield request

    async def each(messages: AsyncIterator[Any], _: Context) -> AsyncIterator[Any]:
        async for message in messages:
            yield message

    made.register("echo", echo)
    made.register("twice", twice)
    made.register("each", each, request_stream=True)
    yield made
    await made.aclose()


@pytest.fixture
async def client() -> AsyncIterator[TcpClient]:
    made = TcpClient(PlaneSettings.load(max_message_bytes=LIMIT_BYTES))
    yield made
    await made.aclose()


@pytest.mark.parametrize("size", ["5GiB", "4GiB", str(2**32)])
def test_limit_that_the_wire_does_not_carry_is_refused(size: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"DYN_TCP_MAX_MESSAGE_SIZE='{size}': must be at most 4 GiB - 1 byte"
    ):
        PlaneSettings.load(max_message_bytes=size)


async def test_largest_limit_is_the_largest_announced_size(server: TcpServer) -> None:
    assert PlaneSettings.load(max_message_bytes=2**32 - 1).max_message_bytes == 2**32 - 1
    host, port = server.address.rsplit(":", 1)
    for size_bytes, is_one in ((2**32 - 1, True), (2**32, False)):
        peer = Peer(*await asyncio.open_connection(host, int(port)))
        await peer.shake(ClientHandshake(SECRET, WINDOW, INSTANCE))
        peer.send(pack([frame.OPEN_RAW, 1, "echo", 0, None, size_bytes, 1]))
        answer = [frame.ERROR, 1, "payload_too_large"] if is_one else [frame.GOAWAY, 0, "protocol_violation"]
        assert (await peer.receive() or [])[:3] == answer
        await peer.close()


def packed_to(size_bytes: int, kind: type) -> Any:
    """Return a value whose payload has exactly `size` bytes."""
    if kind is bytes and size_bytes > MAX_INLINE_BYTES:
        return bytes(size_bytes)
    header_bytes = 2 if size_bytes <= 257 else 3 if size_bytes <= 65_538 else 5
    value = bytes(size_bytes - header_bytes) if kind is bytes else "x" * (size_bytes - header_bytes)
    assert len(pack(value)) == size_bytes
    return value


async def ask(client: TcpClient, server: TcpServer, subject: str, request: Any, **options: Any) -> list[Any]:
    target = Target(INSTANCE, server.address, subject, SECRET)
    return [item async for item in client.open(target, request, Context(), **options)]


async def messages(*values: Any) -> AsyncIterator[Any]:
    for value in values:
        yield value


@pytest.mark.parametrize("kind", [bytes, str])
@pytest.mark.parametrize("edge_bytes", [MAX_INLINE_BYTES, MAX_FRAME_BYTES, LIMIT_BYTES])
async def test_payloads_at_the_edges_in_every_place(
    server: TcpServer, client: TcpClient, edge_bytes: int, kind: type
) -> None:
    for difference in AROUND:
        size_bytes = edge_bytes + difference
        value = packed_to(size_bytes, kind)
        if size_bytes > LIMIT_BYTES:
            with pytest.raises(PayloadTooLarge):
                await ask(client, server, "echo", value)
            with pytest.raises(PayloadTooLarge):
                await ask(client, server, "each", 0, messages=messages(value))
            continue
        assert await ask(client, server, "echo", value) == [value]
        assert await ask(client, server, "twice", value) == [value, value]
        assert await ask(client, server, "each", value, messages=messages(value, "between", value)) == [
            value,
            value,
            "between",
            value,
        ]


@pytest.mark.parametrize("empty", [b"", "", [], {}, None])
async def test_messages_of_nothing(server: TcpServer, client: TcpClient, empty: Any) -> None:
    assert await ask(client, server, "echo", empty) == [empty]
    assert await ask(client, server, "each", empty, messages=messages(empty, empty)) == [empty] * 3


async def test_headers_at_their_limit(server: TcpServer, client: TcpClient) -> None:
    target = Target(INSTANCE, server.address, "echo", SECRET)
    around = len(pack({"id": "r", "meta": {"k": "x" * 30_000}})) - 30_000
    for difference in AROUND:
        context = Context("r", {"k": "x" * (MAX_HEADERS_BYTES - around + difference)})
        if difference > 0:
            with pytest.raises(PayloadTooLarge):
                client.open(target, 1, context)
        else:
            assert [item async for item in client.open(target, 1, context)] == [1]


@pytest.mark.parametrize("padding_bytes", [0, 100_000])
async def test_nesting_at_its_limit_in_a_request_stream(
    server: TcpServer, client: TcpClient, padding_bytes: int
) -> None:
    for depth in NESTED_DEPTHS:
        value: Any = [b"x" * padding_bytes]
        for _ in range(depth - 1):
            value = [value]
        if depth > 1022 and padding_bytes == 0:
            with pytest.raises(TypeError):
                await ask(client, server, "each", 0, messages=messages(value))
        else:
            [_, back] = await ask(client, server, "each", 0, messages=messages(value))
            assert pack(back) == pack(value)


# --------------------------------------------------------------------------- on the bare wire


def frame_of(head: list[Any], tail: list[Any], size_bytes: int) -> bytes:
    """Return a frame of exactly `size` bytes: two strings fill the room between `head` and `tail`."""
    half = size_bytes // 2 - 50
    rest = size_bytes - len(pack([*head, ["x" * half, ""], *tail])) - 4
    encoded = pack([*head, ["x" * half, "x" * rest], *tail])
    assert len(encoded) == size_bytes
    return encoded


@asynccontextmanager
async def connected(server: TcpServer) -> AsyncIterator[tuple[Peer, Heard]]:
    """Connect a bare caller, after the handshake."""
    host, port = server.address.rsplit(":", 1)
    peer = Peer(*await asyncio.open_connection(host, int(port)))
    try:
        await peer.shake(ClientHandshake(SECRET, WINDOW, INSTANCE))
        yield peer, Heard(by_server=True)
    finally:
        await peer.close()


@pytest.mark.parametrize("pieces", [1, 3])
async def test_frame_at_its_limit_to_the_server(server: TcpServer, pieces: int) -> None:
    for difference in AROUND:
        async with connected(server) as (peer, heard):
            heard.expect([[frame.OPEN, 1, "nowhere"]])
            data = frame_of([frame.OPEN, 1, "nowhere", 0, None], [], MAX_FRAME_BYTES + difference)
            await _send(peer, data, pieces)
            assert await peer.answer_to_ping(heard) == (difference <= 0)
            assert heard.goaway == (None if difference <= 0 else "protocol_violation")


@pytest.mark.parametrize("pieces", [1, 3])
async def test_frame_at_its_limit_to_the_client(client: TcpClient, pieces: int) -> None:
    for difference in AROUND:
        goes_on: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        async def serve(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter, difference: int = difference
        ) -> None:
            peer, heard = Peer(reader, writer), Heard(by_server=False)
            try:
                await peer.shake(ServerHandshake(SECRET, WINDOW, INSTANCE))
                heard.take(await peer.receive() or [])
                data = frame_of([frame.DATA, 1], [], MAX_FRAME_BYTES + difference)
                await _send(peer, data, pieces)
                goes_on.set_result(await peer.answer_to_ping(heard))  # noqa: B023 - awaited in this round
            finally:
                await peer.close()

        listener = await asyncio.start_server(serve, "127.0.0.1", 0)
        target = Target(INSTANCE, f"127.0.0.1:{listener.sockets[0].getsockname()[1]}", "any", SECRET)
        async with client.open(target, None, Context()):
            assert await asyncio.wait_for(goes_on, 30) == (difference <= 0)
        listener.close()
        await listener.wait_closed()


async def test_last_stream_id_is_served_and_no_id_after_it(server: TcpServer) -> None:
    for beyond in (1, frame.MAX_STREAM_ID, frame.MAX_STREAM_ID + 1, 2**63):
        async with connected(server) as (peer, heard):
            heard.expect([[frame.OPEN, frame.MAX_STREAM_ID, "echo"]])
            peer.send(pack([frame.OPEN, frame.MAX_STREAM_ID, "echo", 0, None, "last"]))
            assert await peer.receive() == [frame.LAST, frame.MAX_STREAM_ID, "last"]
            assert await peer.answer_to_ping(heard)
            peer.send(pack([frame.OPEN, beyond, "echo", 0, None, "one more"]))
            assert not await peer.answer_to_ping(heard)
            assert heard.goaway == "protocol_violation"


async def _send(peer: Peer, data: bytes, pieces: int) -> None:
    size = -(-len(data) // pieces)
    for start in range(0, len(data), size):
        peer.send(data[start : start + size])
        await asyncio.sleep(0.005 if pieces > 1 else 0)
