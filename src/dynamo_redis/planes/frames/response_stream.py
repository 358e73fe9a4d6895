"""A request as its caller holds it: the response stream of the tcp plane.

A stream is *parked* until its pool has a connection, then *started* on it. It ends once, by the first of:

- a frame of the server, its end or its error (`on_last`, `on_frame`);
- this side, which tells the server by CANCEL: the reader (`aclose`), the context (stop, kill), the deadline,
  or `fail`;
- the loss of its connection, or of the hope for one (`end_without_cancel`).

Each end runs `_release` exactly once. It leaves nothing behind: no entry in a table, no timer, no
subscription, no task. The states are those of `wire/session.py`.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterable, Callable
from contextlib import suppress
from contextvars import copy_context
from typing import Any, Final, Protocol, Self

from dynamo_redis.errors import (
    CannotConnect,
    ConnectionLost,
    DeadlineExceeded,
    Overloaded,
    PayloadBudgetExceeded,
    PlaneError,
    ProtocolViolation,
    RequestCancelled,
    plane_error,
)
from dynamo_redis.planes.context import Context, Strength
from dynamo_redis.planes.frames.connection import Connection
from dynamo_redis.planes.frames.flow import Mailbox, Sender, check_size
from dynamo_redis.wire import frame
from dynamo_redis.wire.codec import MAX_INLINE_BYTES
from dynamo_redis.wire.decoder import Unusable
from dynamo_redis.wire.frame import Packed
from dynamo_redis.wire.session import ClientStream

LONGEST_RETRY_S: Final = 3600.0
"""The longest wait that a worker's `retry_after_ms` can ask for; a longer one is cut to it."""

_UNOPENED, _WAITING, _CLOSED = ClientStream.UNOPENED, ClientStream.WAITING, ClientStream.CLOSED


class StreamHolder(Protocol):
    """The object that lists a stream: its pool while it is parked, its connection once it is started."""

    def remove(self, stream: FrameResponseStream) -> None:
        """Forget the stream."""
        ...


class CallerConnection(Connection):
    """A connection that response streams can be started on."""

    __slots__ = ()

    @abstractmethod
    def remove(self, stream: FrameResponseStream) -> None:
        """Forget a stream that has ended."""


class FrameResponseStream(Mailbox):
    """Implements `ResponseStream`."""

    __slots__ = (
        "_context",
        "_deadline_timer",
        "_encoding",
        "_headers",
        "_holder",
        "_lost_once",
        "_messages",
        "_payload",
        "_pump",
        "_route",
        "_sender",
        "_variables",
        "_was_abandoned",
        "ends_at_bytes",
        "payload_bytes",
        "state",
        "subject",
        "waits_from_sweep",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        window_count: int,
        max_message_bytes: int,
        subject: str,
        request: Any,
        context: Context | None,
        messages: AsyncIterable[Any] | None,
    ) -> None:
        """Pack the request and its headers. Raises TypeError (not msgpack), PayloadTooLarge.

        Args:
            loop: the event loop of the stream's connection.
            window_count: items that the worker may send before they are read.
            max_message_bytes: the largest payload.
            subject: the server's name of the endpoint.
            request: any msgpack value, or a `Packed`, which is sent as it is.
            context: the request's context, or None. `attach` takes up its deadline and cancellation.
            messages: the messages that follow in a request stream, or None.
        """
        Mailbox.__init__(self, loop, window_count)
        is_packed = type(request) is Packed
        self._payload = payload = request.payload if is_packed else frame.payload_of(request)
        self.payload_bytes = size_bytes = len(payload)
        if size_bytes > MAX_INLINE_BYTES:
            check_size(size_bytes, max_message_bytes)
            self._encoding = request.encoding if is_packed else frame.encoding_of(payload, request)
        self._context = context
        self._messages = messages
        self.subject = subject
        if messages is None and not is_packed and context is None:
            self._headers = frame.NO_HEADERS
            self._route = frame.plain_route(subject)
        else:
            # Packed now, not when a connection is there: an error reaches the caller, and a later change of
            # the context can stop neither this request nor those behind it.
            self._headers = request.headers if is_packed else _encode_headers(context)
            self._route = self._encode_route(self._headers)
            if messages is not None:
                self._variables = copy_context()
        self._holder: StreamHolder | None = None
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._pump: asyncio.Task[None] | None = None
        self._sender: Sender | None = None
        self._lost_once = False
        self._was_abandoned = False
        self.state: ClientStream = _UNOPENED
        self.waits_from_sweep = 0
        self.ends_at_bytes = 0
        """The connection's `written_bytes` at the end of the request."""

    def __repr__(self) -> str:
        return f"<FrameResponseStream {self.stream_id} of {self.subject}: {self.state.name.lower()}>"

    @property
    def sent(self) -> bool:
        """See `ResponseStream.sent`."""
        return self.stream_id > 0

    @property
    def packed(self) -> Packed:
        """See `ResponseStream.packed`."""
        is_large = self.payload_bytes > MAX_INLINE_BYTES
        return Packed(self._payload, self._encoding if is_large else frame.Encoding.MSGPACK, self._headers)

    def forget_request(self) -> None:
        """See `ResponseStream.forget_request`."""
        self._payload = b""

    # ------------------------------------------------------------------- sending

    def attach(self, context: Context) -> bool:
        """Apply the context's deadline and cancellation. Return False if they have ended the stream
        already."""
        if context.deadline is not None:
            remaining_s = context.remaining_s() or 0.0
            if remaining_s <= 0:
                self._deadline_passed()
                return False
            self._deadline_timer = self._loop.call_later(remaining_s, self._deadline_passed)
        context.subscribe(self)
        return self.state is not _CLOSED

    def park(self, pool: StreamHolder) -> None:
        """Note the pool in which the stream waits for a connection."""
        self._holder = pool

    def start(self, connection: CallerConnection, stream_id: int) -> None:
        """Send the request, and the messages that follow it."""
        payload = self._payload
        route = self._route
        if self._deadline_timer is not None:
            assert self._context is not None
            remaining_ms = (self._context.remaining_s() or 0.0) * 1000
            deadline_ms = round(min(max(0.0, remaining_ms), frame.MAX_DEADLINE_MS))
            route = self._encode_route(frame.add_deadline(self._headers, deadline_ms))
        self._holder = self._connection = connection
        self.stream_id = stream_id
        self.state = _WAITING
        if len(payload) <= MAX_INLINE_BYTES:
            connection.send(frame.encode_open(stream_id, route, payload))
        else:
            header = frame.encode_open_raw(stream_id, route, len(payload), self._encoding)
            connection.send_raw(header, payload)
        if self._messages is not None:
            self._sender = Sender(connection, stream_id)
            self._pump = self._loop.create_task(
                self._send_messages(self._messages, self._sender), context=self._variables
            )
        if self._was_abandoned:
            self.abandon()

    def rewind(self) -> bool:
        """Return to the state before `start`, as the connection was lost. Return False if the request cannot
        be sent again, or has been sent again once already."""
        is_stopped = self._context is not None and self._context.is_stopped()
        if self.state is not _WAITING or self._messages is not None or self._lost_once or is_stopped:
            return False
        self.state = _UNOPENED
        self._connection = self._holder = None
        self._lost_once = True
        return True

    def _encode_route(self, headers: bytes) -> bytes:
        flags = 0 if self._messages is None else frame.FLAG_REQUEST_STREAM
        return frame.encode_route(self.subject, flags, headers)

    async def _send_messages(self, messages: AsyncIterable[Any], sender: Sender) -> None:
        """Send the messages of a request stream, under flow control, and their end."""
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

    # ------------------------------------------------------------------- receiving

    def on_last(self, item: Any) -> None:
        """Handle LAST, which is the only frame of most answers. Raises ProtocolViolation."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(item)
        else:
            self._enqueue((item,))
        self._ended = True  # as `_end`, without its calls
        self._release()

    def on_frame(self, received: list[Any]) -> None:
        """Handle a frame that the state table allows. Raises ProtocolViolation."""
        kind = received[0]
        if kind == frame.BATCH:
            self.deliver_batch(received[2])
        elif kind == frame.LAST_BATCH:
            self.deliver_batch(received[2])
            self._end()
        elif kind == frame.DATA:
            self.deliver(received[2])
        elif kind == frame.LAST:
            self.on_last(received[2])
        elif kind == frame.END:
            self._end()
        elif kind == frame.ERROR:
            self._end(_error_of(received))
        elif kind in (frame.DATA_RAW, frame.LAST_RAW):
            self._on_raw(*received)
        elif kind == frame.CREDIT and self._sender is not None:
            self._sender.grant(received[2])

    def _on_raw(self, kind: int, _: int, size_bytes: int, item: Any) -> None:
        """Deliver an item that came as a raw payload, or end the stream if it is unusable."""
        error = item.error if type(item) is Unusable else None
        if isinstance(error, Overloaded):  # of the decoder here: this process has no room, not the worker
            error = PayloadBudgetExceeded(str(error))
        if error is None:
            self.deliver_raw(item, size_bytes)
        if kind == frame.LAST_RAW:
            self._end(error)
        elif error is not None:
            self.fail(error)

    # ------------------------------------------------------------------- ends

    def call_soon(self, callback: Callable[[], None]) -> None:
        """See `ResponseStream.call_soon`."""
        with suppress(RuntimeError):  # the event loop is closed, and everything with it
            self._loop.call_soon_threadsafe(callback)

    def fail(self, error: Exception) -> None:
        """See `ResponseStream.fail`."""
        if self.state is not _CLOSED:
            self._kill()
            self.finish(error)

    def abandon(self) -> None:
        """See `ResponseStream.abandon`."""
        if self._connection is None:
            self._was_abandoned = True
        else:
            self.fail(ConnectionLost("the answer was not wanted"))

    def end_without_cancel(self, error: Exception) -> None:
        """End the stream with `error`: its connection is lost, or none could be had. No CANCEL is sent."""
        if self.state is not _CLOSED:
            if self._lost_once and isinstance(
                error, CannotConnect
            ):  # it was sent: the worker may have handled it
                error = ConnectionLost(f"the connection broke, and there is no other: {error}")
            self._end(error)

    async def aclose(self) -> None:
        """See `ResponseStream`: kill the request at the worker, unless the stream has ended."""
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

    def on_cancelled(self, strength: Strength) -> None:
        """End the stream: its context was stopped or killed."""
        if strength == "kill":
            self.discard()
            self.fail(RequestCancelled("the request was killed"))
        elif self._connection is not None:
            self._connection.send(frame.encode_cancel(self.stream_id, frame.Strength.STOP))
            self.discard()  # a stop alone would let the handler send more items
            self._kill()
            self.finish()
        else:
            self.fail(RequestCancelled("the request was stopped before it was sent"))

    def _deadline_passed(self) -> None:
        self.fail(DeadlineExceeded("the request's deadline passed"))

    def _kill(self) -> None:
        if self._connection is not None:
            self._connection.send(frame.encode_cancel(self.stream_id, frame.Strength.KILL))
        self._release()

    def _end(self, error: Exception | None = None) -> None:
        self._release()
        self.finish(error)

    def _release(self) -> None:
        """Close the stream; drop its timer, subscription, task and table entry. Called once."""
        self.state = _CLOSED
        if self._context is not None:
            self._context.unsubscribe(self)
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
            self._deadline_timer = None
        if self._sender is not None:
            self._sender.drop()
        if self._pump is not None:
            self._pump.cancel()
            self._pump = None
        holder, self._holder = self._holder, None
        if holder is not None:
            holder.remove(self)


def _encode_headers(context: Context | None) -> bytes:
    """Pack the context's headers, without its deadline. Raises TypeError (not msgpack), PayloadTooLarge."""
    if context is None:
        return frame.NO_HEADERS
    headers: dict[str, Any] = {"id": context.id()}
    if context.traceparent is not None:
        headers["traceparent"] = context.traceparent
    if context.given_metadata:
        headers["meta"] = context.given_metadata
    return frame.encode_headers(headers)


def _error_of(received: list[Any]) -> PlaneError:
    """Make the error that an ERROR frame carries. Raises ProtocolViolation."""
    _, _, code, message, details = received
    if type(code) is not str or type(message) is not str or not isinstance(details, dict | None):
        raise ProtocolViolation("a malformed ERROR")
    error = plane_error(code, message)
    if isinstance(error, Overloaded):
        retry_after_ms = (details or {}).get("retry_after_ms")
        if type(retry_after_ms) is int and retry_after_ms >= 0:
            error.retry_after_s = min(retry_after_ms / 1000, LONGEST_RETRY_S)
    return error
