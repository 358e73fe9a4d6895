"""A request as its caller holds it: the response stream of the tcp plane.

A stream is *parked* until its pool has a connection, then *started* on it. It ends once: by the server's
end or error, by its reader (`aclose`, a cancelled task), by its context (stop, kill), by its deadline, by
`fail`, or with its connection. Whatever ends it, `_release` runs exactly once and leaves nothing behind: no
entry in a table, no timer, no subscription, no task.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable
from typing import Any, Protocol, Self

from dynamo_redis.errors import (
    DeadlineExceeded,
    Overloaded,
    PlaneError,
    ProtocolViolation,
    RequestCancelled,
    plane_error,
)
from dynamo_redis.planes.context import Context, Strength
from dynamo_redis.planes.tcp_connection import Connection
from dynamo_redis.planes.tcp_flow import Mailbox, Sender
from dynamo_redis.wire import frame
from dynamo_redis.wire.codec import MAX_INLINE_BYTES
from dynamo_redis.wire.decoder import Unusable
from dynamo_redis.wire.session import ClientStream

_UNOPENED, _WAITING, _CLOSED = ClientStream.UNOPENED, ClientStream.WAITING, ClientStream.CLOSED


class Home(Protocol):
    """Where a stream lives: its pool while it is parked, its connection once it is started."""

    def remove(self, stream: TcpResponseStream) -> None:
        """Forget the stream."""
        ...


class TcpResponseStream(Mailbox):
    """Implements `ResponseStream`."""

    __slots__ = (
        "_context",
        "_deadline_timer",
        "_encoding",
        "_home",
        "_messages",
        "_payload",
        "_pump",
        "_route",
        "_sender",
        "opened_at_sweep",
        "state",
        "subject",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        window_count: int,
        subject: str,
        request: Any,
        context: Context,
        messages: AsyncIterable[Any] | None,
    ) -> None:
        super().__init__(loop, window_count)
        self._payload, self._encoding = frame.payload_of(request)
        self._context = context
        self._messages = messages
        self.subject = subject
        self._route = self._encode_route()
        self._home: Home | None = None
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._pump: asyncio.Task[None] | None = None
        self._sender: Sender | None = None
        self.state: ClientStream = _UNOPENED
        self.opened_at_sweep = 0

    def __repr__(self) -> str:
        return f"<TcpResponseStream {self._stream_id} of {self.subject}: {self.state.name.lower()}>"

    @property
    def stream_id(self) -> int:
        """The id on the connection; 0 while parked."""
        return self._stream_id

    @property
    def sent(self) -> bool:
        """See `ResponseStream.sent`."""
        return self._stream_id > 0

    @property
    def payload_bytes(self) -> int:
        """The size of the packed request."""
        return len(self._payload)

    # ------------------------------------------------------------------- its way to the server

    def attach(self) -> bool:
        """Take up the context's deadline and cancellation. False if they have ended the stream already."""
        context = self._context
        if context.deadline is not None:
            remaining_s = context.remaining_s() or 0.0
            if remaining_s <= 0:
                self._deadline_passed()
                return False
            self._deadline_timer = self._loop.call_later(remaining_s, self._deadline_passed)
        if context.is_stopped():
            self.fail(RequestCancelled("the request was cancelled before it was sent"))
            return False
        context.subscribe(self._on_context)
        return True

    def park(self, home: Home) -> None:
        """Wait for a connection."""
        self._home = home

    def start(self, connection: Connection, home: Home, stream_id: int) -> None:
        """Send the request."""
        payload, self._payload = self._payload, b""
        route = self._route if self._context.deadline is None else self._encode_route()
        self._home = home
        self._connection = connection
        self._stream_id = stream_id
        self.state = _WAITING
        if len(payload) <= MAX_INLINE_BYTES:
            connection.send(frame.encode_open(stream_id, route, payload))
        else:
            header = frame.encode_open_raw(stream_id, route, len(payload), self._encoding)
            connection.send_raw(header, payload)
        if self._messages is not None:
            self._sender = Sender(connection, stream_id)
            self._pump = self._loop.create_task(self._send_messages(self._messages, self._sender))

    def _encode_route(self) -> bytes:
        flags = 0 if self._messages is None else frame.FLAG_REQUEST_STREAM
        if self._context.travels_bare:
            return frame.plain_route(self.subject, flags)
        return frame.encode_route(self.subject, flags, self._headers())

    def _headers(self) -> dict[str, Any]:
        context = self._context
        headers: dict[str, Any] = {}
        if context.given_id is not None:
            headers["id"] = context.given_id
        if context.deadline is not None:
            headers["deadline_ms"] = max(0, round((context.remaining_s() or 0.0) * 1000))
        if context.traceparent is not None:
            headers["traceparent"] = context.traceparent
        if context.given_metadata:
            headers["meta"] = context.given_metadata
        return headers

    async def _send_messages(self, messages: AsyncIterable[Any], sender: Sender) -> None:
        try:
            async for message in messages:
                if not sender.ready:
                    await sender.wait_ready()
                if not sender.open:
                    return
                sender.push(message)
            sender.end()
        except Exception as exc:  # noqa: BLE001 - whatever the caller's iterator raises, its reader gets
            self._pump = None
            self.fail(exc)

    # ------------------------------------------------------------------- what the connection says

    def on_frame(self, received: list[Any]) -> None:
        """Take a frame that the state table allows. Raises ProtocolViolation."""
        kind = received[0]
        if kind == frame.LAST:
            self.deliver(received[2])
            self._end()
        elif kind == frame.DATA:
            self.deliver(received[2])
        elif kind == frame.BATCH:
            self.deliver_batch(received[2])
        elif kind == frame.LAST_BATCH:
            self.deliver_batch(received[2])
            self._end()
        elif kind == frame.END:
            self._end()
        elif kind == frame.ERROR:
            self._end(_reported(received))
        elif kind in (frame.DATA_RAW, frame.LAST_RAW):
            self._on_raw(*received)
        elif kind == frame.CREDIT and self._sender is not None:
            self._sender.grant(received[2])

    def _on_raw(self, kind: int, _: int, size_bytes: int, item: Any) -> None:
        error = item.error if type(item) is Unusable else None
        if error is None:
            self.deliver_raw(item, size_bytes)
        if kind == frame.LAST_RAW:
            self._end(error)
        elif error is not None:
            self.fail(error)

    # ------------------------------------------------------------------- its end

    def fail(self, error: Exception) -> None:
        if self.state is not _CLOSED:
            self._kill()
            self.finish(error)

    def lose(self, error: Exception) -> None:
        """The connection is gone, and the request with it."""
        if self.state is not _CLOSED:
            self._end(error)

    async def aclose(self) -> None:
        self.discard()
        if self.state is not _CLOSED:
            self._kill()
        self._ended = True
        self._error = None
        self._wake()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def _on_reader_cancelled(self) -> None:
        self.fail(RequestCancelled("the reader was cancelled"))

    def _on_context(self, strength: Strength) -> None:
        if strength == "kill":
            self.discard()
            self.fail(RequestCancelled("the request was killed"))
        elif self._connection is not None:
            self._connection.send(frame.encode_cancel(self._stream_id, frame.Strength.STOP))
        else:
            self.fail(RequestCancelled("the request was stopped before it was sent"))

    def _deadline_passed(self) -> None:
        self.fail(DeadlineExceeded("the request's deadline passed"))

    def _kill(self) -> None:
        if self._connection is not None:
            self._connection.send(frame.encode_cancel(self._stream_id, frame.Strength.KILL))
        self._release()

    def _end(self, error: Exception | None = None) -> None:
        self._release()
        self.finish(error)

    def _release(self) -> None:
        self.state = _CLOSED
        self._payload = b""
        self._context.unsubscribe(self._on_context)
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
            self._deadline_timer = None
        if self._sender is not None:
            self._sender.drop()
        if self._pump is not None:
            self._pump.cancel()
            self._pump = None
        home, self._home = self._home, None
        if home is not None:
            home.remove(self)


def _reported(received: list[Any]) -> PlaneError:
    """The error that an ERROR frame carries."""
    _, _, code, message, details = received
    if type(code) is not str or type(message) is not str or not isinstance(details, dict | None):
        raise ProtocolViolation("a malformed ERROR")
    if code == Overloaded.code:
        retry_after_s = (details or {}).get("retry_after_ms")
        return Overloaded(message, retry_after_s / 1000 if isinstance(retry_after_s, int) else None)
    return plane_error(code, message)
