"""One caller's connection at the server, and the requests that it brings.

Each request is a task that runs the handler and sends what it yields. Whatever ends it — the handler, a
kill, its deadline, the caller's disappearance, the end of a drain — `_finish` runs exactly once and leaves
nothing behind. An exception of a handler becomes an ERROR of its stream; it never reaches the connection.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from types import CoroutineType
from typing import Any, Final, Protocol

from dynamo_redis.errors import (
    DeadlineExceeded,
    Draining,
    HandlerFailed,
    InvalidRequest,
    Overloaded,
    PlaneError,
    ProtocolViolation,
)
from dynamo_redis.planes.base import Handler
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.tcp_connection import Connection
from dynamo_redis.planes.tcp_flow import RequestMessages, Sender
from dynamo_redis.wire import frame
from dynamo_redis.wire.decoder import ReadBuffers, Unusable
from dynamo_redis.wire.handshake import ServerHandshake, refusal
from dynamo_redis.wire.session import KILL, OPEN_STREAMING, SERVER_STEPS, ServerStream

_ACCEPT_AFTER_S: Final = 0.5
_EAGER: Final = sys.version_info >= (3, 12)
_OPEN_LENGTH: Final = {frame.OPEN: 6, frame.OPEN_RAW: 7}
_ENDLESS_MS: Final = 2**53
_LOG_INTERVAL_S: Final = 1.0

_log = logging.getLogger(__name__)


class Endpoint:
    """A served subject. `active_count` are its requests that are admitted and not finished."""

    __slots__ = ("_logged_at", "active_count", "draining", "handler", "idle", "request_stream", "subject")

    def __init__(self, subject: str, handler: Handler, *, request_stream: bool) -> None:
        self.subject = subject
        self.handler = handler
        self.request_stream = request_stream
        self.active_count = 0
        self.draining = False
        self.idle: asyncio.Future[None] | None = None
        self._logged_at = -_LOG_INTERVAL_S

    def when_idle(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
        """A future that is done when the last request has finished."""
        if self.idle is None:
            self.idle = loop.create_future()
        return self.idle

    def release(self) -> None:
        """A request has finished."""
        self.active_count -= 1
        if not self.active_count and self.idle is not None:
            self.idle.set_result(None)
            self.idle = None

    def log_failure(self, exc: Exception) -> None:
        """Log what a handler raised, at most once in `_LOG_INTERVAL_S`."""
        now = time.monotonic()
        if now - self._logged_at >= _LOG_INTERVAL_S:
            self._logged_at = now
            _log.error("the handler of %s raised", self.subject, exc_info=exc)


class Service(Protocol):
    """What a connection needs of its server."""

    def endpoint(self, subject: str) -> Endpoint:
        """Raises EndpointNotFound or Draining."""
        ...

    def admit(self, request: Request) -> None:
        """Start the request, or queue it. Raises Overloaded."""
        ...

    def dequeue(self, request: Request) -> None:
        """The request has ended before its handler started."""
        ...

    def finished(self, request: Request) -> None:
        """The request's handler is over."""
        ...

    def on_made(self, connection: ServerConnection) -> None:
        """A connection has come, and has said nothing yet."""
        ...

    def on_shaken(self, connection: ServerConnection) -> None:
        """The caller has proved itself."""
        ...

    def on_closed(self, connection: ServerConnection) -> None:
        """The connection has ended."""
        ...


class ServerConnection(Connection):
    """A caller's connection."""

    def __init__(
        self,
        service: Service,
        handshake: ServerHandshake,
        loop: asyncio.AbstractEventLoop,
        buffers: ReadBuffers,
        *,
        max_message_bytes: int,
        keepalive_interval_s: float,
        handshake_timeout_s: float,
    ) -> None:
        super().__init__(
            loop, buffers, max_message_bytes=max_message_bytes, keepalive_interval_s=keepalive_interval_s
        )
        self._service = service
        self._handshake: ServerHandshake | None = handshake
        self._handshake_timeout_s = handshake_timeout_s
        self._handshake_timer: asyncio.TimerHandle | None = None
        self._accept_sweeps = max(1, int(_ACCEPT_AFTER_S / self._sweep_interval_s))
        self._last_stream_id = 0
        self.window_count = handshake.server.window_count
        self.streams: dict[int, Request] = {}

    # ------------------------------------------------------------------- the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._handshake_timer = self._loop.call_later(self._handshake_timeout_s, self._handshake_late)
        self._service.on_made(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.transport.pause_reading()  # a caller that reads no answers gets no more requests in

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.closed:
            self.transport.resume_reading()

    def refuse(self, error: PlaneError) -> None:
        """Close instead of shaking hands."""
        if not self.closed:
            self.transport.write(refusal(error))
            self.close()

    def go_away(self) -> None:
        """Tell the caller to send new requests elsewhere."""
        if self._ready and not self.closed:
            self.send(frame.encode_goaway(Draining.code, "the worker is shutting down"))

    def _on_handshake(self, data: memoryview) -> memoryview:
        handshake = self._handshake
        assert handshake is not None
        answer, rest = handshake.feed(data)
        if answer:
            self.transport.write(answer)
        if handshake.done:
            assert handshake.client is not None
            self.peer_window_count = handshake.client.window_count
            self._ready = True
            self._handshake = None
            self._cancel_handshake_timer()
            self._service.on_shaken(self)
        return rest

    def _on_handshake_failed(self, error: PlaneError) -> None:
        handshake = self._handshake
        if handshake is not None and handshake.client is not None:
            self.send(frame.encode_goaway(error.code, str(error)))
            self.close()
        else:
            self.refuse(error)

    def _handshake_late(self) -> None:
        self._handshake_timer = None
        self.refuse(ProtocolViolation("the handshake took too long"))

    def _cancel_handshake_timer(self) -> None:
        if self._handshake_timer is not None:
            self._handshake_timer.cancel()
            self._handshake_timer = None

    def _on_sweep(self) -> None:
        due = self.sweeps - self._accept_sweeps
        for request in self.streams.values():
            if not request.has_sent and request.opened_at_sweep < due:
                request.accept()

    def _on_closed(self, error: PlaneError) -> None:
        self._cancel_handshake_timer()
        for request in tuple(self.streams.values()):
            request.kill()
        self._service.on_closed(self)

    # ------------------------------------------------------------------- frames

    def _on_frames(self, frames: list[list[Any]]) -> None:
        for received in frames:
            if self.closed:
                return
            if received[0] == frame.OPEN or received[0] == frame.OPEN_RAW:
                self._on_open(received)
            else:
                self._on_stream_frame(received)

    def _on_open(self, received: list[Any]) -> None:
        if len(received) != _OPEN_LENGTH[received[0]]:
            raise ProtocolViolation("a malformed OPEN")
        _, stream_id, subject, flags, headers, *_, message = received
        if type(stream_id) is not int or not self._last_stream_id < stream_id <= frame.MAX_STREAM_ID:
            raise ProtocolViolation("stream ids go up")
        if type(subject) is not str or type(flags) is not int or not isinstance(headers, dict | None):
            raise ProtocolViolation("a malformed OPEN")
        self._last_stream_id = stream_id
        streaming = bool(flags & frame.FLAG_REQUEST_STREAM)
        state = SERVER_STEPS[ServerStream.UNOPENED][OPEN_STREAMING if streaming else frame.OPEN]
        try:
            endpoint = self._service.endpoint(subject)
            if type(message) is Unusable:
                raise message.error
            if streaming and not endpoint.request_stream:
                raise InvalidRequest("the endpoint takes one message, not a stream of them")
            context = _context(headers)
            request = Request(self, self._service, endpoint, stream_id, state, context, message)
            self.streams[stream_id] = request
            self._service.admit(request)
            request.watch_deadline(self._loop)
        except PlaneError as exc:
            self.streams.pop(stream_id, None)
            self.send(_error_frame(stream_id, exc))
            return
        if not self.sweeping:
            self.start_sweeping()

    def _on_stream_frame(self, received: list[Any]) -> None:
        kind, stream_id = received[0], received[1]
        request = self.streams.get(stream_id)
        if kind == frame.CANCEL and received[2] == frame.Strength.KILL:
            kind = KILL
        if request is not None:
            state = request.state
        elif type(stream_id) is int and 0 < stream_id <= self._last_stream_id:
            state = ServerStream.CLOSED
        else:
            state = ServerStream.UNOPENED
        step = SERVER_STEPS[state].get(kind)
        if step is None:
            self._on_other(received)
        elif request is not None:
            request.state = step
            request.on_frame(kind, received)

    def _on_other(self, received: list[Any]) -> None:
        kind, stream_id = received[0], received[1]
        if kind == frame.GOAWAY and stream_id == 0:
            self.close()
        elif not self._on_connection_frame(received):
            raise ProtocolViolation(f"a frame of type {kind!r} is not allowed here")


class Request(Sender):
    """One request, from admission to its end. `state` is the state table's."""

    __slots__ = (
        "_argument",
        "_deadline_timer",
        "_messages",
        "_service",
        "_task",
        "context",
        "endpoint",
        "opened_at_sweep",
        "state",
    )

    _connection: ServerConnection

    def __init__(
        self,
        connection: ServerConnection,
        service: Service,
        endpoint: Endpoint,
        stream_id: int,
        state: ServerStream,
        context: Context,
        message: Any,
    ) -> None:
        super().__init__(connection, stream_id)
        self._service = service
        self._task: asyncio.Task[None] | None = None
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._messages: RequestMessages | None = None
        self._argument = message
        self.endpoint = endpoint
        self.context = context
        self.state = state
        self.opened_at_sweep = connection.sweeps
        if endpoint.request_stream:
            self._messages = self._argument = RequestMessages(
                connection, stream_id, message, connection.window_count
            )
            if state is ServerStream.RUNNING:
                self._messages.finish()

    def __repr__(self) -> str:
        return f"<Request {self._stream_id} of {self.endpoint.subject}: {self.state.name.lower()}>"

    @property
    def task(self) -> asyncio.Task[None] | None:
        """The task that runs the handler, once it has begun."""
        return self._task

    # ------------------------------------------------------------------- the handler

    def launch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the handler."""
        if _EAGER and loop.get_task_factory() is None:
            asyncio.Task(self._run(), loop=loop, eager_start=True)  # type: ignore[call-arg,unused-ignore]
        else:
            loop.create_task(self._run())

    async def _run(self) -> None:
        self._task = asyncio.current_task()
        try:
            if self.open:
                result: Any = self.endpoint.handler(self._argument, self.context)
                if type(result) is not CoroutineType and hasattr(result, "__anext__"):
                    await self._answer_stream(result)
                else:
                    self._answer(await result)
        except asyncio.CancelledError:
            if self.open:  # not by us: the handler awaited something that was cancelled, or the loop ends
                self.fail(HandlerFailed("the handler was cancelled"))
                raise
        except Exception as exc:  # noqa: BLE001 - whatever a handler raises, its caller gets
            self._on_raised(exc)
        finally:
            self._task = None
            self._service.finished(self)

    def _answer(self, item: Any) -> None:
        if self.open:
            self.end_with(item)
            self._close()

    async def _answer_stream(self, items: AsyncIterator[Any]) -> None:
        try:
            async for item in items:
                if self._credit <= 0 or self._connection.paused:
                    await self.wait_ready()
                if not self.open:
                    return
                self.push(item)
        finally:
            if isinstance(items, AsyncGenerator):
                await items.aclose()
        if self.open:
            self.end()
            self._close()

    def _on_raised(self, exc: Exception) -> None:
        if not self.open:
            _log.debug(
                "the handler of %s raised after its request had ended", self.endpoint.subject, exc_info=exc
            )
        elif isinstance(exc, PlaneError):
            self.fail(exc)
        else:
            self.endpoint.log_failure(exc)
            self.fail(HandlerFailed(_describe(exc)))

    # ------------------------------------------------------------------- what the caller says

    def on_frame(self, kind: int, received: list[Any]) -> None:
        """Take a frame that the state table allows. Raises ProtocolViolation."""
        if kind == frame.CREDIT:
            self.grant(received[2])
        elif kind == KILL:
            self.kill()
        elif kind == frame.CANCEL:
            if received[2] != frame.Strength.STOP:
                raise ProtocolViolation("a malformed CANCEL")
            _quietly(self.context.stop_generating)
        else:
            self._on_message(kind, received)

    def _on_message(self, kind: int, received: list[Any]) -> None:
        messages = self._messages
        assert messages is not None  # only a request-stream endpoint has a stream in state RECEIVING
        if kind in (frame.BATCH, frame.LAST_BATCH):
            messages.deliver_batch(received[2])
        elif kind in (frame.DATA, frame.LAST):
            messages.deliver(received[2])
        elif kind != frame.END:
            _, _, size_bytes, message = received
            if type(message) is Unusable:
                self.abort(message.error)
            else:
                messages.deliver_raw(message, size_bytes)
        if self.state is ServerStream.RUNNING:
            messages.finish()

    # ------------------------------------------------------------------- its end

    def watch_deadline(self, loop: asyncio.AbstractEventLoop) -> None:
        """End the request when its deadline passes."""
        remaining_s = self.context.remaining_s()
        if remaining_s is not None and self.open:
            self._deadline_timer = loop.call_later(max(0.0, remaining_s), self._deadline_passed)

    def _deadline_passed(self) -> None:
        self.abort(DeadlineExceeded("the request's deadline passed"))

    def accept(self) -> None:
        """Tell the caller that the request is in hand."""
        self.has_sent = True
        self._connection.send(frame.encode_accept(self._stream_id))

    def fail(self, error: PlaneError) -> None:
        """End with an error, after what was sent before it."""
        if self.open:
            self.flush_batch()
            self._connection.send(_error_frame(self._stream_id, error))
            self._close()

    def abort(self, error: PlaneError) -> None:
        """End with an error, and end the handler."""
        if self.open:
            self.fail(error)
            self._stop_handler()

    def kill(self) -> None:
        """End without a word: nobody listens."""
        if self.open:
            self._close()
            self._stop_handler()

    def _stop_handler(self) -> None:
        _quietly(self.context.kill)
        if self._task is not None:
            self._task.cancel()
        else:
            self._service.dequeue(self)  # if it was launched, it will see that it is closed

    def _close(self) -> None:
        self.drop()
        self.state = ServerStream.CLOSED
        self._connection.streams.pop(self._stream_id, None)
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
            self._deadline_timer = None
        if self._messages is not None:
            self._messages.kill()


def _context(headers: dict[str, Any] | None) -> Context:
    """The context that the headers describe. Raises InvalidRequest."""
    if headers is None:
        return Context()
    request_id, deadline_ms = headers.get("id"), headers.get("deadline_ms")
    traceparent, meta = headers.get("traceparent"), headers.get("meta")
    if not (
        isinstance(request_id, str | None)
        and isinstance(traceparent, str | None)
        and isinstance(meta, dict | None)
        and (deadline_ms is None or (type(deadline_ms) is int and 0 <= deadline_ms < _ENDLESS_MS))
    ):
        raise InvalidRequest("malformed request headers")
    deadline = None if deadline_ms is None else time.monotonic() + deadline_ms / 1000
    return Context(request_id, meta, deadline=deadline, traceparent=traceparent)


def _error_frame(stream_id: int, error: PlaneError) -> bytes:
    details = None
    if isinstance(error, Overloaded) and error.retry_after_s is not None:
        details = {"retry_after_ms": round(error.retry_after_s * 1000)}
    return frame.encode_error(stream_id, error.code, str(error), details)


def _describe(exc: Exception) -> str:
    try:
        return f"{type(exc).__name__}: {exc}"
    except Exception:  # noqa: BLE001 - an exception that cannot say what it is
        return type(exc).__name__


def _quietly(cancel: Callable[[], None]) -> None:
    """Run a context's callbacks: what they raise is the handler's affair, not the connection's."""
    try:
        cancel()
    except Exception:  # noqa: BLE001 - see above
        _log.exception("a cancellation callback raised")
