"""Clients that hang up or do not read: their requests, and no others, end at the worker."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from dynamo_redis.models.llm_protocol import GenerateRequest
from dynamo_redis.planes.context import Context

CHAT = "/v1/chat/completions"
PROMPTLY_S = 1.0


class Endless:
    """A script that does not end by itself."""

    def __init__(self, pause_s: float = 0.001, token_id: int = 40) -> None:
        self.item_count = 0
        self._pause_s = pause_s
        self._token_id = token_id

    async def __call__(self, request: GenerateRequest, context: Context) -> AsyncGenerator[Any]:
        while True:
            await asyncio.sleep(self._pause_s)
            self.item_count += 1
            yield {"token_ids": [self._token_id]}


async def post(
    url: str, body: dict[str, Any], *, count: int = 1
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a request `count` times over a socket: the test controls reading and the connection's end."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=4096)
    content = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "Hi"}], **body}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    writer.write((head + content) * count)
    return reader, writer


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("abrupt", [True, False])
async def test_a_client_that_hangs_up_ends_its_request(frontend: Any, stream: bool, abrupt: bool) -> None:
    frontend.worker.script = Endless()
    reader, writer = await post(frontend.url, {"stream": stream})
    if stream:
        await reader.readuntil(b"data: ")
    await frontend.until(lambda: len(frontend.worker.requests) == 1)
    started = time.monotonic()
    if abrupt:
        writer.transport.abort()
    else:
        writer.close()
    await frontend.until(lambda: frontend.worker.ended == ["closed"])
    assert time.monotonic() - started < PROMPTLY_S
    assert frontend.worker.contexts[0].is_killed()


@pytest.mark.parametrize("stream", [True, False])
async def test_client_that_pipelines_ends_its_request(
    frontend: Any, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The connection's end reaches the request that is served, also with others behind it."""
    frontend.worker.script = Endless()
    reader, writer = await post(frontend.url, {"stream": stream}, count=3)
    if stream:
        await reader.readuntil(b"data: ")
    await frontend.until(lambda: len(frontend.worker.requests) == 1)
    writer.close()
    await frontend.until(lambda: frontend.worker.ended == ["closed"])
    assert frontend.worker.contexts[0].is_killed()
    assert "Traceback" not in caplog.text
    text = (await frontend.http.get("/metrics")).text
    assert 'error_type="cancelled"' in text
    assert 'error_type="internal"' not in text
    assert len(frontend.worker.requests) == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_hangs_up_before_the_first_token(frontend: Any, stream: bool) -> None:
    async def silent(request: GenerateRequest, context: Context) -> AsyncGenerator[Any]:
        await asyncio.sleep(60)
        yield {}

    frontend.worker.script = silent
    _, writer = await post(frontend.url, {"stream": stream})
    await frontend.until(lambda: len(frontend.worker.requests) == 1)
    writer.close()
    await frontend.until(lambda: frontend.worker.ended == ["closed"])


async def test_a_client_that_hangs_up_amid_its_body_sends_nothing(frontend: Any) -> None:
    host, port = frontend.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{{".encode())
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.close()
    assert (await frontend.http.get("/live")).status_code == 200
    assert frontend.worker.requests == []


async def test_all_choices_end_with_the_client(frontend: Any) -> None:
    frontend.worker.script = Endless()
    reader, writer = await post(frontend.url, {"stream": True, "n": 5})
    await reader.readuntil(b"data: ")
    await frontend.until(lambda: len(frontend.worker.requests) == 5)
    writer.close()
    await frontend.until(lambda: frontend.worker.ended == ["closed"] * 5)


async def test_the_openai_client_hangs_up(frontend: Any) -> None:
    frontend.worker.script = Endless()
    stream = await frontend.client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Hi"}], stream=True
    )
    async for _ in stream:
        break
    await stream.close()
    await frontend.until(lambda: frontend.worker.ended == ["closed"])


async def test_slow_reader_holds_back_only_its_worker(frontend: Any) -> None:
    endless = Endless(pause_s=0)
    frontend.worker.script = endless
    _, writer = await post(frontend.url, {"stream": True})
    counts: list[int] = []
    async with asyncio.timeout(20):
        while len(counts) < 3 or len(set(counts[-3:])) > 1:  # until nothing more is taken
            await asyncio.sleep(0.1)
            counts.append(endless.item_count)
    assert 0 < endless.item_count < 200_000
    frontend.worker.script = frontend.worker.says("Still here.")
    answer = await frontend.client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Hi"}]
    )
    assert answer.choices[0].message.content == "Still here."
    writer.transport.abort()
    await frontend.until(lambda: "closed" in frontend.worker.ended)


async def test_a_hang_up_leaves_other_streams_alone(frontend: Any) -> None:
    frontend.worker.script = frontend.worker.says("one two three four five six seven", pause_s=0.02)
    stream = await frontend.client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Hi"}], stream=True
    )
    for _ in range(20):
        _, writer = await post(frontend.url, {"stream": True})
        writer.transport.abort()
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == "one two three four five six seven"


async def test_events_of_one_tick_share_a_write(frontend: Any) -> None:
    """Each read of the client returns many events, and no events are merged."""

    async def burst(request: GenerateRequest, context: Context) -> AsyncGenerator[Any]:
        for index in range(200):
            yield {"token_ids": [40], **({"finish_reason": "length"} if index == 199 else {})}

    frontend.worker.script = burst
    reader, writer = await post(frontend.url, {"stream": True})
    content = b""
    while not content.endswith(b"0\r\n\r\n"):
        content += await reader.read(1 << 20)
    writer.close()
    body = content.partition(b"\r\n\r\n")[2]
    assert body.count(b"data: ") == 200 + 3
    chunk_count = 0
    while body:
        size, _, body = body.partition(b"\r\n")
        body = body[int(size, 16) + 2 :]
        chunk_count += 1
    assert chunk_count < 20
