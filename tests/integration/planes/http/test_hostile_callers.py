"""Callers of the http plane that send too much, too little, too slowly or the wrong thing, or leave.

Each test also asks whether another caller is still served.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import logging
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress

import h2.errors
import h2.events
import h2.exceptions
import msgpack
import psutil
import pytest

from dynamo_redis.planes.http import app, engine
from dynamo_redis.planes.http.token import make_token
from tests.http_plane import (
    INSTANCE,
    SECRET,
    Headers,
    Hosted,
    connect,
    eventually,
    frame,
    h2_caller,
    hosted,
    problem_of,
    read_all,
    read_answer,
)

MSGPACK = "Content-Type: application/msgpack"
STREAM = (MSGPACK, "X-Dynamo-Request-Stream: 1")
H2_STREAM = [("content-type", "application/msgpack"), ("x-dynamo-request-stream", "1")]
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
HEADERS, RST_STREAM, SETTINGS, PING, CONTINUATION = 1, 3, 4, 6, 9
MANY_BYTES = 16 << 20
LONG_MESSAGE = b"\xc6\x00\x10\x00\x00"  # the head of one of 1 MiB


@pytest.fixture
async def host() -> AsyncIterator[Hosted]:
    """A server that ends with no request in flight, and still serves others."""
    async with hosted() as found:
        yield found
        assert await found.answers()
        await eventually(lambda: found.server.in_flight_count == 0)


@pytest.fixture
async def hasty(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hosted]:
    """A server with little patience for connections without a request."""
    monkeypatch.setattr(engine, "SWEEP_S", 0.2)
    monkeypatch.setattr(engine, "SILENT_S", 4.0)
    monkeypatch.setattr(engine, "HEAD_S", 4.0)
    async with hosted() as found:
        yield found
        assert await found.answers()


def meta(value: object) -> str:
    return "X-Dynamo-Meta: " + base64.urlsafe_b64encode(msgpack.packb(value)).decode()


def deep_meta() -> str:
    return "X-Dynamo-Meta: " + base64.urlsafe_b64encode(b"\x81" * 3000).decode()


# ------------------------------------------------------------------------- contents


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (b"{", ""),
        (b"\xff", ""),
        (b'"\\ud800"', ""),
        (b"9" * 5000, ""),
        (b"9" * 30, ""),
        (b"[" * 20_000, ""),
        (b"[" * 1100 + b"]" * 1100, ""),
        (b"\xc1", MSGPACK),
        (b"", MSGPACK),
        (b"\x01\x02", MSGPACK),
        (b"\x81\x80\x01", MSGPACK),
        (b"\xdd\x7f\xff\xff\xff" * 1000, MSGPACK),
    ],
)
async def test_malformed_body_is_an_invalid_request(host: Hosted, body: bytes, line: str) -> None:
    answer = await host.ask(host.request("echo", body, *filter(None, [line])))
    assert problem_of(answer) == (400, "invalid_request")


@pytest.mark.parametrize("kind", ["text/xml", "multipart/form-data; boundary=x", "application/grpc", "\xff"])
async def test_other_content_type_is_refused(host: Hosted, kind: str) -> None:
    status, _ = await host.ask(host.request("echo", b"1", f"Content-Type: {kind}"))
    assert status == 415


@pytest.mark.parametrize(
    "body",
    [
        b"\x01\xc1",
        b"\x01\x81\x80\x01",
        b"\xc1",
        b"\x01\x92\x01",
        b"\x01\xc6\x00\x00",
        b"\x01" + b"\xdd\x01\xff\xff\xff" * 1000,
    ],
)
async def test_malformed_message_of_a_stream_is_invalid(host: Hosted, body: bytes) -> None:
    answer = await host.ask(host.request("total", body, *STREAM))
    assert problem_of(answer) == (400, "invalid_request")


@pytest.mark.parametrize(
    "line",
    [
        *(f"X-Request-Timeout-Ms: {value}" for value in ("", "-1", "1.5", "x", "1e3", "9" * 30, "9" * 5000)),
        *(f"X-Dynamo-Meta: {value}" for value in ("", "!!!", "a", "\xe9")),
        meta([1]),
        meta("x"),
        meta({1: 2}),
        meta({"a": None}),
        deep_meta(),
    ],
)
async def test_malformed_header_is_an_invalid_request(host: Hosted, line: str) -> None:
    answer = await host.ask(host.request("echo", b"1", line))
    assert problem_of(answer) == (400, "invalid_request")


async def test_deadline_of_zero_is_expired(host: Hosted) -> None:
    answer = await host.ask(host.request("echo", b"1", "X-Request-Timeout-Ms: 0"))
    assert problem_of(answer) == (504, "deadline_exceeded")
    assert await host.ask(host.request("echo", b"1", "X-Request-Timeout-Ms: 999999999999999")) == (
        200,
        b"1\n",
    )


async def test_metadata_over_the_limit_of_headers_is_invalid(host: Hosted) -> None:
    async with h2_caller(host) as caller:
        name, _, value = meta({"a": "b" * 36_000}).lower().partition(": ")
        value = meta({"a": "b" * 36_000}).partition(": ")[2]
        status, _ = await caller.answer(caller.request(host.headers("echo", (name, value))))
        assert status in (400, 413)


# ------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    "path",
    [
        "",
        "nope",
        "../echo",
        "./echo",
        "x/../echo",
        "/echo",
        "echo/",
        "echo%00",
        "%2e%2e/echo",
        "echo%2f",
        "%2d/live",
        "-",
        "-/",
        "-/other",
        "-/live/x",
        "-/stop",
    ],
)
async def test_other_path_is_not_found(host: Hosted, path: str) -> None:
    assert problem_of(await host.ask(host.request(path))) == (404, "endpoint_not_found")


@pytest.mark.parametrize(
    "line", ["POST / ", "POST //v1/rpc/echo ", "POST /v1/rpc ", "POST /v1/../v1/rpc/echo ", "OPTIONS * "]
)
async def test_path_outside_the_root_is_not_found(host: Hosted, line: str) -> None:
    answer = await host.ask(line.encode() + b"HTTP/1.1\r\nHost: x\r\n\r\n")
    assert problem_of(answer) == (404, "endpoint_not_found")


@pytest.mark.parametrize("path", ["echo?x=1", "ech%6f", "%65cho?/../x"])
async def test_query_and_encoding_are_understood(host: Hosted, path: str) -> None:
    assert await host.ask(host.request(path)) == (200, b"1\n")


async def test_other_methods_are_refused(host: Hosted) -> None:
    for method in ("GET", "PUT", "DELETE", "TRACE", "X"):
        assert (await host.ask(host.head("echo", method=method)))[0] == 405


async def test_websocket_is_refused_without_a_failure(
    host: Hosted, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = (
        "Connection: upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    )
    assert (await host.ask(host.head("echo", *lines, method="GET")))[0] == 405
    assert "Traceback" not in capfd.readouterr().err


# ------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("protocol", ["HTTP/1.1", "HTTP/2"])
@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer x",
        "Bearer v1.....",
        "Bearer \xff",
        "Basic eDp5",
        "Bearer " + make_token(SECRET, INSTANCE, time.time() - 1),
        "Bearer " + make_token(SECRET, INSTANCE + 1, time.time() + 3600),
        "Bearer " + make_token(b"another secret", INSTANCE, time.time() + 3600),
    ],
    ids=[
        "none",
        "empty",
        "no token",
        "rubbish",
        "dots",
        "latin-1",
        "basic",
        "expired",
        "other instance",
        "other secret",
    ],
)
async def test_caller_without_a_token_does_not_get_in(
    host: Hosted, authorization: str | None, protocol: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="dynamo_redis")
    for path in ("echo", "nope", "-/probe", "-/stop/x"):
        if protocol == "HTTP/1.1":
            lines = [] if authorization is None else [f"Authorization: {authorization}"]
            text = "\r\n".join(
                [f"POST /v1/rpc/{path} HTTP/1.1", "Host: x", *lines, "Content-Length: 1", "", "1"]
            )
            answer = await host.ask(text.encode("latin-1"))
        else:
            headers: Headers = [pair for pair in host.headers(path) if pair[0] != "authorization"]
            if authorization is not None:
                headers.append(("authorization", authorization))
            async with h2_caller(host) as caller:
                answer = await caller.answer(caller.request(headers))
        assert problem_of(answer) == (401, "authentication_failed")
    assert "v1." not in caplog.text


# ------------------------------------------------------------------------- sizes of bodies


@pytest.mark.parametrize("value", ["x", "-1", "1, 2", "9" * 5000, "1\r\nContent-Length: 2"])
async def test_unclear_length_ends_the_connection(host: Hosted, value: str) -> None:
    async with connect(host) as (reader, writer):
        writer.write(host.head("echo", f"Content-Length: {value}") + b"1")
        assert (await read_all(reader)).startswith(b"HTTP/1.1 400 ")


async def test_chunks_count_beside_a_length(host: Hosted) -> None:
    """So has it RFC 9112; nothing of the body is read as another request."""
    async with connect(host) as (reader, writer):
        chunks = b"1\r\n1\r\n0\r\n\r\n"
        writer.write(host.head("echo", "Content-Length: 3", "Transfer-Encoding: chunked") + chunks)
        assert await read_answer(reader) == (200, b"1\n")
        writer.write(host.request("echo", b"2"))
        assert await read_answer(reader) in ((200, b"2\n"), (0, b""))


async def test_body_longer_than_announced_reaches_no_handler(host: Hosted) -> None:
    """The rest is read as another request, which is none."""
    async with connect(host) as (reader, writer):
        writer.write(host.head("echo", "Content-Length: 1") + b"12345\r\n\r\n")
        assert await read_answer(reader) == (200, b"1\n")
        assert b" 200 " not in await read_all(reader)


async def test_body_cut_short_reaches_no_handler(host: Hosted) -> None:
    for head in (
        host.head("echo", "Content-Length: 5"),
        host.head("echo", "Transfer-Encoding: chunked") + b"5\r\n",
    ):
        async with connect(host) as (reader, writer):
            writer.write(head + b"1")
            writer.write_eof()
            assert b" 200 " not in await read_all(reader)


@pytest.mark.parametrize(("announced", "body"), [("5", b"1"), ("1", b"12345"), ("x", b"1")])
async def test_wrong_length_resets_a_stream_alone(host: Hosted, announced: str, body: bytes) -> None:
    async with h2_caller(host) as caller:
        stream = caller.request(host.headers("echo", ("content-length", announced)), None)
        caller.writer.write(frame(0, 1, stream, body))
        assert (await caller.answer(stream))[0] in (0, 400)
        assert await caller.answer(caller.request(host.headers("echo"))) == (200, b"1\n")


async def test_body_over_the_limit_is_refused_with_its_size() -> None:
    async with hosted(max_message_bytes=65536) as host:
        size, limit = b"100000000", b"65536"
        status, body = await host.ask(host.head("echo", f"Content-Length: {size.decode()}"))
        assert status == 413
        assert size in body
        assert limit in body
        chunks = b"8000\r\n" + bytes(0x8000) + b"\r\n"
        status, body = await host.ask(host.head("echo", "Transfer-Encoding: chunked") + chunks * 20)
        assert status == 413
        assert limit in body
        status, body = await host.ask(
            host.request("total", b"\x01\xc6\x00\xff\x00\x00" + bytes(1 << 18), *STREAM)
        )
        assert status == 413
        assert await host.answers()


@pytest.mark.parametrize("is_stream", [False, True], ids=["body", "message of a stream"])
async def test_all_bodies_share_one_budget(is_stream: bool) -> None:
    """Bodies that never come whole fill it; a further one is refused. The room is free once they leave."""
    path, others = ("total", H2_STREAM) if is_stream else ("echo", [])
    part = (b"\x01" + LONG_MESSAGE if is_stream else b"") + bytes(16_000)
    async with hosted(max_payload_in_flight_bytes=50_000) as host:
        async with h2_caller(host) as caller:
            streams = []
            for _ in range(4):
                streams.append(caller.request(host.headers(path, *others), None))
                caller.h2.send_data(streams[-1], part)
                caller.flush()
            await caller.until(lambda: any(caller.of(stream, h2.events.StreamEnded) for stream in streams))
            refused = [stream for stream in streams if caller.of(stream, h2.events.StreamEnded)]
            assert problem_of(await caller.answer(refused[0])) == (503, "overloaded")
            assert await host.answers()
        async with asyncio.timeout(30):
            while (await host.ask(host.request("echo", b" " * 40_000 + b"1")))[0] != 200:
                await asyncio.sleep(0.05)


# ------------------------------------------------------------------------- heads and frames


async def test_huge_head_is_refused(host: Hosted) -> None:
    field = "x: " + "a" * 20_000
    for data in (
        host.request("echo" + "a" * 70_000),
        host.request("echo", b"1", "x: " + "a" * 70_000),
        host.request("echo", b"1", *[field] * 10),
        host.request("echo", b"1", *[f"x-{number}: 1" for number in range(200)]),
    ):
        async with connect(host) as (reader, writer):
            writer.write(data)
            assert (await read_answer(reader))[0] in (414, 431, 0)
    for others in ([("x", "a" * 4000)] * 1000, [(f"x{number}", "1") for number in range(500)]):
        async with h2_caller(host) as caller:
            status, _ = await caller.answer(caller.request(host.headers("echo", *others)))
            assert status in (431, 0)


async def write_until_over(data: bytes, writer: asyncio.StreamWriter) -> None:
    """Write up to `MANY_BYTES`, or until the server has ended the connection or takes no more."""
    with suppress(OSError, TimeoutError):
        for _ in range(0, MANY_BYTES, len(data)):
            writer.write(data)
            async with asyncio.timeout(1):
                await writer.drain()


@pytest.mark.parametrize("fragment", [b"", b"\x00\x01a\x01b" * 3000], ids=["empty", "full"])
async def test_continuation_flood_is_cut_off(host: Hosted, fragment: bytes) -> None:
    before = psutil.Process().memory_info().rss
    async with connect(host) as (reader, writer):
        writer.write(PREFACE + frame(HEADERS, 0, 1, b"\x82"))
        frames = frame(CONTINUATION, 0, 1, fragment) * (1 if fragment else 1000)
        for _ in range(1000):
            writer.write(frames)
            await asyncio.sleep(0)
            if reader.at_eof() or writer.is_closing():
                break
        assert await host.answers()
        await read_all(reader)  # the server ends it
    assert psutil.Process().memory_info().rss - before < 64 << 20


@pytest.mark.parametrize("kind", [PING, SETTINGS, 0x77], ids=["PING", "SETTINGS", "unknown"])
async def test_flood_of_frames_takes_no_memory(host: Hosted, kind: int) -> None:
    """The caller reads no acknowledgement."""
    before = psutil.Process().memory_info().rss
    async with connect(host) as (_, writer):
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(PREFACE)
        payload = bytes(8) if kind == PING else b""
        await write_until_over(frame(kind, 0, 0, payload) * 1000, writer)
        assert await host.answers()
    assert psutil.Process().memory_info().rss - before < 64 << 20


async def test_rapid_resets_end_the_connection(host: Hosted) -> None:
    async with h2_caller(host) as caller:
        with suppress(OSError, h2.exceptions.ProtocolError):
            for number in range(5000):
                caller.h2.reset_stream(caller.request(host.headers("wait")))
                caller.flush()
                if number % 50 == 0:
                    await caller.writer.drain()
        await caller.until(lambda: False)
        ends = [event for event in caller.events if isinstance(event, h2.events.ConnectionTerminated)]
        assert not ends or ends[0].error_code == h2.errors.ErrorCodes.ENHANCE_YOUR_CALM
    assert await host.answers()


async def test_more_streams_than_allowed_are_refused() -> None:
    async with hosted(http2_max_concurrent_streams=8) as host:
        async with h2_caller(host) as caller:
            await caller.read()
            caller.h2.remote_settings.max_concurrent_streams = 1000
            caller.h2.remote_settings.acknowledge()
            streams = [caller.request(host.headers("wait")) for _ in range(100)]
            await caller.until(lambda: any(caller.of(stream, h2.events.StreamReset) for stream in streams))
            assert host.server.in_flight_count <= 8
            assert await host.answers()
        await eventually(lambda: host.server.in_flight_count == 0)


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n" * 1000 + b"x",
        b"\x16\x03\x01\x02\x00\x01\x00" + bytes(200),
        b"hello\r\n\r\n",
        PREFACE[:20],
        PREFACE + b"\xff" * 100,
        PREFACE + frame(0, 0, 1, b"x"),
        PREFACE + frame(HEADERS, 4, 1, b"\xff\xff\xff\xff\xff\xff\xff"),
    ],
)
async def test_rubbish_ends_its_connection_alone(hasty: Hosted, data: bytes) -> None:
    async with connect(hasty) as (reader, writer):
        writer.write(data)
        assert await hasty.answers()
        assert b" 200 " not in await read_all(reader)


@pytest.mark.parametrize(
    "lines",
    [("Transfer-Encoding : chunked",), ("X: a\r\n b",), ("X\0: a",), ("Transfer-Encoding: chunked, x",)],
)
async def test_unclear_head_is_refused(host: Hosted, lines: tuple[str, ...]) -> None:
    async with connect(host) as (reader, writer):
        writer.write(host.head("echo", *lines, "Content-Length: 1") + b"1")
        assert (await read_all(reader)).startswith(b"HTTP/1.1 400 ")


# ------------------------------------------------------------------------- HTTP/1 alone


async def test_http_1_0_is_refused(host: Hosted) -> None:
    assert (await host.ask(host.head("echo", "Content-Length: 1", version="1.0") + b"1"))[0] in (400, 505)


async def test_pipelined_requests_are_answered_in_order(host: Hosted) -> None:
    async with connect(host) as (reader, writer):
        numbers = [str(number).encode() for number in range(20)]
        writer.write(b"".join(host.request("echo", number) + host.request("nope") for number in numbers))
        for number in numbers:
            assert await read_answer(reader) == (200, number + b"\n")
            assert (await read_answer(reader))[0] == 404


async def test_expected_continue_comes_before_the_body(host: Hosted) -> None:
    async with connect(host) as (reader, writer):
        writer.write(host.head("echo", "Content-Length: 1", "Expect: 100-continue"))
        assert (await read_answer(reader))[0] == 100
        writer.write(b"1")
        assert await read_answer(reader) == (200, b"1\n")


# ------------------------------------------------------------------------- slow callers


async def test_head_that_never_ends_ends_its_connection(hasty: Hosted) -> None:
    heads = (b"", b"P", b"POST / HTTP/1.1\r\nHost: x\r\n", PREFACE + frame(HEADERS, 0, 1, b"\x82"))
    async with AsyncExitStack() as opened:
        readers = []
        for data in heads:
            reader, writer = await opened.enter_async_context(connect(hasty))
            writer.write(data)
            readers.append(reader)
        assert await hasty.answers()
        for reader in readers:
            assert b" 200 " not in await read_all(reader)


async def test_head_byte_by_byte_has_a_deadline(hasty: Hosted) -> None:
    async with connect(hasty) as (reader, writer), asyncio.timeout(30):
        while not reader.at_eof() and not writer.is_closing():
            writer.write(b"x")
            await asyncio.sleep(0.05)
        assert await hasty.answers()


async def test_connection_with_requests_is_kept(hasty: Hosted) -> None:
    async with h2_caller(hasty) as caller:
        assert await caller.answer(caller.request(hasty.headers("echo"))) == (200, b"1\n")
        await asyncio.sleep(engine.SILENT_S + 5 * engine.SWEEP_S)
        assert await caller.answer(caller.request(hasty.headers("echo"))) == (200, b"1\n")


async def test_heads_byte_by_byte_hold_up_no_other(host: Hosted) -> None:
    """The size of a head bounds them, and the count of connections."""
    async with AsyncExitStack() as opened:
        writers = [(await opened.enter_async_context(connect(host)))[1] for _ in range(50)]
        for byte in b"POST /v1/rpc/echo HTTP/1.1\r\nX:":
            for writer in writers:
                writer.write(bytes((byte,)))
            assert await host.answers()


async def test_body_that_never_comes_has_a_deadline(hasty: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_IDLE_S", 0.2)
    async with connect(hasty) as (reader, writer):
        writer.write(hasty.head("echo", "Content-Length: 100") + b"1")
        assert problem_of(await read_answer(reader)) == (400, "invalid_request")
        assert await read_all(reader) == b""
    async with h2_caller(hasty) as caller:
        stream = caller.request(hasty.headers("echo", ("content-length", "100")), None)
        assert problem_of(await caller.answer(stream)) == (400, "invalid_request")


async def test_unfinished_bodies_end_without_garbage_collection(
    hasty: Hosted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection is open for as long as its refused request is in memory."""
    monkeypatch.setattr(app, "BODY_IDLE_S", 0.2)
    gc.disable()
    try:
        async with AsyncExitStack() as opened:
            pairs = [await opened.enter_async_context(connect(hasty)) for _ in range(12)]
            for _, writer in pairs:
                writer.write(hasty.head("echo", "Content-Length: 100") + b"1")
            for reader, _ in pairs:
                assert problem_of(await read_answer(reader)) == (400, "invalid_request")
            for reader, _ in pairs:
                assert await read_all(reader) == b""
    finally:
        gc.enable()


async def test_request_that_never_comes_has_its_deadline(host: Hosted) -> None:
    stream = ("Content-Type: application/msgpack", "X-Dynamo-Request-Stream: 1", "Transfer-Encoding: chunked")
    for path, lines in (("echo", ("Content-Length: 100",)), ("total", stream)):
        async with connect(host) as (reader, writer):
            writer.write(host.head(path, "X-Request-Timeout-Ms: 300", *lines))
            assert problem_of(await read_answer(reader)) == (504, "deadline_exceeded")


async def test_stream_without_a_message_has_a_deadline(host: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_IDLE_S", 0.2)
    async with h2_caller(host) as caller:
        stream = caller.request(host.headers("total", *H2_STREAM), None)
        assert problem_of(await caller.answer(stream)) == (400, "invalid_request")


@pytest.mark.parametrize("path", ["-/live", "-/probe", "nope", "echo"])
async def test_missing_body_behind_an_answer_ends_it(hasty: Hosted, path: str) -> None:
    async with connect(hasty) as (reader, writer):
        head = hasty.head(path, "Content-Length: 100000000")
        writer.write(head.replace(b"Bearer", b"Basic") if path == "nope" else head)
        assert (await read_answer(reader))[0] in (204, 401, 413)
        assert await read_all(reader) == b""


async def test_stream_of_messages_may_pause(host: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_IDLE_S", 1.0)
    async with h2_caller(host) as caller:
        stream = caller.request(host.headers("total", *H2_STREAM), None)
        for pause_s in (1.5, 1.5, 0):
            caller.h2.send_data(stream, b"\x01")
            caller.flush()
            await asyncio.sleep(pause_s)
        caller.h2.end_stream(stream)
        caller.flush()
        assert await caller.answer(stream) == (200, b"\x03\xc9\x00\x00\x00\x00\xfe")


@pytest.mark.parametrize("protocol", ["HTTP/1.1", "HTTP/2"])
async def test_caller_that_reads_nothing_holds_little(host: Hosted, protocol: str) -> None:
    """Its handlers are held up, and killed when it leaves."""
    async with AsyncExitStack() as opened:
        if protocol == "HTTP/1.1":
            _, writer = await opened.enter_async_context(connect(host))
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(host.request("endless"))
        else:
            caller = await opened.enter_async_context(h2_caller(host, INITIAL_WINDOW_SIZE=0))
            for _ in range(10):
                caller.request(host.headers("endless"))
        await eventually(lambda: host.item_count)
        last_count = 0
        while host.item_count > last_count:
            last_count = host.item_count
            assert await host.answers()
            await asyncio.sleep(1)
        assert host.item_count < 10_000
        assert host.server.in_flight_count == (1 if protocol == "HTTP/1.1" else 10)
    await eventually(lambda: host.server.in_flight_count == 0)


async def test_slow_reader_of_a_large_item_gets_it_whole(host: Hosted) -> None:
    async with connect(host) as (reader, writer):
        body = b'"' + b"x" * (5 << 20) + b'"'
        writer.write(host.request("echo", body))
        assert await read_answer(reader) == (200, body + b"\n")


@pytest.mark.parametrize("action", ["stop", "kill"])
async def test_early_cancellation_is_not_lost(host: Hosted, action: str) -> None:
    """It comes before the body has come whole."""
    async with connect(host) as (reader, writer):
        writer.write(
            host.head("wait", "Content-Length: 5", "X-Dynamo-Exchange: some-id", "Expect: 100-continue")
        )
        assert (await read_answer(reader))[0] == 100
        assert (await host.ask(host.request(f"-/{action}/some-id", b"")))[0] == 204
        writer.write(b"12345")
        status, _ = await read_answer(reader)
        assert status != 200 or host.cancelled == ["stopped"]


# ------------------------------------------------------------------------- callers that leave


@pytest.mark.parametrize("path", ["wait", "late", "unread"])
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_handler_is_killed_when_a_caller_leaves(host: Hosted, path: str, how: str) -> None:
    lines = () if path == "wait" else STREAM
    async with connect(host) as (reader, writer):
        writer.write(host.request(path, b"1" if path == "wait" else b"\x01\x02\x03", *lines))
        await reader.readuntil(b"\r\n\r\n")
        assert host.server.in_flight_count == 1
        if how == "close":
            writer.close()
            await writer.wait_closed()
    await eventually(lambda: host.cancelled == ["killed"])


@pytest.mark.parametrize("path", ["wait", "late", "unread"])
@pytest.mark.parametrize("how", ["close", "reset the stream"])
async def test_handler_is_killed_when_a_stream_ends(host: Hosted, path: str, how: str) -> None:
    others = [] if path == "wait" else H2_STREAM
    async with h2_caller(host) as caller:
        stream = caller.request(host.headers(path, *others), b"1" if path == "wait" else b"\x01\x02\x03")
        await caller.until(lambda: caller.of(stream, h2.events.DataReceived))
        if how != "close":
            caller.h2.reset_stream(stream)
            caller.flush()
            await eventually(lambda: host.cancelled == ["killed"])
            assert await caller.answer(caller.request(host.headers("echo"))) == (200, b"1\n")
    await eventually(lambda: host.cancelled == ["killed"])


async def test_caller_that_leaves_amid_items_frees_them(host: Hosted) -> None:
    for _ in range(5):
        async with connect(host) as (reader, writer):
            writer.write(host.request("endless"))
            await reader.readexactly(100_000)
        async with h2_caller(host) as caller:
            caller.request(host.headers("endless"))
            for _ in range(5):
                await caller.read()
    await eventually(lambda: host.server.in_flight_count == 0)


async def test_caller_that_leaves_amid_its_body_frees_it(host: Hosted) -> None:
    for path, others in (("echo", []), ("total", H2_STREAM)):
        async with connect(host) as (_, writer):
            lines = STREAM if others else ()
            writer.write(host.head(path, *lines, "Content-Length: 1000") + b"\x01\x92")
            assert await host.answers()
        async with h2_caller(host) as caller:
            stream = caller.request(host.headers(path, *others), None)
            caller.h2.send_data(stream, b"\x01\x92")
            caller.flush()
            assert await host.answers()


async def test_silent_answer_shows_signs_of_life(host: Hosted) -> None:
    """On HTTP/1 only: an empty line, or an empty extension value."""
    for lines, beat in (((), b"\n"), ((MSGPACK,), b"\xc7\x00\xfd")):
        async with connect(host) as (reader, writer), asyncio.timeout(30):
            writer.write(host.request("wait", b"1" if not lines else b"\x01", *lines))
            await reader.readuntil(b"%x\r\n%b\r\n" % (len(beat), beat))
