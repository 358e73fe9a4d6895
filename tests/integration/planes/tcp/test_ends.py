"""A peer that goes at any point of a conversation, by FIN or by RST: what is under way ends, typed, and no
more happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import CannotConnect, ConnectionLost, Draining, PlaneError
from dynamo_redis.planes.base import ResponseStream, Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.tcp.client import TcpClient
from dynamo_redis.planes.tcp.server import TcpServer
from dynamo_redis.wire import frame
from dynamo_redis.wire.codec import pack
from dynamo_redis.wire.handshake import ClientHandshake, ServerHandshake
from tests.fuzz.peer import Peer
from tests.fuzz.session import reset, soon
from tests.fuzz.watch import Newcomers, complaints
from tests.tcp_plane import INSTANCE, SECRET

WINDOW = 10
LARGE_BYTES = 200_000

Point = Callable[[Peer], Awaitable[None]]
LEAVE = ["FIN", "RST", "FIN, and reading on"]


async def _leave(peer: Peer, way: str) -> None:
    if way == "RST":
        reset(peer.writer)
    elif way == "FIN":
        peer.writer.close()
    else:
        peer.writer.write_eof()
        await asyncio.wait_for(peer.until_closed(), 30)


# --------------------------------------------------------------------------- a caller that goes


async def nothing(_: Peer) -> None:
    """Connected, and silent."""


async def amid_hello(peer: Peer) -> None:
    peer.send(ClientHandshake(SECRET, WINDOW, INSTANCE).first_message()[:20])


async def after_hello(peer: Peer) -> None:
    peer.send(ClientHandshake(SECRET, WINDOW, INSTANCE).first_message())
    assert await peer.reader.read(4096)


async def amid_proof(peer: Peer) -> None:
    handshake = ClientHandshake(SECRET, WINDOW, INSTANCE)
    peer.send(handshake.first_message())
    proof, _ = handshake.feed(memoryview(await peer.reader.read(4096)))
    peer.send(proof[:10])


async def shaken(peer: Peer) -> None:
    await peer.shake(ClientHandshake(SECRET, WINDOW, INSTANCE))


async def amid_a_frame(peer: Peer) -> None:
    await shaken(peer)
    peer.send(pack([frame.OPEN, 1, "hang", 0, None, None]) + pack([frame.OPEN, 2, "hang", 0, None, None])[:9])


async def amid_a_raw_payload(peer: Peer) -> None:
    await shaken(peer)
    peer.send(pack([frame.OPEN_RAW, 1, "hang", 0, None, LARGE_BYTES, 1]) + bytes(100_000))


async def amid_a_payload_over_the_limit(peer: Peer) -> None:
    await shaken(peer)
    peer.send(pack([frame.OPEN_RAW, 1, "hang", 0, None, 1 << 30, 1]) + bytes(1000))


async def with_requests(peer: Peer) -> None:
    await shaken(peer)
    for stream_id in range(1, 9):
        peer.send(pack([frame.OPEN, stream_id, "hang", 0, None, None]))


async def with_a_request_stream(peer: Peer) -> None:
    await shaken(peer)
    peer.send(pack([frame.OPEN, 1, "total", 1, None, 0]) + pack([frame.BATCH, 1, [1, 2]]))


async def with_answers_unread(peer: Peer) -> None:
    await shaken(peer)
    for stream_id in range(1, 40):
        peer.send(pack([frame.OPEN, stream_id, "large", 0, None, None]))


async def after_goaway(peer: Peer) -> None:
    await with_requests(peer)
    peer.send(pack([frame.GOAWAY, 0, "draining", "bye"]))


CALLER_POINTS: list[Point] = [
    nothing,
    amid_hello,
    after_hello,
    amid_proof,
    shaken,
    amid_a_frame,
    amid_a_raw_payload,
    amid_a_payload_over_the_limit,
    with_requests,
    with_a_request_stream,
    with_answers_unread,
    after_goaway,
]


@pytest.fixture
async def server() -> AsyncIterator[TcpServer]:
    made = TcpServer(PlaneSettings.load(cancel_grace_s=0), secret=SECRET, instance_id=INSTANCE)
    await made.start()

    async def hang(_: Any, __: Context) -> None:
        await asyncio.sleep(60)

    async def large(_: Any, __: Context) -> AsyncIterator[bytes]:
        while True:
            yield bytes(LARGE_BYTES)

    async def total(messages: Any, _: Context) -> int:
        return len([message async for message in messages])

    made.register("hang", hang)
    made.register("large", large)
    made.register("total", total, request_stream=True)
    yield made
    await made.aclose()


@pytest.mark.parametrize("point", CALLER_POINTS, ids=lambda point: point.__name__)
async def test_lost_caller_leaves_nothing_at_the_server(server: TcpServer, point: Point) -> None:
    host, port = server.address.rsplit(":", 1)
    with complaints():
        for way in LEAVE:
            peer = Peer(*await asyncio.open_connection(host, int(port)))
            await point(peer)
            await _leave(peer, way)
            await soon(lambda: server.connection_count == 0, f"{way}: the connection is left")
            await soon(lambda: server.in_flight_count == 0, f"{way}: requests are left")
            await peer.close()


async def test_server_that_closes_while_callers_arrive_keeps_nothing() -> None:
    new = Newcomers()
    with complaints():
        for turns in range(8):
            await _close_after(turns)
        assert not new.census("planes.frames.server_connection")


async def _close_after(turns: int) -> None:
    server = TcpServer(PlaneSettings.load(), secret=SECRET, instance_id=INSTANCE)
    await server.start()
    host, port = server.address.rsplit(":", 1)
    peers = [Peer(*await asyncio.open_connection(host, int(port))) for _ in range(5)]
    deadline = asyncio.get_running_loop().time() + 2  # before the handshake's own time is over
    for peer in peers:
        peer.send(ClientHandshake(SECRET, WINDOW, INSTANCE).first_message())
    for _ in range(turns):
        await asyncio.sleep(0)
    await server.aclose()
    for peer in peers:
        await peer.close()
    while server.connection_count:
        assert asyncio.get_running_loop().time() < deadline, "connections are left"
        await asyncio.sleep(0.01)


# --------------------------------------------------------------------------- a worker that goes


async def _shaken(peer: Peer) -> None:
    await peer.shake(ServerHandshake(SECRET, WINDOW, INSTANCE))


async def accepted(_: Peer) -> None:
    """Connected, and silent."""


async def amid_its_hello(peer: Peer) -> None:
    answer, _ = ServerHandshake(SECRET, WINDOW, INSTANCE).feed(memoryview(await peer.reader.read(4096)))
    peer.send(answer[:30])


async def after_its_hello(peer: Peer) -> None:
    answer, _ = ServerHandshake(SECRET, WINDOW, INSTANCE).feed(memoryview(await peer.reader.read(4096)))
    peer.send(answer)


async def when_shaken(peer: Peer) -> None:
    await _shaken(peer)


async def with_requests_unanswered(peer: Peer) -> None:
    await _shaken(peer)
    assert await peer.receive() is not None


async def between_items(peer: Peer) -> None:
    await with_requests_unanswered(peer)
    peer.send(pack([frame.DATA, 1, "first"]))


async def amid_an_item(peer: Peer) -> None:
    await between_items(peer)
    peer.send(pack([frame.DATA, 1, "second"])[:5])


async def amid_a_raw_item(peer: Peer) -> None:
    await between_items(peer)
    peer.send(pack([frame.DATA_RAW, 1, LARGE_BYTES, 1]) + bytes(100_000))


async def after_its_goaway(peer: Peer) -> None:
    await between_items(peer)
    peer.send(pack([frame.GOAWAY, 0, "draining", "bye"]))


WORKER_POINTS: list[Point] = [
    accepted,
    amid_its_hello,
    after_its_hello,
    when_shaken,
    with_requests_unanswered,
    between_items,
    amid_an_item,
    amid_a_raw_item,
    after_its_goaway,
]


async def _messages() -> AsyncIterator[int]:
    for number in range(100):
        yield number


@pytest.mark.parametrize("point", WORKER_POINTS, ids=lambda point: point.__name__)
async def test_lost_worker_ends_its_requests_as_retryable(point: Point) -> None:
    with complaints():
        for way in LEAVE:
            for error in await _ends_when(point, way):
                assert isinstance(error, ConnectionLost | CannotConnect | Draining), way
                assert error.retryable


async def _ends_when(point: Point, way: str) -> list[PlaneError | None]:
    """Return the ends of three requests at a worker that leaves at that point."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        try:
            await point(peer)
            await _leave(peer, way)
        finally:
            await peer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    target = Target(INSTANCE, f"127.0.0.1:{listener.sockets[0].getsockname()[1]}", "any", SECRET)
    client = TcpClient(PlaneSettings.load(keepalive_interval_s=0.3))
    requests: tuple[tuple[Any, dict[str, Any]], ...] = (
        (1, {}),
        (bytes(LARGE_BYTES), {}),
        (1, {"messages": _messages()}),
    )
    streams = [client.open(target, request, Context(), **options) for request, options in requests]
    ends = await asyncio.wait_for(asyncio.gather(*map(_end_of, streams)), 30)
    assert client.pending_count == 0
    await client.aclose()
    listener.close()
    await listener.wait_closed()
    return ends


async def _end_of(stream: ResponseStream) -> PlaneError | None:
    items: list[Any] = []
    try:
        async for item in stream:
            items.append(item)  # noqa: PERF401 - what came before the end counts
    except PlaneError as exc:
        assert items in ([], ["first"])
        return exc
    return None
