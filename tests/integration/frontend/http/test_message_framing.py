"""Beginnings and ends of requests: many in one piece, ambiguous heads, empty lines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from dynamo_redis.frontend.http import server
from dynamo_redis.frontend.http.protocol import HttpProtocol
from dynamo_redis.models.llm_protocol import GenerateRequest
from dynamo_redis.planes.context import Context

LIVE = b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"GET /live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
PROMPT = b'{"model": "demo", "prompt": "x"}'
COMPLETION = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(PROMPT)
) + PROMPT

MOST_PARSED_COUNT = 150
"""So many requests fit into one piece, and one more of them is under way."""


class Held:
    """A script that waits for the test before it answers."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def __call__(self, request: GenerateRequest, context: Context) -> AsyncGenerator[Any]:
        await self.go.wait()
        yield {"token_ids": [40], "finish_reason": "stop"}


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """Return the frontend's open connections."""
    found: set[Any] = set()

    class Watched(HttpProtocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            found.add(self)

    monkeypatch.setattr(server, "HttpProtocol", Watched)
    return found


async def connect(frontend: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = frontend.url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


async def answers(frontend: Any, content: bytes, *, ends: bool = False) -> bytes:
    """Send bytes, half-close if `ends`, and read until the frontend closes."""
    reader, writer = await connect(frontend)
    writer.write(content)
    if ends:
        writer.write_eof()
    async with asyncio.timeout(60):
        answer = await reader.read()
    writer.close()
    return answer


async def test_few_pipelined_requests_are_parsed(connections: set[Any], open_frontend: Any) -> None:
    """A parsed request takes a hundred times its size until it is answered."""
    frontend = await open_frontend()
    frontend.worker.script = held = Held()
    reading = asyncio.create_task(answers(frontend, COMPLETION + 3000 * LIVE + LAST))
    await frontend.until(lambda: len(frontend.worker.requests) == 1)
    [connection] = connections
    most_count = len(connection.pipeline)

    def note() -> bool:
        nonlocal most_count
        most_count = max(most_count, len(connection.pipeline))
        return reading.done()

    held.go.set()
    await frontend.until(note)
    assert (await reading).count(b"HTTP/1.1 200 ") == 3002
    assert most_count < MOST_PARSED_COUNT


async def test_head_after_a_body_counts_alone(open_frontend: Any) -> None:
    """Earlier bytes of the same read do not count in its size."""
    frontend = await open_frontend()
    reader, writer = await connect(frontend)
    size = 200_000
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size
    writer.write(head + PROMPT.ljust(size) + LAST[:9])
    async with asyncio.timeout(60):
        await reader.readuntil(b'"object"')
        writer.write(LAST[9:])
        answer = await reader.read()
    writer.close()
    assert answer.count(b"HTTP/1.1 200 ") == 1


async def test_half_closed_client_gets_all_its_answers(open_frontend: Any) -> None:
    answer = await answers(await open_frontend(), 2000 * LIVE, ends=True)
    assert answer.count(b"HTTP/1.1 200 ") == 2000


async def test_garbage_at_the_end_costs_no_answer(open_frontend: Any) -> None:
    frontend = await open_frontend()
    frontend.worker.script = held = Held()
    garbage = b"POST /live HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n"
    reading = asyncio.create_task(answers(frontend, COMPLETION + LIVE + garbage, ends=True))
    await frontend.until(lambda: len(frontend.worker.requests) == 1)
    assert (await frontend.http.get("/live")).status_code == 200
    held.go.set()
    assert (await reading).count(b"HTTP/1.1 200 ") == 2


async def test_empty_line_keeps_no_connection(open_frontend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "KEEP_ALIVE_S", 0.5)
    reader, writer = await connect(await open_frontend())
    async with asyncio.timeout(60):
        writer.write(LIVE)
        await reader.readuntil(b'"live"')
        writer.write(b"\r\n")
        assert await reader.read() == b"}"
    writer.close()


TWO_WAYS = [
    (b"POST /live HTTP/1.1\r\n", 400),
    (b"POST /live HTTP/1.1\r\nHost: x\r\nHost: y\r\n", 400),
    (b"POST /live HTTP/1.1\r\nHost: x/y\r\n", 400),
    (b"POST /live HTTP/2.0\r\nHost: x\r\n", 505),
    (b"POST /live HTTP/0.9\r\nHost: x\r\n", 505),
    (b"POST /live HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n", 501),
    (b"POST /live HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n", 501),
]


@pytest.mark.parametrize(("head", "status"), TWO_WAYS)
async def test_head_with_two_meanings_is_refused(open_frontend: Any, head: bytes, status: int) -> None:
    """Neither its possible body nor the bytes behind it are taken for a request."""
    frontend = await open_frontend()
    if b"chunked" in head:
        content = head + b"\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(COMPLETION), COMPLETION)
    else:
        content = head + b"Content-Length: %d\r\n\r\n" % len(COMPLETION) + COMPLETION
    answer = await answers(frontend, content + COMPLETION)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert answer.count(b"content-length: ") == 1
    assert (await frontend.http.get("/live")).status_code == 200
    assert frontend.worker.requests == []


async def test_refused_head_leaves_earlier_bodies_alone(open_frontend: Any) -> None:
    frontend = await open_frontend()
    frontend.worker.script = held = Held()
    refused = TWO_WAYS[1][0] + b"Content-Length: 5\r\n\r\nhello"
    reading = asyncio.create_task(answers(frontend, COMPLETION + COMPLETION + refused + COMPLETION))
    await frontend.until(lambda: len(frontend.worker.requests) == 1)
    held.go.set()
    assert (await reading).count(b"HTTP/1.1 200 ") == 2
    assert len(frontend.worker.requests) == 2


async def test_white_space_around_a_length_is_ignored(open_frontend: Any) -> None:
    content = COMPLETION.replace(b"\r\n\r\n", b" \t\r\nConnection: close\r\n\r\n")
    assert (await answers(await open_frontend(), content)).startswith(b"HTTP/1.1 200 ")
