"""Reading a request's body within a limit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from dynamo_redis.frontend.http.errors import ApiError, bodies_full, body_too_large
from dynamo_redis.frontend.http.responses import Receive

_MOST_DISCARDED = 256 << 20
"""Most bytes that are read and dropped for a client that reads no response before it has sent everything."""


UNCOUNTED_BYTES = 32 << 10
"""Bytes of each body that do not count in the budget, so that small requests pass large ones."""


SMALL_PIECE_BYTES = 16 << 10
"""Smaller pieces of a body are joined: a body in single bytes would take fifty times its size."""


class BodyBudget:
    """The bytes of all bodies that are held at any one time: until they have become requests, and of those
    with images until they are answered."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held_bytes = 0

    def hold(self) -> HeldBody:
        """Begin to hold a body."""
        return HeldBody(self)

    def add(self, size_bytes: int) -> None:
        """Change the number of held bytes. Raises ApiError 503 if the limit is exceeded."""
        if size_bytes > 0 and self._held_bytes + size_bytes > self._limit_bytes:
            raise bodies_full(self._limit_bytes)
        self._held_bytes += size_bytes


class HeldBody:
    """One body's share of the budget, which is given back at the end of the `with` block."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._counted_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._budget.add(-self._counted_bytes)

    def grow_to(self, size_bytes: int) -> None:
        """Set the body's size. Raises ApiError 503 if the budget is exceeded."""
        counted = max(0, size_bytes - UNCOUNTED_BYTES)
        self._budget.add(counted - self._counted_bytes)
        self._counted_bytes = counted


class ClientGone(Exception):
    """The client hung up before its request was whole."""


async def read_limited(
    scope: Mapping[str, Any],
    receive: Receive,
    limit_bytes: int,
    held: HeldBody | None = None,
    *,
    setting: str | None = "DYN_HTTP_BODY_LIMIT",
) -> list[bytearray]:
    """Read the body. Return it in pieces: to join a large one takes long.

    Raises ApiError 413 for a body over the limit, 503 for one over the budget, and ClientGone. A refused body
    is not held. `setting` is that of the limit; None: the limit is the path's own.

    If the announced length is over the limit, the body is refused before it is sent if the client asked for
    that (`Expect: 100-continue`), or if it is too long to be read to its end. Else it is read and dropped:
    most clients read no response before they have sent everything.
    """
    headers = dict(scope["headers"])
    if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity"):
        raise ApiError(
            415,
            "The request body has a Content-Encoding: send it without one.",
            code="unsupported_content_encoding",
        )
    length = headers.get(b"content-length")
    announced = None if length is None else int(length)  # the HTTP parser has checked that it is a number
    if announced is not None and announced > limit_bytes:
        if b"expect" not in headers and announced <= _MOST_DISCARDED:
            await discard(receive, 0)
        raise body_too_large(limit_bytes, setting)
    pieces: list[bytearray] = []
    size = 0
    async for piece in _pieces(receive):
        size += len(piece)
        try:
            if size > limit_bytes:
                raise body_too_large(limit_bytes, setting)
            if held is not None:
                held.grow_to(size)
        except ApiError:
            pieces.clear()
            if held is not None:
                held.grow_to(0)
            await discard(receive, size)
            raise
        if pieces and len(pieces[-1]) < SMALL_PIECE_BYTES:
            pieces[-1] += piece
        else:
            pieces.append(bytearray(piece))
    return pieces


async def _pieces(receive: Receive) -> Any:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return


async def discard(receive: Receive, size: int = 0) -> None:
    """Read the rest of a body, after `size` bytes, and drop it, up to a bound. Raises ClientGone."""
    async for piece in _pieces(receive):
        size += len(piece)
        if size > _MOST_DISCARDED:
            return
