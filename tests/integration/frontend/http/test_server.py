"""The server around the application: its port, its sockets, its shutdown; health."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynamo_redis.errors import ConfigError
from dynamo_redis.frontend.http import port, protocol, server
from dynamo_redis.frontend.http.port import SharedPort, bind, url_of
from dynamo_redis.frontend.http.server import model_cache
from dynamo_redis.models.llm_protocol import GenerateRequest
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.tcp import listener


def test_a_port_in_use_is_one_line_that_says_what_to_do() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} is in use: .*--http-port") as caught:
            bind("127.0.0.1", port)
    assert "\n" not in str(caught.value)


def test_foreign_address_is_one_line() -> None:
    with pytest.raises(ConfigError, match="DYN_HTTP_HOST"):
        bind("192.0.2.1", 0)
    with pytest.raises(ConfigError, match="DYN_HTTP_HOST"):
        bind("no such host", 0)


def test_the_url_is_one_that_opens() -> None:
    for host, expected in (("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "localhost")):
        with bind(host, 0) as bound:
            assert url_of(bound) == f"http://{expected}:{bound.getsockname()[1]}"


async def test_small_events_do_not_wait_for_more(open_frontend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """TCP_NODELAY is on: with it off, Nagle and delayed acknowledgements cost 40 ms an event."""
    servers: list[Any] = []

    class Recorded(server._Server):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            servers.append(self)

    monkeypatch.setattr(server, "_Server", Recorded)
    frontend = await open_frontend()
    await frontend.http.get("/live")
    [connection] = servers[0].server_state.connections
    transport_socket = connection.transport.get_extra_info("socket")
    assert transport_socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_signals_stay_the_runtimes(open_frontend: Any) -> None:
    """uvicorn would handle them, and end the process by itself."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    await open_frontend()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


async def test_health_tells_who_serves(frontend: Any) -> None:
    response = await frontend.http.get("/health")
    assert response.status_code == 200
    body = response.json()
    assert body["status"] == "healthy"
    assert body["models"] == [{"name": "demo", "instances": 1}]
    assert body["endpoints"] == ["dyn://dynamo.backend.generate"]
    [instance] = body["instances"]
    assert instance["instance_id"] == 1
    assert "secret" not in response.text
    frontend.worker.ids = []
    response = await frontend.http.get("/health")
    assert response.status_code == 503
    assert response.json()["status"] == "unhealthy"
    assert (await frontend.http.get("/live")).status_code == 200


async def test_health_tells_that_the_registry_refuses_writes(frontend: Any) -> None:
    frontend.runtime.registry.write_refusal = "Redis is out of memory"
    body = (await frontend.http.get("/health")).json()
    assert (body["registry"], body["registry_reason"]) == ("refuses writes", "Redis is out of memory")
    assert body["status"] == "healthy"


async def test_before_the_first_model_health_is_not_ok(open_frontend: Any) -> None:
    frontend = await open_frontend(model=None)
    response = await frontend.http.get("/health")
    assert response.status_code == 503
    assert "start a worker" in response.json()["reason"]
    assert (await frontend.http.get("/v1/models")).json()["data"] == []


async def test_a_shutdown_lets_streams_finish(frontend: Any) -> None:
    frontend.worker.script = frontend.worker.says("one two three four five six", pause_s=0.05)
    stream = await frontend.client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Hi"}], stream=True
    )
    pieces = [(await anext(stream)).choices[0].delta.content or ""]
    frontend.shutdown.set()
    await asyncio.sleep(0.02)
    async with httpx.AsyncClient() as other:
        with pytest.raises(httpx.ConnectError):
            await other.get(f"{frontend.url}/live")
    pieces += [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(pieces) == "one two three four five six"
    assert frontend.worker.ended == ["complete"]


CHAT = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}


async def test_requests_past_the_shutdown_are_told(frontend: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Those that are not over in its time end with an error: a stream, a whole answer, a half-sent body."""

    async def endless(request: GenerateRequest, context: Context) -> AsyncGenerator[Any]:
        while True:
            await asyncio.sleep(0.01)
            yield {"token_ids": [40]}

    frontend.worker.script = endless
    whole = asyncio.create_task(frontend.http.post("/v1/chat/completions", json=CHAT))
    halves = []
    for path in (b"/v1/chat/completions", b"/clear_kv_blocks"):
        half = await asyncio.open_connection(*frontend.url.removeprefix("http://").split(":"))
        head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n" % path
        half[1].write(head + b"Content-Type: application/json\r\n\r\n{")
        halves.append(half)
    await frontend.until(lambda: len(frontend.worker.requests) == 1)
    async with frontend.http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as stream:
        lines = stream.aiter_lines()
        await anext(lines)
        frontend.shutdown.set()
        *_, last = [line async for line in lines if line]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "draining"
    response = await whole
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.json()["error"]["code"] == "draining"
    for reader, writer in halves:
        assert (await reader.readline()).startswith(b"HTTP/1.1 503 ")
        writer.close()
    assert frontend.worker.ended == ["closed", "closed"]
    assert "Traceback" not in caplog.text


async def test_kept_connection_has_a_last_answer(frontend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that reuses its connection in the moment of a shutdown is answered, and told to close."""
    monkeypatch.setattr(protocol, "DRAIN_IDLE_S", 60)
    assert "connection" not in (await frontend.http.get("/live")).headers
    frontend.shutdown.set()
    await until_refused(frontend.url)
    response = await frontend.http.get("/live")
    assert (response.status_code, response.headers["connection"]) == (200, "close")
    with pytest.raises(httpx.ConnectError):
        await frontend.http.get("/live")


async def test_stream_at_shutdown_leaves_one_more_request(
    frontend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream's head did not say that the connection ends with it."""
    monkeypatch.setattr(protocol, "DRAIN_IDLE_S", 60)
    frontend.worker.script = frontend.worker.says("one two three four", pause_s=0.05)
    async with frontend.http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as stream:
        pieces = stream.aiter_bytes()
        await anext(pieces)
        frontend.shutdown.set()
        await until_refused(frontend.url)
        assert b"".join([piece async for piece in pieces]).endswith(b"data: [DONE]\n\n")
    assert (await frontend.http.get("/live")).headers["connection"] == "close"


async def test_shutdown_answers_connections_in_the_backlog(
    open_frontend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server accepts one connection a turn, so most of these wait in the kernel when it closes."""
    monkeypatch.setattr(listener, "ACCEPTS_A_TURN", 1)
    monkeypatch.setattr(protocol, "DRAIN_IDLE_S", 0.05)
    frontend = await open_frontend()
    host, port = frontend.url.removeprefix("http://").split(":")
    clients = [socket.create_connection((host, int(port))) for _ in range(50)]
    for client in clients:
        client.send(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
        client.setblocking(False)
    silent = socket.create_connection((host, int(port)))
    silent.setblocking(False)
    frontend.shutdown.set()
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(20):
        answers = [await loop.sock_recv(client, 4096) for client in clients]
        assert await loop.sock_recv(silent, 4096) == b""
    for client in (*clients, silent):
        client.close()
    assert {answer[:15] for answer in answers} == {b"HTTP/1.1 200 OK"}


async def test_idle_connections_end_soon_after_a_shutdown(
    open_frontend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "DRAIN_IDLE_S", 0.05)
    frontend = await open_frontend()
    await frontend.http.get("/live")
    host, port = frontend.url.removeprefix("http://").split(":")
    silent, writer = await asyncio.open_connection(host, int(port))
    await asyncio.sleep(0)
    frontend.shutdown.set()
    async with asyncio.timeout(20):
        assert await silent.read() == b""
    writer.close()


async def until_refused(url: str) -> None:
    """Wait until the server does not accept connections any more."""
    async with asyncio.timeout(20):
        while True:
            async with httpx.AsyncClient() as other:
                try:
                    await other.get(f"{url}/live")
                except httpx.ConnectError:
                    return


def test_shared_port_is_reserved() -> None:
    """Neither another such port nor a single socket can have it, also while no process listens."""
    shared = SharedPort("127.0.0.1", 0)
    number = int(shared.url.rpartition(":")[2])
    sockets = [shared.open() for _ in range(3)]
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"port {number} is in use"):
            SharedPort("127.0.0.1", number)
        with pytest.raises(ConfigError, match=f"port {number} is in use"):
            bind("127.0.0.1", number)
        for opened in sockets:
            opened.close()
    shared.close()
    SharedPort("127.0.0.1", number).close()


def test_two_shared_ports_at_once_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have bound the port before one of them listens."""
    first = bind("127.0.0.1", 0)
    number = first.getsockname()[1]
    both = iter([first, bind("127.0.0.1", number)])
    monkeypatch.setattr(port, "bind", lambda *_: next(both))
    shared = SharedPort("127.0.0.1", number)
    with pytest.raises(ConfigError, match="is in use"):
        SharedPort("127.0.0.1", number)
    shared.close()


def test_shared_port_refuses_a_port_in_use() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(ConfigError, match="is in use"):
            SharedPort("127.0.0.1", taken.getsockname()[1])


async def test_model_files_go_where_they_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with model_cache(tmp_path / "given") as directory:
        assert directory == tmp_path / "given"
    assert directory.is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="DYN_MODEL_CACHE"), model_cache(tmp_path / "file" / "x"):
        pass
    monkeypatch.setattr(server, "user_model_cache", lambda: tmp_path / "file" / "x")
    with model_cache(None) as directory:
        assert directory.is_dir()
    assert not directory.exists()


async def send_raw(url: str, content: bytes) -> bytes:
    """Send bytes and read until the server closes."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(content)
    answer = await reader.read()
    writer.close()
    return answer


async def test_invalid_http_is_refused(frontend: Any) -> None:
    answer = await send_raw(frontend.url, b"\x16\x03\x01\x02\x00 hello\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'{"error": {"message": "Invalid HTTP request received."' in answer


async def test_headers_without_end_are_refused(frontend: Any) -> None:
    host, port = frontend.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /live HTTP/1.1\r\nHost: x\r\nX-Endless: ")
    answer = asyncio.create_task(reader.readline())
    while not answer.done():
        writer.write(b"x" * 1024)
        await asyncio.sleep(0.001)
    assert (await answer).startswith(b"HTTP/1.1 431 ")
    writer.close()
    assert (await frontend.http.get("/live")).status_code == 200


async def test_a_client_that_sends_no_request_is_let_go(
    open_frontend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.1)
    frontend = await open_frontend()
    for beginning in (b"", b"GET /live HT", b"GET /live HTTP/1.1\r\nHost: x\r\n\r\nGET /li"):
        assert b"HTTP/1.1 408 " in await send_raw(frontend.url, beginning)
    # Once its head is here a request may take longer.
    frontend.worker.script = frontend.worker.says("one two three four", pause_s=0.1)
    response = await frontend.http.post("/v1/completions", json={"model": "demo", "prompt": "x"})
    assert response.status_code == 200


async def test_port_scan_logs_nothing(open_frontend: Any, caplog: pytest.LogCaptureFixture) -> None:
    frontend = await open_frontend()
    with caplog.at_level(logging.INFO):
        assert b" 400 " in await send_raw(frontend.url, b"\x16\x03\x01\x00\xee\r\n\r\n")
    assert [record for record in caplog.records if record.name == "uvicorn.error"] == []
