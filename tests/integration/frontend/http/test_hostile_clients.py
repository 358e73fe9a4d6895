"""Clients that send slowly, endlessly or too much at once, and clients that do not read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
from collections.abc import AsyncGenerator
from typing import Any

import psutil
import pytest

from dynamo_redis.models.llm_protocol import GenerateRequest
from dynamo_redis.planes.context import Context

CHAT = "/v1/chat/completions"
BODY = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
LIVE = b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n"

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def connect(frontend: Any) -> Streams:
    host, port = frontend.url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


async def everything(reader: asyncio.StreamReader) -> bytes:
    """Read until the connection ends or is reset."""
    content = b""
    try:
        while piece := await reader.read(65536):
            content += piece
    except ConnectionError:
        pass
    return content


async def until_dropped(client: socket.socket) -> None:
    """Wait until the frontend has dropped a connection. Its client does not read, so it cannot notice."""
    frontend, own = client.getpeername()[1], client.getsockname()[1]
    async with asyncio.timeout(30):
        while any(
            (side.laddr.port, side.raddr.port, side.status) == (frontend, own, psutil.CONN_ESTABLISHED)
            for side in psutil.Process().net_connections("tcp")
            if side.status != psutil.CONN_LISTEN
        ):
            await asyncio.sleep(0.05)


async def test_body_that_never_comes_has_a_deadline(open_frontend: Any) -> None:
    frontend = await open_frontend(receive_timeout_s=0.2)
    reader, writer = await connect(frontend)
    writer.write(HEAD + b"Content-Length: 100\r\n\r\n{")
    answer = await everything(reader)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert (
        json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"] == "No whole request within 0.2 s."
    )
    writer.close()


async def test_request_timeout_counts_while_the_body_comes(open_frontend: Any) -> None:
    frontend = await open_frontend(request_timeout_s=0.2)
    reader, writer = await connect(frontend)
    writer.write(HEAD + CHUNKED)
    for _ in range(4):
        writer.write(b"1\r\n{\r\n")
    assert (await everything(reader)).startswith(b"HTTP/1.1 408 ")
    writer.close()


async def test_body_behind_an_answer_ends_the_connection(open_frontend: Any) -> None:
    """The path takes no POST: the answer comes at once. The rest of the body has the usual time limit."""
    frontend = await open_frontend(receive_timeout_s=0.2)
    reader, writer = await connect(frontend)
    writer.write(b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    answer = await everything(reader)
    assert answer.startswith(b"HTTP/1.1 405 ")
    assert answer.count(b"HTTP/1.1 ") == 1
    writer.close()


@pytest.mark.parametrize(
    ("start", "repeated"),
    [
        (HEAD + CHUNKED + b"1\r\n{\r\n0\r\n", b"a: b\r\n"),
        (HEAD + CHUNKED + b"1\r\n{\r\n0\r\na: ", b"v"),
        (HEAD + CHUNKED + b"1;", b"e"),
        (b"POST /health HTTP/1.1\r\nHost: x\r\n" + CHUNKED + b"0\r\n", b"a: b\r\n"),
        (HEAD + CHUNKED + b"1\r\n{\r\n", b"1;eeeeeeeeeeee\r\n \r\n"),
    ],
    ids=[
        "trailers",
        "one trailer",
        "chunk extension",
        "trailers behind an answer",
        "extensions of small chunks",
    ],
)
async def test_framing_without_end_is_cut(frontend: Any, start: bytes, repeated: bytes) -> None:
    reader, writer = await connect(frontend)
    reading = asyncio.create_task(everything(reader))
    block = repeated * (65536 // len(repeated))
    writer.write(start)
    sent = 0
    while not reading.done():
        try:
            writer.write(block)
            await writer.drain()
        except ConnectionError:
            break
        sent += len(block)
        assert sent < 64 << 20
    answer = await reading
    assert answer[:13] in (b"HTTP/1.1 431 ", b"HTTP/1.1 405 ", b"")  # empty: reset, as it still sent
    assert (await frontend.http.get("/live")).status_code == 200
    writer.close()


async def test_trailers_are_left_out(frontend: Any) -> None:
    reader, writer = await connect(frontend)
    body = json.dumps(BODY).encode()
    writer.write(HEAD + CHUNKED + b"%x\r\n%s\r\n0\r\nX-Request-Id: trailer\r\n\r\n" % (len(body), body))
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"trailer" not in head
    writer.close()


@pytest.mark.parametrize("setting", ["send_timeout_s", "request_timeout_s"])
async def test_reader_that_never_reads_is_cut(open_frontend: Any, setting: str) -> None:
    frontend = await open_frontend(**{setting: 0.2})

    async def endless(request: GenerateRequest, context: Context) -> AsyncGenerator[Any]:
        while True:
            yield {"token_ids": [40]}
            await asyncio.sleep(0)

    frontend.worker.script = endless
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        host, port = frontend.url.removeprefix("http://").split(":")
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, (host, int(port)))
        body = json.dumps({**BODY, "stream": True}).encode()
        await loop.sock_sendall(client, HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        await frontend.until(lambda: frontend.worker.ended == ["closed"])
        await until_dropped(client)


async def test_bodies_have_a_budget_together(open_frontend: Any) -> None:
    frontend = await open_frontend(max_bodies_bytes="1MiB", max_body_bytes="2MiB")
    half = b'{"model":"demo","messages":[{"role":"user","content":"' + b"x" * (900 << 10)
    connections = [await connect(frontend) for _ in range(2)]
    for _, writer in connections:
        writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % (len(half) + 4) + half)
    for _, writer in connections:
        await writer.drain()
    small = await frontend.http.post(CHAT, json=BODY)
    assert small.status_code == 200  # small ones pass
    for _, writer in connections:
        writer.write(b'"}]}')
    heads = [await reader.readuntil(b"\r\n\r\n") for reader, _ in connections]
    assert sorted(head[9:12] for head in heads) == [b"400", b"503"]  # the first is too long for the model
    refused = next(head for head in heads if head[9:12] == b"503").lower()
    assert b"retry-after: 1" in refused
    for _, writer in connections:
        writer.close()
    large = {"model": "demo", "messages": [{"role": "user", "content": "x" * (900 << 10)}]}
    assert (await frontend.http.post(CHAT, json=large)).status_code == 400  # there is room again


async def test_choices_of_a_request_are_bounded(open_frontend: Any) -> None:
    frontend = await open_frontend(max_choices_count=6)
    response = await frontend.http.post(
        "/v1/completions", json={"model": "demo", "prompt": ["a", "b"], "n": 4, "max_tokens": 1}
    )
    assert response.status_code == 400
    assert "DYN_HTTP_MAX_CHOICES" in response.json()["error"]["message"]
    assert frontend.worker.requests == []
    response = await frontend.http.post(
        "/v1/completions", json={"model": "demo", "prompt": ["a", "b"], "n": 3, "max_tokens": 1}
    )
    assert len(response.json()["choices"]) == 6


async def test_idle_connection_is_evicted(open_frontend: Any) -> None:
    frontend = await open_frontend(max_http_connections_count=4)
    silent = [await connect(frontend) for _ in range(2)]
    idle = await connect(frontend)
    idle[1].write(LIVE)
    await idle[0].readuntil(b"live")
    frontend.worker.script = frontend.worker.says("one two three", pause_s=0.01)
    working = asyncio.create_task(frontend.http.post(CHAT, json=BODY))
    newcomers = [await connect(frontend) for _ in range(3)]
    for reader, writer in newcomers[1:]:
        writer.write(LIVE)
        assert b" 200 " in await reader.readline()
    assert (await working).status_code == 200
    assert await everything(silent[0][0]) == b""
    for _, writer in (*silent, idle, *newcomers):
        writer.close()


@pytest.mark.parametrize(("status", "code"), [(503, "overloaded"), (429, "rate_limit_exceeded")])
async def test_evicted_request_is_an_overload(open_frontend: Any, status: int, code: str) -> None:
    """A client that has sent a part of its request is told to send it again."""
    frontend = await open_frontend(max_http_connections_count=1, overload_status=status)
    reader, writer = await connect(frontend)
    writer.write(LIVE + LIVE[:10])
    await reader.readuntil(b"live")
    _, newcomer = await connect(frontend)
    head, _, body = (await everything(reader)).removeprefix(b'"}').partition(b"\r\n\r\n")
    for each in (writer, newcomer):
        each.close()
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"retry-after: 1" in head
    assert json.loads(body)["error"]["code"] == code


@pytest.mark.parametrize(("status", "kind"), [(503, "service_unavailable_error"), (529, "overloaded_error")])
async def test_connections_past_the_bound_are_refused(open_frontend: Any, status: int, kind: str) -> None:
    frontend = await open_frontend(max_http_connections_count=1, overload_status=status)
    release = asyncio.Event()

    async def waits(request: GenerateRequest, context: Context) -> AsyncGenerator[Any]:
        await release.wait()
        yield {"token_ids": [40], "finish_reason": "stop"}

    frontend.worker.script = waits
    working = asyncio.create_task(frontend.http.post(CHAT, json=BODY))
    await frontend.until(lambda: len(frontend.worker.requests) == 1)
    reader, writer = await connect(frontend)
    answer = await everything(reader)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"retry-after" in answer
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert (error["code"], error["type"]) == ("overloaded", kind)
    release.set()
    assert (await working).status_code == 200
    writer.close()


async def test_limit_of_open_files_is_told(frontend: Any) -> None:
    host, port = frontend.url.removeprefix("http://").split(":")
    loop = asyncio.get_running_loop()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    with socket.socket() as client:
        client.setblocking(False)
        resource.setrlimit(resource.RLIMIT_NOFILE, (client.fileno() + 20, limits[1]))
        try:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            await loop.sock_connect(client, (host, int(port)))
            answer = b""
            while piece := await loop.sock_recv(client, 65536):
                answer += piece
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for file in taken:
                os.close(file)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"RLIMIT_NOFILE" in answer
    assert (await frontend.http.get("/live")).status_code == 200
