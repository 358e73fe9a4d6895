"""The handshake over real connections, with a relay in between that changes messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import AuthenticationFailed, CannotConnect, PlaneError, ProtocolViolation
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.tcp.client import TcpClient
from dynamo_redis.planes.tcp.server import TcpServer
from tests.tcp_plane import SECRET, eventually

INSTANCE = 0x694D98147D54BFDE

Change = Callable[[str, bytes], bytes]
"""Changes a piece that one side ("client" or "server") sends into the piece that the other gets."""


class Between:
    """Relays one connection after the other, each piece through `change`, and records the pieces."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.change: Change = lambda __, data: data
        self.said: dict[str, list[bytes]] = {}

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said = self.said = {"client": [], "server": []}
        change = self.change

        def heard(name: str, data: bytes) -> bytes:
            said[name].append(data)
            return change(name, data)

        host, _, port = self._address.rpartition(":")
        server_reader, server_writer = await asyncio.open_connection(host, int(port))
        ways = (("client", reader, server_writer), ("server", server_reader, writer))
        async with asyncio.TaskGroup() as relays:
            for name, source, sink in ways:
                relays.create_task(_relay(partial(heard, name), source, sink))


async def _relay(
    heard: Callable[[bytes], bytes], source: asyncio.StreamReader, sink: asyncio.StreamWriter
) -> None:
    try:
        while data := await source.read(65_536):
            sink.write(heard(data))
    except ConnectionError:
        pass
    finally:
        sink.close()


@asynccontextmanager
async def between() -> AsyncIterator[tuple[Between, TcpServer, Callable[[], Any]]]:
    """Run a relay and the server behind it; yield the relay, and a function that calls through it."""
    chosen = PlaneSettings.load(tcp_host="127.0.0.1", connect_timeout_s=30)
    server = TcpServer(chosen, secret=SECRET, instance_id=INSTANCE)

    async def echo(request: Any, _: Context) -> Any:
        return request

    server.register("echo", echo)
    await server.start()
    relay = Between(server.address)
    listener = await asyncio.start_server(relay, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]

    async def call() -> Any:
        client = TcpClient(chosen)
        try:
            target = Target(INSTANCE, f"127.0.0.1:{port}", "echo", SECRET)
            return [item async for item in client.open(target, "hi", Context())]
        finally:
            await client.aclose()

    try:
        yield relay, server, call
        await eventually(lambda: server.connection_count == 0)
    finally:
        listener.close()
        await server.aclose()


# Where the fields begin in a HELLO: length, the array's head, "DYNR", version, features, window, id, nonce.
HELLO = {"length": 1, "head": 2, "magic": 4, "version": 8, "features": 9, "window": 10, "id": 18, "nonce": 30}
FIELDS = [
    *(("client", 0, at, field) for field, at in HELLO.items()),
    *(("server", 0, at, field) for field, at in HELLO.items()),
    ("server", 0, -1, "proof"),
    ("client", 1, 1, "length of the proof"),
    ("client", 1, 2, "head of the proof"),
    ("client", 1, 20, "proof"),
]


def flip(side: str, which: int, at: int) -> Change:
    """Change one bit of the byte at index `at` in a side's piece of that number."""
    seen = {"client": 0, "server": 0}

    def change(name: str, data: bytes) -> bytes:
        number = seen[name]
        seen[name] += 1
        if (name, number) != (side, which):
            return data
        changed = bytearray(data)
        changed[at] ^= 4  # lengths become shorter: a longer one waits for the time-out
        return bytes(changed)

    return change


async def test_changed_byte_of_any_field_ends_the_connection() -> None:
    async with between() as (relay, _, call):
        assert await call() == ["hi"]
        for side, which, at, field in FIELDS:
            relay.change = flip(side, which, at)
            answer = await asyncio.gather(call(), return_exceptions=True)
            kinds: tuple[type[PlaneError], ...] = (AuthenticationFailed, CannotConnect)
            if which:  # the request is behind the proof, and the worker says what is wrong with the latter
                kinds += (ProtocolViolation,)
            assert isinstance(answer[0], kinds), f"{side}'s {field}: {answer}"
        relay.change = lambda __, data: data
        assert await call() == ["hi"]


async def test_recorded_handshake_proves_nothing() -> None:
    async with between() as (relay, _, call):
        assert await call() == ["hi"]
        recorded = relay.said
        relay.change = lambda name, data: recorded["server"][0] if name == "server" else data
        with pytest.raises(AuthenticationFailed):
            await call()
        turn = iter(recorded["client"])
        relay.change = lambda name, data: next(turn, b"") if name == "client" else data
        with pytest.raises(PlaneError) as caught:
            await call()
        assert type(caught.value) in (AuthenticationFailed, CannotConnect)


async def test_clients_own_words_sent_back_prove_nothing() -> None:
    async with between() as (relay, _, call):
        relay.change = lambda name, data: relay.said["client"][0] if name == "server" else data
        with pytest.raises(CannotConnect, match="does not speak this protocol"):
            await call()


async def test_nothing_is_kept_of_a_handshake() -> None:
    async with between() as (_, server, __):
        client = TcpClient(PlaneSettings.load())
        target = Target(INSTANCE, server.address, "echo", SECRET)
        assert [item async for item in client.open(target, 1, Context())] == [1]
        [at_server] = server._connections
        [pool] = client._pools.values()
        [at_client] = pool._connections
        assert at_server._handshake is None
        assert at_client._handshake is None
        await client.aclose()
