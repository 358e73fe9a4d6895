"""Shared parts of the tests of the http plane: a server with common handlers, and callers that write raw
bytes or raw frames of HTTP/2."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings

from dynamo_redis.config import PlaneSettings
from dynamo_redis.planes.base import RequestPlaneServer
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.http.token import make_token
from dynamo_redis.planes.select import make_server

SECRET: Final = b"a secret of the instance, random"
INSTANCE: Final = 7
WITHIN_S: Final = 30.0
ENDED_WITHIN_S: Final = 100.0
"""The server ends connections without a request after a minute at most, most of them at once."""

Headers = list[tuple[str, str]]


class Hosted:
    """A server of the http plane, and the state of its handlers."""

    def __init__(self, server: RequestPlaneServer) -> None:
        self.server = server
        host, _, port = server.address.rpartition(":")
        self.host, self.port = host, int(port)
        self.cancelled: list[str] = []
        self.item_count = 0
        self.token = make_token(SECRET, INSTANCE, time.time() + 3600)

    def head(self, path: str, *lines: str, version: str = "1.1", method: str = "POST") -> bytes:
        """Return the head of a request of HTTP/1 with a valid token."""
        text = [f"{method} /v1/rpc/{path} HTTP/{version}", "Host: x", f"Authorization: Bearer {self.token}"]
        return "\r\n".join([*text, *lines, "", ""]).encode()

    def request(self, path: str, body: bytes = b"1", *lines: str) -> bytes:
        """Return a request of HTTP/1 with a valid token."""
        return self.head(path, f"Content-Length: {len(body)}", *lines) + body

    def headers(self, path: str, *others: tuple[str, str]) -> Headers:
        """Return the headers of a request of HTTP/2 with a valid token."""
        return [
            (":method", "POST"),
            (":scheme", "http"),
            (":authority", "x"),
            (":path", f"/v1/rpc/{path}"),
            ("authorization", f"Bearer {self.token}"),
            *others,
        ]

    async def ask(self, data: bytes) -> tuple[int, bytes]:
        """Send bytes on a connection of its own; return the status and the body of the answer."""
        async with connect(self) as (reader, writer):
            writer.write(data)
            return await read_answer(reader)

    async def answers(self) -> bool:
        """Tell if another caller is still served."""
        async with asyncio.timeout(WITHIN_S):
            return await self.ask(self.request("echo", b'"alive"')) == (200, b'"alive"\n')

    async def echo(self, request: Any, _: Context) -> Any:
        """Answer with the request."""
        return request

    async def endless(self, _: Any, __: Context) -> AsyncIterator[str]:
        """Answer with items of 16,000 bytes, for ever."""
        while True:
            self.item_count += 1
            yield "x" * 16_000

    async def wait(self, _: Any, context: Context) -> AsyncIterator[int]:
        """Answer with 1, then wait until the request is cancelled."""
        yield 1
        await context.async_killed_or_stopped()
        self.cancelled.append("killed" if context.is_killed() else "stopped")

    async def total(self, messages: AsyncIterator[Any], _: Context) -> int:
        """Answer with the count of the messages."""
        return len([message async for message in messages])

    async def late(self, messages: AsyncIterator[Any], context: Context) -> AsyncIterator[int]:
        """Read all messages, then `wait`."""
        async for _ in messages:
            pass
        async for item in self.wait(None, context):
            yield item

    async def deaf(self, _: AsyncIterator[Any], __: Context) -> AsyncIterator[int]:
        """Read no message, and answer with an item each 10 ms, for ever."""
        while True:
            yield 1
            await asyncio.sleep(0.01)

    async def unread(self, _: AsyncIterator[Any], context: Context) -> AsyncIterator[int]:
        """Read no message, and `wait`."""
        async for item in self.wait(None, context):
            yield item


@asynccontextmanager
async def hosted(secret: bytes | None = SECRET, **settings: Any) -> AsyncIterator[Hosted]:
    """Run a server with the handlers above."""
    chosen = PlaneSettings.load(
        request_plane="http", http_rpc_host="127.0.0.1", **{"http_rpc_port": 0, **settings}
    )
    server = make_server(chosen, secret=secret, instance_id=INSTANCE)
    await server.start()
    found = Hosted(server)
    for name in ("echo", "endless", "wait"):
        server.register(name, getattr(found, name))
    for name in ("total", "late", "unread"):
        server.register(name, getattr(found, name), request_stream=True)
    try:
        yield found
    finally:
        await server.aclose()


@asynccontextmanager
async def connect(host: Hosted) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open a connection, and reset it at the end."""
    reader, writer = await asyncio.open_connection(host.host, host.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()


async def read_all(reader: asyncio.StreamReader) -> bytes:
    """Read until the server ends the connection."""
    found = b""
    async with asyncio.timeout(ENDED_WITHIN_S):
        with suppress(ConnectionError):
            while part := await reader.read(1 << 16):
                found += part
    return found


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Read one answer of HTTP/1: its status and its body. (0, b"") for a connection that ends."""
    try:
        async with asyncio.timeout(WITHIN_S):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            status = int(head.split(" ", 2)[1])
            if status == 204 or status < 200:
                return status, b""
            if "content-length: " in head:
                size = int(head.partition("content-length: ")[2].partition("\r\n")[0])
                return status, await reader.readexactly(size)
            if "transfer-encoding: chunked" not in head:
                return status, await read_all(reader)
            body = b""
            while size := int(await reader.readline(), 16):
                body += (await reader.readexactly(size + 2))[:-2]
            await reader.readline()
            return status, body
    except (ConnectionError, asyncio.IncompleteReadError):
        return 0, b""


def problem_of(answer: tuple[int, bytes]) -> tuple[int, str]:
    """Return the status and the code of a refusal."""
    return answer[0], json.loads(answer[1])["code"]


async def eventually(condition: Callable[[], object]) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(WITHIN_S):
        while not condition():
            await asyncio.sleep(0.01)


class H2Caller:
    """A connection of HTTP/2, of which the test sees every event."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        config = h2.config.H2Configuration(
            validate_outbound_headers=False, normalize_outbound_headers=False, header_encoding="utf-8"
        )
        self.h2 = h2.connection.H2Connection(config)
        self.events: list[h2.events.Event] = []
        self.is_over = False

    def flush(self) -> None:
        """Send what h2 has to send."""
        self.writer.write(self.h2.data_to_send())

    def request(self, headers: Headers, body: bytes | None = b"1") -> int:
        """Begin a request, and end it unless `body` is None; return its stream."""
        stream = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream, headers, end_stream=False)
        if body is not None:
            self.h2.send_data(stream, body, end_stream=True)
        self.flush()
        return stream

    async def read(self, *, acknowledge: bool = True) -> None:
        """Take in the next bytes of the server."""
        async with asyncio.timeout(WITHIN_S):
            try:
                data = await self.reader.read(1 << 16)
            except ConnectionError:
                data = b""
        if not data:
            self.is_over = True
            return
        events = self.h2.receive_data(data)
        self.events += events
        if acknowledge:
            for event in events:
                if isinstance(event, h2.events.DataReceived) and event.flow_controlled_length:
                    with suppress(h2.exceptions.ProtocolError):
                        self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        with suppress(OSError):
            self.flush()

    def of(self, stream: int, kind: type[Any]) -> list[Any]:
        """Return a stream's events of a kind."""
        return [event for event in self.events if isinstance(event, kind) and event.stream_id == stream]

    async def until(self, condition: Callable[[], object]) -> None:
        """Read until the condition holds, or the server ends the connection."""
        while not condition() and not self.is_over:
            await self.read()

    async def answer(self, stream: int) -> tuple[int, bytes]:
        """Wait for the answer of a stream: status and body; (0, b"") for a reset."""
        ends = (h2.events.StreamEnded, h2.events.StreamReset)
        await self.until(lambda: any(self.of(stream, kind) for kind in ends))
        responses = self.of(stream, h2.events.ResponseReceived)
        if not responses:
            return 0, b""
        status = int(dict(responses[0].headers)[":status"])
        return status, b"".join(event.data for event in self.of(stream, h2.events.DataReceived))


@asynccontextmanager
async def h2_caller(host: Hosted, **settings: int) -> AsyncIterator[H2Caller]:
    """Open a connection of HTTP/2; `settings` are of SETTINGS."""
    async with connect(host) as (reader, writer):
        caller = H2Caller(reader, writer)
        caller.h2.initiate_connection()
        if settings:
            caller.h2.update_settings(
                {h2.settings.SettingCodes[key]: value for key, value in settings.items()}
            )
        caller.flush()
        yield caller


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Return a frame of HTTP/2."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload
