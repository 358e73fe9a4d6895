"""One request over gRPC as one of the application that serves HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import grpc.aio

from dynamo_redis.frontend.completions import TIMEOUT_S
from dynamo_redis.frontend.http.errors import ApiError
from dynamo_redis.frontend.http.responses import Event
from dynamo_redis.frontend.kserve.apis import STREAM_INFER
from dynamo_redis.frontend.kserve.responses import messages_of
from dynamo_redis.frontend.kserve.status import Refusal, refusal_of

RECEIVE_S: Final = 60.0
"""Longest time from the opening of a call to the end of its message."""

Call = grpc.aio.ServicerContext[Any, Any]


class AppRequest:
    """One request, between its call and the application: receives it once, and writes its response."""

    def __init__(
        self,
        path: str,
        content: bytes | None,
        call: Call,
        write: Callable[[bytes], Awaitable[bool]],
    ) -> None:
        """`content` is the request; None: it is read from the call once the application asks for it, so that
        nothing is received of a request without a key. `write` writes a message of the response, and returns
        False if the client has left."""
        self.scope = {
            "type": "grpc",
            "method": "POST",
            "path": path,
            "headers": _headers(call),
            TIMEOUT_S: time_left_s(call),
        }
        self.gone = asyncio.Event()
        """Set once the client has left."""
        self._content = content
        self._call: Call | None = call if content is None else None
        self._write = write
        self._status: int | None = None
        self._headers: Sequence[tuple[bytes, bytes]] = ()
        self._error: bytes | None = None
        self._is_framed = path == STREAM_INFER.path

    async def receive(self) -> Event:
        """Return the request, then wait until the client has left."""
        if self._call is not None:
            call, self._call = self._call, None
            self._content = await read_message(call)
        if self._content is not None:
            content, self._content = self._content, None
            return {"type": "http.request", "body": content, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, event: Event) -> None:
        """Write the messages in a part of the response, or keep its error."""
        if event["type"] == "http.response.start":
            self._status, self._headers = event["status"], event["headers"]
            return
        body: bytes = event["body"]
        if self._status != 200:
            self._error = b"%d\n%b" % (self._status or 500, body)
        elif body and not self._is_framed:
            await self._write(body)
        elif body:
            await self._write_all(body)

    async def _write_all(self, frames: bytes) -> None:
        messages = messages_of(frames)
        for message in messages:
            if self.gone.is_set():
                return
            if not message:  # an error is behind it
                self._error = next(messages)
                return
            if not await self._write(message):
                self.gone.set()

    def refusal(self) -> Refusal | None:
        """Return the error that the request ended in, with the metadata that go with it."""
        if self._status is None and self._error is None:
            self._error = b"500\ninternal\nInternal error: there is no answer."
        if self._error is None:
            return None
        metadata = tuple(
            (str(name, "ascii"), str(value, "latin-1"))
            for name, value in self._headers
            if name in (b"x-request-id", b"retry-after")
        )
        return refusal_of(self._error, metadata)


def _headers(call: Call) -> list[tuple[bytes, bytes]]:
    """Return the metadata of a call as the headers of a request. Names and texts in them are ASCII."""
    return [
        (name.encode(), value if isinstance(value, bytes) else value.encode())
        for name, value in call.invocation_metadata() or ()
    ]


async def read_message(call: Call, limit_s: float = RECEIVE_S) -> bytes:
    """Return the message of a call with one; nothing if the client has sent none. Raises ApiError if it does
    not come in time."""
    try:
        async with asyncio.timeout(limit_s):
            content = await call.read()
    except TimeoutError:
        raise ApiError(408, f"The request was not sent within {limit_s:g} s.") from None
    return b"" if content is grpc.aio.EOF else content


def time_left_s(call: Call) -> float | None:
    """Return the time to the deadline of a call; None if it has none."""
    return call.time_remaining()
