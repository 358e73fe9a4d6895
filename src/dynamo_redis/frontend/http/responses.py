"""Writing of responses: JSON documents and streams of events."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]


class EventResponse:
    """A response of server-sent events, which several tasks may write."""

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        self._send = send
        self._headers = headers
        self._starting = asyncio.Lock()
        self._held = b""
        self.begun = False
        """True once there is a part of the response."""

    async def write(self, events: bytes) -> None:
        """Write events, and before the first ones the head. Waits for a client that reads slowly."""
        if not self.begun:
            async with self._starting:
                if not self.begun:
                    await self._send(
                        {"type": "http.response.start", "status": 200, "headers": [*_SSE, *self._headers]}
                    )
                    self.begun = True
        await self._send({"type": "http.response.body", "body": events, "more_body": True})

    def hold(self, events: bytes) -> None:
        """Keep the last events, to be written with the end."""
        self._held = events

    async def end(self, events: bytes) -> None:
        """Write the held events and the last ones, and end the response."""
        if not self.begun:
            await self.write(b"")
        await self._send({"type": "http.response.body", "body": self._held + events, "more_body": False})


_SSE = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # else nginx buffers the events
]


async def send_json(
    send: Send, status: int, content: bytes, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """Answer with a JSON document."""
    await _send_head(send, status, len(content), headers)
    await send({"type": "http.response.body", "body": content, "more_body": False})


async def send_json_pieces(
    send: Send, status: int, pieces: Sequence[str], headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """Answer with a long JSON document of ASCII. Each piece is encoded once the one before it is on its
    way."""
    await _send_head(send, status, sum(map(len, pieces)), headers)
    for piece in pieces:
        await send({"type": "http.response.body", "body": piece.encode("ascii"), "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_head(
    send: Send, status: int, size_bytes: int, headers: Sequence[tuple[bytes, bytes]]
) -> None:
    own = [(b"content-type", b"application/json"), (b"content-length", b"%d" % size_bytes)]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
