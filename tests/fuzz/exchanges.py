"""Requests to a real server of the http plane: headers and bodies of all kinds, in any pieces.

Each has an answer of HTTP with a status that is documented, and none logs an error: a body that the endpoint
echoes, a whole answer in MessagePack, or a problem document with a code.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Any, Final, Self

import uvloop
from hypothesis import event, given
from hypothesis import strategies as st

from dynamo_redis.errors import PlaneError
from dynamo_redis.planes.http import content
from tests.fuzz.contents import READINGS
from tests.fuzz.rounds import Property
from tests.fuzz.streams import Edit, Long, assemble, edits, splits
from tests.fuzz.watch import Complaints, complaints
from tests.http_plane import Hosted, connect, hosted, read_answer

MAX_BODY_BYTES: Final = 50_000
REFUSALS: Final = frozenset({400, 401, 403, 404, 405, 413, 415, 503, 504})
DEADLINE_MS: Final = "500"


@dataclass(frozen=True)
class Request:
    """A request; `sizes` are those of the chunks in which its body is sent, if it is."""

    method: str
    path: str
    headers: dict[str, str]
    body: tuple[bytes | Long, ...]
    damage: tuple[Edit, ...]
    sizes: tuple[int, ...] | None


class Host:
    """A server in an event loop of its own. Use it in a `with` block."""

    def __enter__(self) -> Self:
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._runner.__enter__()
        self._stack = AsyncExitStack()
        self._runner.run(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._stack.aclose())
        self._runner.__exit__(None, None, None)

    async def _open(self) -> None:
        self._hosted: Hosted = await self._stack.enter_async_context(hosted(max_message_bytes=MAX_BODY_BYTES))
        self._found: Complaints = self._stack.enter_context(complaints())

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine. Raises what it raises, and AssertionError for an error in the log."""
        self._runner.run(work)
        self._found.check()

    async def hold(self, request: Request) -> None:
        """Send a request, and check its answer. Raises AssertionError."""
        body = assemble(list(request.body), list(request.damage))
        status, answer = await self._ask(request, body)
        event(str(status))
        assert status in (200, 204) or status in REFUSALS, (status, answer[:500])
        if status in REFUSALS:
            problem = json.loads(answer)
            assert problem["status"] == status
            assert isinstance(content.read_problem(status, answer), PlaneError)
        elif status == 200:
            _check_answer(request, body, answer)
        assert await self._hosted.answers()

    async def _ask(self, request: Request, body: bytes) -> tuple[int, bytes]:
        lines = [f"{name}: {value}" for name, value in request.headers.items()]
        if request.sizes is None:
            parts = [self._head(request, f"Content-Length: {len(body)}", *lines), body]
        else:
            parts = [self._head(request, "Transfer-Encoding: chunked", *lines)]
            offset = 0
            for size in (*request.sizes, len(body)):
                part = body[offset : offset + size]
                offset += size
                if part:
                    parts.append(b"%x\r\n%b\r\n" % (len(part), part))
            parts.append(b"0\r\n\r\n")
        async with connect(self._hosted) as (reader, writer):
            with suppress(ConnectionError):
                for part in parts:
                    writer.write(part)
                    await writer.drain()
            return await read_answer(reader)

    def _head(self, request: Request, *lines: str) -> bytes:
        return self._hosted.head(request.path, *lines, method=request.method)


def _check_answer(request: Request, body: bytes, answer: bytes) -> None:
    is_msgpack = content.is_msgpack(request.headers.get("Content-Type", ""))
    if not is_msgpack:
        lines = [json.loads(line) for line in answer.splitlines() if line]
        if request.path == "echo":
            assert [repr(line) for line in lines] == [repr(content.read_json(body))] or "error" in lines[-1]
        return
    unpacker = content.new_answer_unpacker(MAX_BODY_BYTES)
    unpacker.feed(answer)
    *items, end = (item for item in unpacker if item is not content.BEAT)
    assert isinstance(end, content.End)
    if (
        content.read_end(end.content) is None
        and request.path == "echo"
        and "X-Dynamo-Request-Stream" not in (request.headers)
    ):
        assert [repr(item) for item in items] == [repr(content.read_msgpack(body))]


_texts = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12)
_headers = st.fixed_dictionaries(
    {
        "Content-Type": st.sampled_from(
            (content.JSON, content.MSGPACK, content.MSGPACK, content.JSON_LINES, "text/html", "x")
        ),
        "X-Request-Timeout-Ms": st.sampled_from((DEADLINE_MS,) * 9 + ("0", "1", "-1", "1.5", "9" * 30, "x")),
    },
    optional={
        "X-Request-Id": _texts,
        "X-Dynamo-Exchange": _texts,
        "X-Dynamo-Meta": st.sampled_from(("gaFhoWI=", "wA==", "kA==", "gQ==", "=", "AAAA")) | _texts,
        "X-Dynamo-Request-Stream": st.just("1"),
        "Traceparent": _texts,
        "Origin": st.just("http://x"),
    },
)
_seeds = [seed for name in ("json", "msgpack") for seed in READINGS[name].seeds]
_bodies = st.lists(
    st.sampled_from(_seeds) | st.binary(max_size=30) | st.just(Long(b"", b"x", 2 * MAX_BODY_BYTES)),
    max_size=3,
)
_requests = st.builds(
    Request,
    st.sampled_from(("POST", "POST", "POST", "POST", "GET", "PUT", "DELETE")),
    st.sampled_from(
        ("echo", "echo", "echo", "total", "late", "nowhere", "-/probe", "-/live", "-/stop/x", "%ff", "a//b")
    ),
    _headers,
    _bodies.map(tuple),
    edits.map(tuple),
    st.none() | splits.map(tuple),
)


def exchanges_property(host: Host) -> Property:
    """Make the property: each request has one of the documented answers."""

    @given(_requests)
    def property_of_exchanges(request: Request) -> None:
        host.run(host.hold(request))

    return property_of_exchanges
