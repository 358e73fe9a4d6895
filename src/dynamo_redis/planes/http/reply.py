"""The two sides of one exchange of the http plane: its body as it comes, and its answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from contextlib import suppress
from typing import Any, Final

from dynamo_redis.errors import AuthenticationFailed, InvalidRequest, PlaneError
from dynamo_redis.planes.http import content

_PART_BYTES: Final = 256 << 10
_DRAIN_BYTES: Final = 256 << 10
_DRAIN_S: Final = 1.0

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Refused(Exception):
    """A request that HTTP itself forbids."""

    def __init__(self, status: int, detail: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers


class Receiver:
    """The events of a request, and whether its body has come whole."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.is_over = False

    async def __call__(self) -> Message:
        message = await self._receive()
        self.is_over = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    async def drain(self) -> None:
        """Read the rest of a small body: a client that still writes may not read an early answer."""
        size_bytes = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                while not self.is_over and size_bytes <= _DRAIN_BYTES:
                    size_bytes += len((await self()).get("body", b""))


class Reply:
    """The answer to one request. A write waits for a caller that reads slowly; once the caller has left, it
    does nothing."""

    def __init__(self, send: Send, bodies: Receiver, beat_s: float | None) -> None:
        """`beat_s` is the time without items after which a beat is sent on HTTP/1; None for HTTP/2."""
        self._to_caller = send
        self._bodies = bodies
        self.beat_s = beat_s
        self.has_started = False

    async def start(
        self, status: int, content_type: str, headers: Iterable[tuple[bytes, bytes]] = ()
    ) -> None:
        await self._head(status, [(b"content-type", content_type.encode()), *headers])

    async def _head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.has_started = True
        await self._to_caller({"type": "http.response.start", "status": status, "headers": headers})

    async def body(self, content_type: str, data: bytes) -> None:
        if not self.has_started:
            await self.start(200, content_type)
        await self._send_data(data, is_last=False)

    async def finish(self, content_type: str, data: bytes) -> None:
        if not self.has_started:
            await self.start(200, content_type)
        await self._send_data(data, is_last=True)

    async def _send_data(self, data: bytes, *, is_last: bool) -> None:
        """Send bytes, a part at a time: granian holds a few parts of each answer, of any size."""
        if len(data) > _PART_BYTES:
            for start in range(0, len(data), _PART_BYTES):
                part = data[start : start + _PART_BYTES]
                await self._to_caller({"type": "http.response.body", "body": part, "more_body": True})
            data = b""
        await self._to_caller({"type": "http.response.body", "body": data, "more_body": not is_last})

    async def empty(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        await self._bodies.drain()
        await self._head(status, list(headers))
        await self._to_caller({"type": "http.response.body", "body": b"", "more_body": False})

    async def refuse(self, refused: Refused) -> None:
        """Answer with an error of HTTP itself."""
        document = {
            "type": "about:blank",
            "title": "Refused",
            "status": refused.status,
            "detail": refused.detail,
            "code": InvalidRequest.code,
        }
        await self._bodies.drain()
        await self.start(refused.status, content.PROBLEM, refused.headers)
        await self._to_caller({"type": "http.response.body", "body": json.dumps(document).encode()})

    async def fail(self, error: PlaneError) -> None:
        """Answer with an error of the plane."""
        if self.has_started:
            return
        document = content.problem(error)
        headers = []
        if "retry_after_ms" in document:
            headers.append((b"retry-after", b"%d" % -(-document["retry_after_ms"] // 1000)))
        if isinstance(error, AuthenticationFailed):
            headers.append((b"www-authenticate", b"Bearer"))
        await self._bodies.drain()
        await self.start(document["status"], content.PROBLEM, headers)
        await self._to_caller({"type": "http.response.body", "body": json.dumps(document).encode()})
