"""Reading a request's body within a limit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynamo_redis.frontend.exchange import Receive
from dynamo_redis.frontend.http_errors import ApiError, body_too_large, invalid

_MOST_DISCARDED = 256 << 20
"""Clients that do not look at the answer before they have sent everything are listened to for so long."""


class ClientGone(Exception):
    """The client hung up before its request was whole."""


async def read_limited(scope: Mapping[str, Any], receive: Receive, limit_bytes: int) -> bytes:
    """The body. Raises ApiError 413 for one over the limit, which is never held, and ClientGone.

    A body whose announced length is over the limit is refused before it is sent if the client asked
    (`Expect: 100-continue`); else it is read and dropped, since most clients see no answer before its end.
    """
    headers = dict(scope["headers"])
    _refuse_encoding(headers)
    announced = _content_length(headers)
    if announced is not None and announced > limit_bytes:
        if b"expect" not in headers:
            await _discard(receive, 0)
        raise body_too_large(limit_bytes)
    pieces: list[bytes] = []
    size = 0
    async for piece in _pieces(receive):
        size += len(piece)
        if size > limit_bytes:
            pieces.clear()
            await _discard(receive, size)
            raise body_too_large(limit_bytes)
        pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _refuse_encoding(headers: Mapping[bytes, bytes]) -> None:
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding not in (b"", b"identity"):
        raise ApiError(
            415,
            "The request body has a Content-Encoding: send it as it is.",
            code="unsupported_content_encoding",
        )


def _content_length(headers: Mapping[bytes, bytes]) -> int | None:
    value = headers.get(b"content-length")
    if value is None:
        return None
    if not value.isdigit():
        raise invalid("The Content-Length header is not a number.")
    return int(value)


async def _pieces(receive: Receive) -> Any:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return


async def _discard(receive: Receive, size: int) -> None:
    async for piece in _pieces(receive):
        size += len(piece)
        if size > _MOST_DISCARDED:
            return
