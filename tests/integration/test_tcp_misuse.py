"""What nobody should send or raise: it is the request's affair, or a typed end of the connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import HandlerFailed, InvalidRequest, Overloaded, ProtocolViolation
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.tcp_client import TcpClient
from dynamo_redis.planes.tcp_server import TcpServer
from dynamo_redis.wire import frame
from dynamo_redis.wire.codec import pack
from dynamo_redis.wire.handshake import ClientHandshake, ServerHandshake
from tests.fuzz.peer import Heard, Peer
from tests.fuzz.session import soon
from tests.fuzz.watch import complaints

SECRET = b"a secret of the instance, random"
INSTANCE = 7
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


class Rude(BaseException):
    """Neither an Exception nor a cancellation."""


@pytest.mark.parametrize("make", [GeneratorExit, Rude, lambda: BaseExceptionGroup("several", [Rude()])])
async def test_a_handler_that_raises_what_is_no_exception(
    server: TcpServer, client: TcpClient, make: Callable[[], BaseException]
) -> None:
    async def handler(_: Any, __: Context) -> None:
        await asyncio.sleep(0)
        raise make()

    asyncio.get_running_loop().set_exception_handler(
        lambda *_: None
    )  # the loop says so of the handler's task
    server.register("rude", handler)
    with pytest.raises(HandlerFailed):
        await anext(client.open(Target(INSTANCE, server.address, "rude", SECRET), None, Context()))
    await soon(lambda: server.in_flight_count == 0, "the request is left")
    assert client.pending_count == 0


@pytest.mark.parametrize("retry_after_s", [float("inf"), float("nan"), -1.0, 1e300])
async def test_a_handler_that_gives_no_sensible_hint(
    server: TcpServer, client: TcpClient, retry_after_s: float
) -> None:
    async def handler(_: Any, __: Context) -> None:
        raise Overloaded("full", retry_after_s)

    server.register("full", handler)
    with complaints(), pytest.raises(Overloaded, match="full") as caught:
        await anext(client.open(Target(INSTANCE, server.address, "full", SECRET), None, Context()))
    assert caught.value.retry_after_s is None
    await soon(lambda: server.in_flight_count == 0, "the request is left")


@pytest.mark.parametrize("size_bytes", [5_000, 1 << 20])
async def test_a_payload_of_nested_heads_is_its_streams_affair(server: TcpServer, size_bytes: int) -> None:
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
async def test_frames_with_nested_fields_end_the_connection_as_a_violation(
    client: TcpClient, nested: bytes
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        await peer.shake(ServerHandshake(SECRET, 10, INSTANCE))
        peer.send(nested)
        await peer.until_closed()
        await peer.close()

    with complaints():
        listener = await asyncio.start_server(serve, "127.0.0.1", 0)
        address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        with pytest.raises(ProtocolViolation):
            await anext(client.open(Target(INSTANCE, address, "any", SECRET), None, Context()))
        assert client.pending_count == 0
        await client.aclose()
        listener.close()
        await listener.wait_closed()
