"""Misuse by a handler, caller or peer ends the request, or the connection with a typed error."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import (
    DeadlineExceeded,
    HandlerFailed,
    InvalidRequest,
    Overloaded,
    PlaneError,
    ProtocolViolation,
)
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.tcp.client import TcpClient
from dynamo_redis.planes.tcp.server import TcpServer
from dynamo_redis.wire import frame
from dynamo_redis.wire.codec import pack
from dynamo_redis.wire.handshake import ClientHandshake, ServerHandshake
from tests.fuzz.peer import Heard, Peer
from tests.fuzz.session import soon
from tests.fuzz.watch import complaints
from tests.tcp_plane import INSTANCE, SECRET

NESTED = b"\x91" * 1000 + b"\xc0"


@pytest.fixture
async def server() -> AsyncIterator[TcpServer]:
    made = TcpServer(PlaneSettings.load(), secret=SECRET, instance_id=INSTANCE)
    await made.start()
    yield made
    await made.aclose()


@pytest.fixture
async def client() -> AsyncIterator[TcpClient]:
    made = TcpClient(PlaneSettings.load())
    yield made
    await made.aclose()


@asynccontextmanager
async def worker(serve: Callable[[Peer], Awaitable[None]]) -> AsyncIterator[Target]:
    """A worker that does the handshake, and then runs `serve`."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        await peer.shake(ServerHandshake(SECRET, 10, INSTANCE))
        await serve(peer)
        await peer.close()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield Target(INSTANCE, f"127.0.0.1:{listener.sockets[0].getsockname()[1]}", "any", SECRET)
    finally:
        listener.close()
        await listener.wait_closed()


class Wordless(PlaneError):
    """An error whose `__str__` raises."""

    def __str__(self) -> str:
        raise ValueError("no words")


class Numbered(PlaneError):
    """An error whose code is no text."""

    code = 5  # type: ignore[assignment]


class Rude(BaseException):
    """A BaseException that is no cancellation."""


@pytest.mark.parametrize("error", [Wordless(), Numbered("text"), Overloaded("x", "soon")])  # type: ignore[arg-type]
async def test_error_that_cannot_be_packed_ends_its_request(
    server: TcpServer, client: TcpClient, error: PlaneError
) -> None:
    async def handler(request: str, _: Context) -> str:
        if request == "fail":
            raise error
        return request

    server.register("handler", handler)
    target = Target(INSTANCE, server.address, "handler", SECRET)
    failing, fine = client.open(target, "fail", None), client.open(target, "fine", None)
    async with asyncio.timeout(20):
        with pytest.raises(HandlerFailed, match=type(error).__name__):
            await anext(failing)
        assert await anext(fine) == "fine"
    await soon(lambda: not server.in_flight_count, "the request is left")


async def test_parked_request_spoils_no_neighbour(server: TcpServer, client: TcpClient) -> None:
    async def handler(request: int, _: Context) -> int:
        return request

    server.register("handler", handler)
    target = Target(INSTANCE, server.address, "handler", SECRET)
    context = Context(deadline=time.monotonic() + 60)
    metadata: dict[str, Any] = context.metadata
    metadata["key"] = ["no text"]
    changed = client.open(target, 0, context)  # waits for the first connection
    metadata["key"].append(object())
    with pytest.raises(TypeError, match="serialize"):
        client.open(target, 1, context)
    others = [client.open(target, number, None) for number in range(2, 5)]
    async with asyncio.timeout(20):
        with pytest.raises(InvalidRequest):
            await anext(changed)
        assert [await anext(other) for other in others] == [2, 3, 4]
    await soon(lambda: not client.pending_count, "a request is left")


@pytest.mark.parametrize("make", [GeneratorExit, Rude, lambda: BaseExceptionGroup("several", [Rude()])])
async def test_handler_raises_a_non_exception(
    server: TcpServer, client: TcpClient, make: Callable[[], BaseException]
) -> None:
    async def handler(_: Any, __: Context) -> None:
        await asyncio.sleep(0)
        raise make()

    server.register("rude", handler)
    expected = f"^{type(make()).__name__}: "
    with complaints(), pytest.raises(HandlerFailed, match=expected):
        await anext(client.open(Target(INSTANCE, server.address, "rude", SECRET), None, Context()))
    await soon(lambda: server.in_flight_count == 0, "the request is left")
    assert client.pending_count == 0


@pytest.mark.parametrize("retry_after_s", [float("inf"), float("nan"), -1.0, 1e300])
async def test_handler_gives_a_senseless_retry_hint(
    server: TcpServer, client: TcpClient, retry_after_s: float
) -> None:
    async def handler(_: Any, __: Context) -> None:
        raise Overloaded("full", retry_after_s)

    server.register("full", handler)
    with complaints(), pytest.raises(Overloaded, match="full") as caught:
        await anext(client.open(Target(INSTANCE, server.address, "full", SECRET), None, Context()))
    assert caught.value.retry_after_s is None
    await soon(lambda: server.in_flight_count == 0, "the request is left")


@pytest.mark.parametrize(
    ("retry_after_ms", "retry_after_s"),
    [
        (0, 0.0),
        (250, 0.25),
        (3_600_001, 3600.0),
        (2**64 - 1, 3600.0),
        (-5, None),
        (1.5, None),
        (True, None),
        ("5", None),
        (None, None),
    ],
)
async def test_worker_gives_a_senseless_retry_hint(
    client: TcpClient, retry_after_ms: object, retry_after_s: float | None
) -> None:
    async def serve(peer: Peer) -> None:
        assert await peer.receive() is not None
        peer.send(pack([frame.ERROR, 1, Overloaded.code, "full", {"retry_after_ms": retry_after_ms}]))
        await peer.until_closed()

    async with worker(serve) as target:
        with pytest.raises(Overloaded, match="full") as caught:
            await anext(client.open(target, None, Context()))
        assert caught.value.retry_after_s == retry_after_s
        await client.aclose()


@pytest.mark.parametrize("deadline", [1e18, 1e300, sys.float_info.max])
async def test_deadline_in_the_far_future(server: TcpServer, client: TcpClient, deadline: float) -> None:
    async def left(_: Any, context: Context) -> float | None:
        return context.remaining_s()

    server.register("left", left)
    target = Target(INSTANCE, server.address, "left", SECRET)
    with complaints():
        left_s = await anext(client.open(target, None, Context(deadline=deadline)))
        assert left_s == pytest.approx(frame.MAX_DEADLINE_MS / 1000)
        assert await anext(client.open(target, None, Context(deadline=math.inf))) is None
        with pytest.raises(DeadlineExceeded):
            await anext(client.open(target, None, Context(deadline=-math.inf)))


def test_deadline_that_is_no_number() -> None:
    with pytest.raises(ValueError, match="a deadline must be a number"):
        Context(deadline=math.nan)


@pytest.mark.parametrize("size_bytes", [5_000, 1 << 20])
async def test_payload_of_nested_heads_fails_its_stream_only(server: TcpServer, size_bytes: int) -> None:
    async def echo(request: Any, _: Context) -> Any:
        return request

    server.register("echo", echo)
    host, port = server.address.rsplit(":", 1)
    peer, heard = Peer(*await asyncio.open_connection(host, int(port))), Heard(by_server=True)
    await peer.shake(ClientHandshake(SECRET, 10, INSTANCE))
    with complaints():
        head = b"\xdd" + (size_bytes // 2).to_bytes(4, "big")
        payload = (head * 1000 + b"\xc0" * size_bytes)[:size_bytes]
        peer.send(pack([frame.OPEN_RAW, 1, "echo", 0, None, size_bytes, 0]) + payload)
        assert (await peer.receive() or [])[:3] == [frame.ERROR, 1, InvalidRequest.code]
        assert await peer.answer_to_ping(heard)
    await peer.close()


@pytest.mark.parametrize(
    "nested",
    [
        b"\x94\x0b\x00" + NESTED + b"\xa1x",
        b"\x94\x0b\x00\xa1x" + NESTED,
        b"\x95\x07\x01" + NESTED + b"\xa1x\xc0",
        b"\x95\x07\x01\xa1x\xa1x" + NESTED,
        b"\x93\x0d\x00" + NESTED,
    ],
)
async def test_frames_with_nested_fields_are_violations(client: TcpClient, nested: bytes) -> None:
    async def serve(peer: Peer) -> None:
        peer.send(nested)
        await peer.until_closed()

    with complaints():
        async with worker(serve) as target:
            with pytest.raises(ProtocolViolation):
                await anext(client.open(target, None, Context()))
            assert client.pending_count == 0
            await client.aclose()
