"""Suite `frontend`: each row has a measurement, and its load generator counts whole answers only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import pytest
from benchmarks.frontend.__main__ import BOUNDS, GROUPS
from benchmarks.frontend.caller import Chat, Load, Running
from benchmarks.frontend.flame import shares_of
from benchmarks.frontend.kills import TOKENS, TimedAnswer

HEAD: Final = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
LOAD: Final = Load(port=0, model="m", answer_tokens=2)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def answer(usage: int) -> bytes:
    events = [
        b'{"choices":[{"delta":{"role":"assistant","content":""}}]}',
        b'{"choices":[{"delta":{"content":"a"}}]}',
        b'{"choices":[{"delta":{"content":"b"}}]}',
        b'{"choices":[],"usage":{"completion_tokens":%d}}' % usage,
        b"[DONE]",
    ]
    return HEAD + b"".join(chunk(b"data: %b\n\n" % event) for event in events) + b"0\r\n\r\n"


@asynccontextmanager
async def server(sent: bytes, piece_bytes: int) -> AsyncIterator[int]:
    """Answer each request with these bytes, in pieces. Yields the port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readline():
            await reader.readuntil(b"\r\n\r\n")
            await reader.readuntil(b"}}")
            for first in range(0, len(sent), piece_bytes):
                writer.write(sent[first : first + piece_bytes])
                await writer.drain()
                await asyncio.sleep(0)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as serving:
        yield serving.sockets[0].getsockname()[1]


async def load_put_on(sent: bytes, piece_bytes: int, count: int) -> Running:
    """Send `count` chats on one connection; return the load when they have ended."""
    running = Running(LOAD, [LOAD.body(f"prompt {number}") for number in range(count)])
    running.measuring = True
    async with server(sent, piece_bytes) as port:
        loop = asyncio.get_running_loop()
        _, chat = await loop.create_connection(lambda: Chat(running), "127.0.0.1", port)
        async with asyncio.timeout(60):
            await chat.ended
    return running


def test_every_row_is_measured_once() -> None:
    assert sorted(row for rows, _ in GROUPS for row in rows) == sorted(BOUNDS)


@pytest.mark.parametrize("piece_bytes", [1, 3, 7, 40, 10_000])
async def test_load_counts_answers_in_any_pieces(piece_bytes: int) -> None:
    running = await load_put_on(answer(usage=2), piece_bytes, count=3)
    assert running.failure is None
    assert running.answer_count == 3
    assert len(running.first_tokens_s) == 3


async def test_load_fails_at_an_answer_too_short() -> None:
    running = await load_put_on(answer(usage=1), 10_000, count=3)
    assert running.failure is not None
    assert "not whole" in running.failure
    assert running.stopping


async def test_load_fails_at_an_error() -> None:
    running = await load_put_on(answer(usage=2).replace(b"200 OK", b"503 Oh"), 10_000, count=3)
    assert running.failure is not None
    assert "a chat failed" in running.failure


async def test_pause_of_an_answer_is_beyond_its_usual_one() -> None:
    content = (
        HEAD + chunk(b'data: {"usage":{"completion_tokens":%d}}\n\n' % TOKENS) + chunk(b"data: [DONE]\n\n")
    )
    async with server(content + b"0\r\n\r\n", 10_000) as port:
        loop = asyncio.get_running_loop()
        body = LOAD.body("prompt")
        _, timed = await loop.create_connection(lambda: TimedAnswer(body), "127.0.0.1", port)
        while not timed.times:
            await asyncio.sleep(0)
        timed.times[:] = [0.0, 1.0, 2.0, 3.0, 8.0, 9.0]
        assert await timed.added_pause_s() == 4.0


def test_sample_counts_for_its_innermost_group() -> None:
    frontend = "dynamo_redis/frontend"
    shares = shares_of(
        "run (asyncio/runners.py:1) 1\n"
        f"run (asyncio/runners.py:1);data_received ({frontend}/http/protocol.py:2) 2\n"
        f"data_received (dynamo_redis/planes/tcp/x.py:2);feed ({frontend}/answers.py:3);f (codecs.py:1) 3\n"
        f"data_received ({frontend}/http/protocol.py:2);send (dynamo_redis/planes/tcp/x.py:2) 4\n"
    )
    assert {group: share for group, share in shares.items() if share} == {
        "event loop": 0.1, "HTTP": 0.2, "detokenize": 0.3, "plane": 0.4,
    }  # fmt: skip
