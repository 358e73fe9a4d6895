"""Framing of HTTP messages: refused heads, bytes that clients ignore, and the end of HTTP/1.0 responses."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from dynamo_redis.frontend.http.responses import Event, Receive, Send

Application = Callable[[Any, Receive, Send], Awaitable[None]]

STREAMS_EVENTS = "dynamo_redis.streams_events"
"""Key of a request's scope: its response is written in whole server-sent events."""

_COMMENT = b":\n\n"


_HOST = re.compile(rb"[\w.~!$&'()*+,;=%:\[\]-]*", re.ASCII)


def head_fault(method: bytes, version: str, headers: Sequence[tuple[bytes, bytes]]) -> tuple[int, str] | None:
    """Return the status and the message for a head that is refused, or None.

    A head that a proxy on the way may have understood differently is refused: two hosts, an unknown version,
    or an unknown coding of the body.
    """
    if method == b"CONNECT":
        return 405, "This server is not a proxy."
    if version not in ("1.0", "1.1"):
        return 505, "This server speaks HTTP/1.1."
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (not hosts and version == "1.1"):
        return 400, "A request in HTTP/1.1 must have one Host header."
    if hosts and not _HOST.fullmatch(hosts[0].strip()):
        return 400, "The Host header is not a host."
    codings = [value.strip().lower() for name, value in headers if name == b"transfer-encoding"]
    if codings and codings != [b"chunked"]:
        return 501, "The only supported Transfer-Encoding is chunked."
    return None


def sign_of_life(cycle: RequestResponseCycle) -> bytes:
    """Return bytes that may be sent now and that a client ignores; empty if there are none.

    They are an interim response before the response begins, or a comment between the events of a stream.
    """
    has_chunks = cycle.scope["http_version"] == "1.1"
    if not cycle.response_started:
        return b"HTTP/1.1 100 Continue\r\n\r\n" if has_chunks else b""
    if cycle.response_complete or not cycle.scope.get(STREAMS_EVENTS):
        return b""
    return b"%x\r\n%s\r\n" % (len(_COMMENT), _COMMENT) if has_chunks else _COMMENT


def framed(app: Application, cycle: RequestResponseCycle) -> Application:
    """Wrap the application for the one request of this cycle.

    In HTTP/1.0, which has no chunks, a response without a length ends with the connection. If a request
    announced its body (`Expect: 100-continue`) and the body was not asked for, the response closes the
    connection: the client may send the body all the same.
    """
    has_chunks = cycle.scope["http_version"] == "1.1"
    if has_chunks and not cycle.waiting_for_100_continue:
        return app

    async def serve(scope: Any, receive: Receive, send: Send) -> None:
        until_close = False

        async def send_framed(event: Event) -> None:
            nonlocal until_close
            if event["type"] == "http.response.start":
                if cycle.waiting_for_100_continue:
                    cycle.keep_alive = False
                names = {name.lower() for name, _ in event.get("headers", ())}
                until_close = not has_chunks and b"content-length" not in names
                if until_close:
                    cycle.chunked_encoding = False
            elif until_close:
                cycle.expected_content_length = len(event.get("body", b""))
            await send(event)

        await app(scope, receive, send_framed)

    return serve
