"""The HTTP server in the worker's process: its port, its log, its limits, and its end."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path

import h2.events
import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import ConfigError
from dynamo_redis.planes.http import engine
from dynamo_redis.planes.http.server import HttpServer
from dynamo_redis.planes.select import make_server
from tests.http_plane import (
    INSTANCE,
    SECRET,
    Hosted,
    connect,
    eventually,
    h2_caller,
    hosted,
    read_all,
    read_answer,
)

STREAM = ("Content-Type: application/msgpack", "X-Dynamo-Request-Stream: 1")
H2_STREAM = [("content-type", "application/msgpack"), ("x-dynamo-request-stream", "1")]


@pytest.fixture
async def host() -> AsyncIterator[Hosted]:
    async with hosted() as found:
        yield found


def server_of(host: Hosted) -> HttpServer:
    assert isinstance(host.server, HttpServer)
    return host.server


async def test_port_of_another_worker_is_an_error(host: Hosted) -> None:
    settings = PlaneSettings.load(request_plane="http", http_rpc_host="127.0.0.1", http_rpc_port=host.port)
    second = make_server(settings, secret=SECRET, instance_id=INSTANCE)
    with pytest.raises(ConfigError, match=f"DYN_HTTP_RPC_PORT={host.port}: .* is in use"):
        await second.start()
    await second.aclose()
    assert await host.answers()


async def test_server_writes_nothing_of_its_own(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    level = logging.getLogger().level
    async with hosted() as host:
        assert await host.answers()
        async with connect(host) as (reader, writer):
            writer.write(host.request("endless"))
            await reader.readexactly(100_000)
        async with connect(host) as (_, writer):
            writer.write(b"rubbish\r\n\r\n")
        await eventually(lambda: host.server.in_flight_count == 0)
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if "granian" in record.name]
    assert logging.getLogger().level == level
    assert not logging.getLogger("_granian").handlers


async def test_server_that_ended_serves_again(host: Hosted, caplog: pytest.LogCaptureFixture) -> None:
    first = server_of(host)._engine
    assert first is not None
    first._server.stop()  # type: ignore[no-untyped-call]
    await eventually(lambda: server_of(host)._engine is not first)
    assert await host.answers()
    assert "has ended by itself" in caplog.text


async def test_connections_past_the_limit_wait(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine, "SWEEP_S", 0.3)
    async with hosted(max_connections_count=2) as host, AsyncExitStack() as opened:
        callers = [await opened.enter_async_context(h2_caller(host)) for _ in range(2)]
        for caller in callers:
            assert await caller.answer(caller.request(host.headers("echo"))) == (200, b"1\n")
        async with connect(host) as (reader, writer):
            writer.write(host.request("echo"))
            waiting = asyncio.ensure_future(read_answer(reader))
            await eventually(lambda: "2 connections are open, as many as DYN_TCP_MAX_CONN" in caplog.text)
            assert not waiting.done()
            callers[0].writer.transport.abort()
            assert await waiting == (200, b"1\n")


@pytest.mark.parametrize("protocol", ["HTTP/1.1", "HTTP/2"])
async def test_end_waits_not_for_a_stopped_reader(host: Hosted, protocol: str) -> None:
    async with connect(host) as (silent, _), AsyncExitStack() as opened:
        if protocol == "HTTP/1.1":
            reader, writer = await opened.enter_async_context(connect(host))
            writer.write(host.request("endless"))
        else:
            caller = await opened.enter_async_context(h2_caller(host, INITIAL_WINDOW_SIZE=0))
            caller.request(host.headers("endless"))
            reader = caller.reader
        await eventually(lambda: host.item_count)
        async with asyncio.timeout(30):
            await host.server.aclose()
        await eventually(lambda: not list(engine.accepted(host.port)))
        await read_all(reader)
        assert await read_all(silent) == b""
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(host.host, host.port)


async def test_end_of_a_server_leaves_no_task() -> None:
    before = asyncio.all_tasks()
    async with hosted() as host, AsyncExitStack() as opened:
        for path in ("endless", "wait", "total"):
            _, writer = await opened.enter_async_context(connect(host))
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            lines = STREAM if path == "total" else ()
            writer.write(host.head(path, *lines, "Content-Length: 100") + b"1" + b" " * (99 * (not lines)))
        await eventually(lambda: host.server.in_flight_count == 3)
        await host.server.aclose()
        await eventually(lambda: asyncio.all_tasks() <= before)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the system lists no threads")
async def test_end_of_a_server_leaves_no_thread() -> None:
    """A thread of granian's that is left when Python ends aborts the process, with exit code 134."""
    for _ in range(20):
        before = engine._native_threads()
        async with hosted() as host:
            assert await host.answers()
        assert engine._native_threads() <= before


async def test_end_waits_not_for_the_executor() -> None:
    loop, release = asyncio.get_running_loop(), threading.Event()
    executor = ThreadPoolExecutor(1)
    loop.set_default_executor(executor)
    taken = loop.run_in_executor(None, release.wait)
    try:
        async with hosted() as host, connect(host) as (reader, writer), asyncio.timeout(30):
            writer.write(host.request("echo"))
            assert (await read_answer(reader))[0] == 200
            writer.write(b"POST /v1/rpc/x HTTP/1.1\r\n")
            await host.server.aclose()
    finally:
        release.set()
        await taken
        executor.shutdown()


async def test_request_ends_with_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where more messages than the window wait unread, and so nothing is read of the connection."""
    monkeypatch.setattr(engine, "SWEEP_S", 0.3)
    async with hosted() as host:
        host.server.register("deaf", host.deaf, request_stream=True)
        async with h2_caller(host) as caller:
            stream = caller.request(host.headers("deaf", *H2_STREAM), None)
            caller.h2.send_data(stream, b"\x01")
            caller.flush()
            await caller.until(lambda: caller.of(stream, h2.events.DataReceived))
            while caller.h2.local_flow_control_window(stream) > 60_000:
                caller.h2.send_data(stream, b"\x01" * 16_000)
                caller.flush()
                await caller.read()
        await eventually(lambda: host.server.in_flight_count == 0)
