"""HTTP as raw bytes: ends of messages, closing of connections, and methods."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from random import Random
from typing import Any

import pytest

from dynamo_redis.models.llm_protocol import GenerateRequest
from dynamo_redis.planes.context import Context

CHAT = "/v1/chat/completions"
BODY = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "Hi!"}]}).encode()
STREAM = BODY[:-1] + b', "stream": true}'
LIVE = b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n"
DEADLINE_S = 50


class Raw:
    """A connection that sends only the test's bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def answer(self) -> tuple[bytes, bytes]:
        """Read the next response: its head and its body."""
        async with asyncio.timeout(DEADLINE_S):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            return head, await self.reader.readexactly(int(length[0].split(b":")[1])) if length else b""

    async def rest(self) -> bytes:
        """Read until the server closes the connection."""
        async with asyncio.timeout(DEADLINE_S):
            return await self.reader.read()


@asynccontextmanager
async def connected(frontend: Any, *pieces: bytes) -> AsyncIterator[Raw]:
    """Connect, and send pieces, each in a segment of its own."""
    host, port = frontend.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01 if len(pieces) > 1 else 0)
        yield Raw(reader, writer)
    finally:
        writer.close()


def request(
    body: bytes = BODY, *headers: str, version: str = "1.1", path: str = CHAT, chunked: bool = False
) -> bytes:
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    lines = [f"POST {path} HTTP/{version}", "Host: x", *headers, framing, "", ""]
    if chunked:
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    return "\r\n".join(lines).encode() + body


# --------------------------------------------------------------------------- another protocol

UPGRADES = {
    "h2c": (
        "Connection: Upgrade, HTTP2-Settings",
        "Upgrade: h2c",
        "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA",
    ),
    "websocket": ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: x"),
}


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("headers", UPGRADES.values(), ids=UPGRADES)
@pytest.mark.parametrize("cut", [0, 12, -1, -30])
async def test_declined_upgrade_keeps_its_body(
    frontend: Any, headers: tuple[str, ...], chunked: bool, cut: int
) -> None:
    message = request(BODY, *headers, chunked=chunked)
    pieces = (message[:cut], message[cut:]) if cut else (message,)
    async with connected(frontend, *pieces) as raw:
        head, body = await raw.answer()
        assert head.startswith(b"HTTP/1.1 200 ")
        assert json.loads(body)["choices"][0]["message"]["content"]
        # The connection goes on, in HTTP/1.1.
        raw.writer.write(message + LIVE)
        assert (await raw.answer())[0].startswith(b"HTTP/1.1 200 ")
        assert (await raw.answer())[1] == b'{"status": "live"}'


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("split", [False, True])
async def test_body_never_runs_as_a_request(frontend: Any, chunked: bool, split: bool) -> None:
    message = request(LIVE, *UPGRADES["h2c"], chunked=chunked)
    end_of_head = message.index(b"\r\n\r\n") + 4
    pieces = (message[:end_of_head], message[end_of_head:]) if split else (message,)
    async with connected(frontend, *pieces) as raw:
        raw.writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answers = await raw.rest()
    assert answers.count(b"HTTP/1.1 ") == 2
    assert answers.startswith(b"HTTP/1.1 400 ")
    assert b'"object": "list"' in answers
    assert b"live" not in answers


async def test_upgrade_without_a_body_is_one_request(frontend: Any) -> None:
    asked = b"GET /live HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    async with connected(frontend, asked + asked + LIVE) as raw:
        for _ in range(3):
            assert (await raw.answer())[1] == b'{"status": "live"}'


@pytest.mark.parametrize("seed", range(8))
async def test_messages_are_read_alike_however_cut(frontend: Any, seed: int) -> None:
    random = Random(seed)
    upgrade = UPGRADES["h2c"]
    kinds = [
        (request(BODY), 200),
        (request(BODY, *upgrade), 200),
        (request(STREAM, *upgrade, chunked=True), 200),
        (request(LIVE, *upgrade, path="/live"), 405),
        (request(LIVE, path="/nothing", chunked=True), 404),
        (request(b"", *upgrade), 400),
        (LIVE, 200),
    ]
    messages = random.choices(kinds, k=6)
    last = b"GET /live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    content = b"".join(message for message, _ in messages) + last
    cuts = sorted(random.sample(range(len(content)), 12))
    pieces = [content[start:end] for start, end in pairwise([0, *cuts, len(content)])]
    async with connected(frontend, *pieces) as raw:
        answers = await raw.rest()
    statuses = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", answers)]
    assert statuses == [*(status for _, status in messages), 200]


async def test_tunnel_is_refused_with_all_that_follows(frontend: Any) -> None:
    async with connected(frontend, b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n" + LIVE) as raw:
        answers = await raw.rest()
    assert answers.startswith(b"HTTP/1.1 405 ")
    assert answers.count(b"HTTP/1.1 ") == 1


# --------------------------------------------------------------------------- the end of an answer


async def test_http_1_0_gets_no_chunks(frontend: Any) -> None:
    async with connected(frontend, request(STREAM, "Connection: keep-alive", version="1.0")) as raw:
        head, _, body = (await raw.rest()).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    events = body.split(b"\n\n")
    assert all(line.startswith(b"data: ") for line in events[:-1])
    assert events[-2:] == [b"data: [DONE]", b""]


@pytest.mark.parametrize(("path", "status"), [(CHAT, 413), ("/v1/nothing", 404), ("/live", 405)])
async def test_answer_before_an_announced_body_closes(frontend: Any, path: str, status: int) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: {60 << 20}\r\n\r\n"
    async with connected(frontend, head.encode()) as raw:
        answer = await raw.rest()
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"\r\nconnection: close\r\n" in answer


async def test_announced_body_is_asked_for(frontend: Any) -> None:
    message = request(BODY, "Expect: 100-continue")
    head, body = message[: -len(BODY)], message[-len(BODY) :]
    async with connected(frontend, head) as raw:
        assert (await raw.answer())[0] == b"HTTP/1.1 100 Continue\r\n\r\n"
        raw.writer.write(body)
        answer, _ = await raw.answer()
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close" not in answer


async def test_garbage_spoils_no_answer_before_it(frontend: Any) -> None:
    async with connected(frontend, request() + b"GARBAGE\r\n\r\n" + LIVE) as raw:
        answers = await raw.rest()
    assert answers.startswith(b"HTTP/1.1 200 ")
    assert answers.count(b"HTTP/1.1 ") == 1
    assert answers.endswith(b"}}")


# --------------------------------------------------------------------------- half-closed connections


async def test_half_closed_client_gets_all_its_answers(frontend: Any) -> None:
    frontend.worker.script = frontend.worker.says("one two three", pause_s=0.02)
    half = request()[:-5]
    async with connected(frontend, request() + request(STREAM) + LIVE + half) as raw:
        raw.writer.write_eof()
        answers = await raw.rest()
    assert answers.count(b"HTTP/1.1 200 ") == 3
    assert b"one two three" in answers
    assert b"data: [DONE]" in answers
    assert answers.endswith(b'{"status": "live"}')


async def test_client_that_closes_amid_a_body_is_let_go(frontend: Any) -> None:
    async with connected(frontend, request()[:-5]) as raw:
        raw.writer.write_eof()
        assert await raw.rest() == b""
    assert frontend.worker.requests == []


async def test_half_closed_client_waits_for_a_slow_answer(frontend: Any) -> None:
    going_on = asyncio.Event()

    async def script(request: GenerateRequest, context: Context) -> AsyncGenerator[Any]:
        yield {"token_ids": [40]}
        await going_on.wait()
        yield {"token_ids": [41], "finish_reason": "stop"}

    frontend.worker.script = script
    async with connected(frontend, request()) as raw:
        raw.writer.write_eof()
        for _ in range(2):
            assert (await raw.answer())[0] == b"HTTP/1.1 100 Continue\r\n\r\n"
        going_on.set()
        answers = await raw.rest()
    assert answers.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"").startswith(b"HTTP/1.1 200 ")


async def test_half_closed_stream_shows_signs_of_life(frontend: Any) -> None:
    going_on = asyncio.Event()

    async def script(request: GenerateRequest, context: Context) -> AsyncGenerator[Any]:
        yield {"token_ids": [40]}
        await going_on.wait()
        yield {"token_ids": [41], "finish_reason": "stop"}

    frontend.worker.script = script
    async with connected(frontend, request(STREAM)) as raw:
        raw.writer.write_eof()
        async with asyncio.timeout(DEADLINE_S):
            await raw.reader.readuntil(b"\r\n3\r\n:\n\n\r\n")
        going_on.set()
        assert b"data: [DONE]\n\n" in await raw.rest()


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["whole", "stream"])
async def test_client_that_hangs_up_amid_silence_is_found_out(frontend: Any, body: bytes) -> None:
    begun = asyncio.Event()

    async def script(request: GenerateRequest, context: Context) -> AsyncGenerator[Any]:
        yield {"token_ids": [40]}
        begun.set()
        await asyncio.Event().wait()

    frontend.worker.script = script
    async with connected(frontend, request(body)):
        await begun.wait()
    await frontend.until(lambda: frontend.worker.ended == ["closed"])
    assert frontend.worker.contexts[0].is_killed()


# --------------------------------------------------------------------------- methods and content


async def test_options_names_the_methods(frontend: Any) -> None:
    for path, allowed in ((CHAT, "POST"), ("/clear_kv_blocks", "POST"), ("/v1/models", "GET")):
        answer = await frontend.http.request("OPTIONS", path, headers={"Origin": "http://evil.example"})
        assert answer.status_code == 204
        assert allowed in answer.headers["allow"]
        assert not any(name.startswith("access-control") for name in answer.headers)
    assert (await frontend.http.request("OPTIONS", "/v1/nothing")).status_code == 404


async def test_head_has_the_headers_of_get(frontend: Any) -> None:
    for path in ("/v1/models", "/v1/models/demo", "/health", "/live"):
        head, get = await frontend.http.head(path), await frontend.http.get(path)
        assert (head.status_code, head.content) == (get.status_code, b"")
        assert head.headers["content-length"] == get.headers["content-length"]


async def test_encoded_body_is_refused_by_name(frontend: Any) -> None:
    answer = await frontend.http.post(CHAT, content=BODY, headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 415
    assert answer.json()["error"]["code"] == "unsupported_content_encoding"
    answer = await frontend.http.post(CHAT, content=BODY, headers={"Content-Encoding": "identity"})
    assert answer.status_code == 200


async def test_header_that_chooses_a_worker_is_refused(frontend: Any) -> None:
    answer = await frontend.http.post(CHAT, content=BODY, headers={"X-Worker-Instance-Id": "1"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "x-worker-instance-id"


async def test_no_page_of_another_site_changes_state(frontend: Any) -> None:
    own = {"Content-Type": "application/json"}
    for headers, content, status in (
        (own, b"", 200),
        (own, b"{}", 200),
        ({**own, "Origin": frontend.url}, b"{}", 200),
        ({"Content-Type": "application/json; charset=utf-8"}, b"{}", 200),
        ({**own, "Origin": "http://evil.example"}, b"{}", 403),
        ({**own, "Origin": "null"}, b"{}", 403),
        ({**own, "Origin": "http://[evil"}, b"{}", 403),
        ({}, b"", 415),
        ({"Content-Type": "text/plain"}, b"{}", 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, b"", 415),
        (own, b"{", 400),
        (own, b"[]", 400),
        (own, b'{"workers": []}', 400),
    ):
        answer = await frontend.http.post("/clear_kv_blocks", headers=headers, content=content)
        assert answer.status_code == status, (headers, content)


# --------------------------------------------------------------------------- usage


async def test_cached_tokens_are_at_most_the_prompts(frontend: Any) -> None:
    frontend.worker.script = frontend.worker.says("one two", cached_tokens=2)
    prompts = [[5, 6, 7], [8]]
    body = {"model": "demo", "prompt": prompts, "n": 3}
    usage = (await frontend.http.post("/v1/completions", json=body)).json()["usage"]
    assert usage["prompt_tokens"] == 4
    assert usage["prompt_tokens_details"]["cached_tokens"] == 3  # 2 of the first, 1 of the second
