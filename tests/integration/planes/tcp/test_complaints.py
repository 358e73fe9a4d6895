"""A worker that refuses a caller or request logs it, and names the setting."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import AuthenticationFailed, Overloaded, PlaneError
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.frames import server as frame_server
from dynamo_redis.planes.tcp import server as tcp_server
from dynamo_redis.planes.tcp.client import TcpClient
from dynamo_redis.planes.tcp.server import TcpServer
from tests.tcp_plane import INSTANCE, SECRET, eventually


@asynccontextmanager
async def serving(**overrides: Any) -> AsyncIterator[TcpServer]:
    """Run a server whose handler never ends by itself."""
    chosen = PlaneSettings.load(tcp_host="127.0.0.1", **overrides)
    server = TcpServer(chosen, secret=SECRET, instance_id=INSTANCE)

    async def wait(_: Any, __: Context) -> None:
        await asyncio.Event().wait()

    server.register("wait", wait)
    await server.start()
    try:
        yield server
    finally:
        await server.aclose()


@asynccontextmanager
async def calling() -> AsyncIterator[TcpClient]:
    client = TcpClient(PlaneSettings())
    try:
        yield client
    finally:
        await client.aclose()


def target(server: TcpServer, secret: bytes | None = SECRET, instance_id: int = INSTANCE) -> Target:
    return Target(instance_id, server.address, "wait", secret)


async def refusal(client: TcpClient, where: Target, request: object = "") -> PlaneError:
    with pytest.raises(PlaneError) as caught:
        await anext(client.open(where, request, Context()))
    return caught.value


@pytest.fixture
def complaints(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings that an operator sees at the default log level."""
    caplog.set_level(logging.INFO)

    def said() -> list[str]:
        return [
            record.message
            for record in caplog.records
            if record.name == frame_server.__name__ and record.levelno == logging.WARNING
        ]

    return said


async def test_requests_past_the_limits(complaints: Callable[[], list[str]]) -> None:
    async with serving(max_in_flight_count=1, max_queued_count=0) as server, calling() as client:
        running = client.open(target(server), "", Context())
        await eventually(lambda: server.in_flight_count == 1)
        for _ in range(3):
            error = await refusal(client, target(server))
            assert isinstance(error, Overloaded)
            assert str(error) == "the worker is at its limit (DYN_TCP_MAX_IN_FLIGHT=1, DYN_TCP_MAX_QUEUED=0)"
        await running.aclose()
    [line] = complaints()
    assert "DYN_TCP_MAX_IN_FLIGHT=1" in line
    assert "DYN_TCP_MAX_QUEUED=0" in line
    assert "start more workers" in line


async def test_large_requests_past_the_limit(complaints: Callable[[], list[str]]) -> None:
    async with serving(max_payload_in_flight_bytes=100_000) as server, calling() as client:
        running = client.open(target(server), b"x" * 90_000, Context())
        await eventually(lambda: server.in_flight_count == 1)
        assert isinstance(await refusal(client, target(server), b"x" * 90_000), Overloaded)
        await running.aclose()
    [line] = complaints()
    assert "DYN_TCP_MAX_PAYLOAD_BYTES_IN_FLIGHT" in line


async def test_connections_past_the_limit(complaints: Callable[[], list[str]]) -> None:
    async with serving(max_connections_count=1) as server, calling() as client:
        await client.probe(target(server), timeout_s=20)
        for _ in range(3):
            async with calling() as late:
                error = await refusal(late, target(server))
                assert "as many connections as it takes (DYN_TCP_MAX_CONNECTIONS=1)" in str(error)
    [line] = complaints()
    assert "DYN_TCP_MAX_CONNECTIONS=1" in line


@pytest.mark.parametrize("secret", [b"another secret, of another worker", None])
async def test_caller_with_another_secret(complaints: Callable[[], list[str]], secret: bytes | None) -> None:
    async with serving() as server, calling() as client:
        assert isinstance(await refusal(client, target(server, secret)), AuthenticationFailed)
        await eventually(complaints)
    [line] = complaints()
    assert line.startswith("127.0.0.1:")
    assert "instance's secret" in line
    assert SECRET.decode() not in line


async def test_caller_that_looks_for_another_instance(complaints: Callable[[], list[str]]) -> None:
    async with serving() as server, calling() as client:
        assert isinstance(await refusal(client, target(server, instance_id=8)), AuthenticationFailed)
    [line] = complaints()
    assert line.startswith("127.0.0.1:")
    assert "another instance answers" in line


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b""])
async def test_peer_of_another_protocol_or_silent(complaints: Callable[[], list[str]], said: bytes) -> None:
    async with serving(connect_timeout_s=0.2) as server:
        host, _, port = server.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(said)
        await reader.read()
        writer.close()
        await writer.wait_closed()
        mine = writer.get_extra_info("sockname")
    [line] = complaints()
    assert line.startswith(f"{mine[0]}:{mine[1]} ")
    assert "speak this protocol" in line if said else "took too long" in line


async def test_connections_in_their_handshake_past_the_limit(
    complaints: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_server, "MAX_HANDSHAKE_COUNT", 2)
    async with serving() as server:
        host, _, port = server.address.rpartition(":")
        idle = [await asyncio.open_connection(host, int(port)) for _ in range(3)]
        assert b"overloaded" in await idle[0][0].read()
        for _, writer in idle:
            writer.transport.abort()
    [line] = complaints()
    assert "2 are in their handshake" in line
