"""One request at the server: its handler, the caller's frames for it, and its end.

A request is a task that runs the handler and sends the items that it yields. It ends once, by the first of:

- its handler: the last item, or an exception, which becomes an ERROR of the stream (`fail`) and never reaches
  the connection;
- an error while the handler runs: the deadline, the end of a drain, an unusable message (`abort`);
- the caller's kill, or the loss of the connection (`kill`): nothing is sent.

Each end runs `_close` exactly once. It leaves nothing behind: no entry in a table, no timer. After `abort`
and `kill` the handler's context is killed, and the handler may run on for `DYN_CANCEL_GRACE_S`. The states
are those of `wire/session.py`.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextvars import copy_context
from time import perf_counter
from types import CoroutineType
from typing import Any, Final, Protocol

from dynamo_redis.errors import (
    DeadlineExceeded,
    HandlerFailed,
    InvalidRequest,
    Overloaded,
    PlaneError,
    ProtocolViolation,
)
from dynamo_redis.histogram import FOLD_COUNT
from dynamo_redis.planes.base import Handler
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.frames.connection import Connection
from dynamo_redis.planes.frames.flow import RequestMessages, Sender
from dynamo_redis.planes.stats import RequestCounts
from dynamo_redis.rate_limited_log import RateLimitedLog
from dynamo_redis.wire import frame
from dynamo_redis.wire.decoder import Unusable
from dynamo_redis.wire.session import KILL, ServerStream

_EAGERLY: Final[dict[str, Any]] = {"eager_start": True} if sys.version_info >= (3, 12) else {}
"""An eager task runs its handler up to the first await at once. On 3.11 the coroutine could be stepped by
hand, but then `asyncio.current_task()` is None in that step, and handlers that use `asyncio.timeout` or anyio
break."""

_RUNNING, _CLOSED = ServerStream.RUNNING, ServerStream.CLOSED
_LONGEST_RETRY_S: Final = 86_400.0
_LOGGED_CHARS: Final = 200

_log = logging.getLogger(__name__)


class RegisteredEndpoint:
    """A served subject and its handler. `active_count` is its requests that are admitted and not finished."""

    __slots__ = (
        "_failures",
        "active_count",
        "cancel_grace_s",
        "counts",
        "draining",
        "handler",
        "idle",
        "request_stream",
        "subject",
    )

    def __init__(
        self, subject: str, handler: Handler, *, request_stream: bool, cancel_grace_s: float
    ) -> None:
        self.subject = subject
        self.cancel_grace_s = cancel_grace_s
        self.handler = handler
        self.request_stream = request_stream
        self.active_count = 0
        self.counts = RequestCounts()
        self.draining = False
        self.idle: asyncio.Future[None] | None = None
        self._failures = RateLimitedLog(_log, logging.ERROR)

    def when_idle(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
        """Return a future that is done when the last request has finished."""
        if self.idle is None:
            self.idle = loop.create_future()
        return self.idle

    def release(self) -> None:
        """Count a request as finished."""
        self.active_count -= 1
        if not self.active_count and self.idle is not None:
            self.idle.set_result(None)
            self.idle = None

    def log_failure(self, exc: BaseException, request_id: str) -> None:
        """Log a handler's exception, at a limited rate for each type, text and place in the code."""
        place = exc.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = None if place is None else (place.tb_frame.f_code, place.tb_lineno)
        kind = type(exc), where, _describe(exc)[:_LOGGED_CHARS]
        text = "the handler of %s raised on request %s"
        self._failures.log(text, self.subject, request_id, kind=kind, exc_info=exc)


class Admission(Protocol):
    """Decides which requests of a server run, and when."""

    def admit(self, request: Request) -> None:
        """Start the request, or let it wait. Raises Overloaded."""
        ...

    def admit_large(self, request: Request, size_bytes: int) -> None:
        """As `admit`, for a request that came as a raw payload; its bytes count until the request has
        ended."""
        ...

    def retry_after_s(self) -> float:
        """Return the seconds after which a caller that is refused now should retry."""
        ...

    def dequeue(self, request: Request) -> None:
        """Remove a waiting request that has ended before its handler started."""
        ...

    def finished(self, request: Request) -> None:
        """Count the request's handler as finished."""
        ...


class Request(Sender):
    """One request, from admission to its end. `state` is the state of its stream."""

    __slots__ = (
        "_admission",
        "_argument",
        "_messages",
        "_task",
        "_timer",
        "context",
        "endpoint",
        "has_begun",
        "opened_at_sweep",
        "state",
    )

    def __init__(
        self,
        connection: Connection,
        admission: Admission,
        endpoint: RegisteredEndpoint,
        stream_id: int,
        state: ServerStream,
        context: Context,
        message: Any,
    ) -> None:
        """Make a request that is not admitted yet. It removes itself from `connection.streams` at its end.

        Args:
            connection: the caller's connection.
            admission: is told when the handler has finished, or the request ends before.
            endpoint: the endpoint that serves it.
            stream_id: its stream.
            state: RUNNING, or RECEIVING if more messages follow.
            context: the context that the handler gets.
            message: the request itself.
        """
        Sender.__init__(self, connection, stream_id)
        self._admission = admission
        self.has_begun = False
        """True once its handler's task has taken its first step."""
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
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
            if state is _RUNNING:
                self._messages.finish()

    def __repr__(self) -> str:
        return f"<Request {self._stream_id} of {self.endpoint.subject}: {self.state.name.lower()}>"

    @property
    def connection(self) -> Connection:
        """The caller's connection."""
        return self._connection

    @property
    def task(self) -> asyncio.Task[None] | None:
        """The task that runs the handler."""
        return self._task

    # ------------------------------------------------------------------- the handler

    def launch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the handler, in the context variables of its connection: the code that calls this may run in
        those of another request."""
        variables, name = self._connection.variables.copy(), self.endpoint.subject
        if loop.get_task_factory() is None:  # `create_task` would cost 0.3 µs more
            task = asyncio.Task(self.run(), loop=loop, name=name, context=variables, **_EAGERLY)
        else:
            # for factories that take no context
            task = variables.run(loop.create_task, self.run(), name=name)
        if task.done():
            return
        self._task = task
        if self.has_begun and not self.open:  # its first step ended the request
            self._schedule_cancel(task)

    def end_if_cancelled(self) -> bool:
        """End the request if its task was cancelled before its first step: `run` was not entered.

        Return False if the first step is still to come.
        """
        assert self._task is not None
        if not self._task.done():
            return False
        self.has_begun = True
        self._task = None
        self.endpoint.counts.unstarted_count += 1
        self.fail(HandlerFailed("the handler was cancelled before it began"))
        self._admission.finished(self)
        return True

    async def run(self) -> None:
        """Run the handler, and send its items."""
        self.has_begun = True
        began_at = perf_counter()
        try:
            result: Any = self.endpoint.handler(self._argument, self.context)
            if type(result) is CoroutineType or not hasattr(result, "__anext__"):
                item = await result
                if self._connection.paused:  # the caller does not read: wait, and keep the item unpacked
                    await self.wait_ready()
                if self.open:
                    self.end_with(item)
                    self._close()
            else:
                await self._answer_stream(result)
        except asyncio.CancelledError:
            if self.open:  # not by this class: the handler awaited a cancelled task, or the loop ends
                self.fail(HandlerFailed("the handler was cancelled"))
                raise
        except BaseException as exc:
            if not self.open:
                text = "the handler of %s raised after its request had ended"
                _log.debug(text, self.endpoint.subject, exc_info=exc)
            elif isinstance(exc, PlaneError):
                self.fail(exc)
            else:
                self.endpoint.log_failure(exc, self.context.id())
                self.fail(HandlerFailed(_describe(exc)))
            if isinstance(exc, KeyboardInterrupt | SystemExit):  # for the event loop
                raise
        finally:
            durations_s = self.endpoint.counts.durations_s
            durations_s.append(perf_counter() - began_at)
            if len(durations_s) >= FOLD_COUNT:
                self.endpoint.counts.fold()
            self._task = None
            if self._timer is not None:
                self._timer.cancel()
            self._admission.finished(self)

    async def _answer_stream(self, items: AsyncIterator[Any]) -> None:
        """Send the items of a generator, at the pace of the caller, and the end. Close it if it is left
        early."""
        connection, exhausted = self._connection, False
        try:
            async for item in items:
                if self._credit <= 0 or connection.paused:  # a request that has ended has no credit
                    await self.wait_ready()
                    if not self.open:
                        break
                self.push(item)
            else:
                exhausted = True
        finally:
            if not exhausted and isinstance(items, AsyncGenerator):
                await items.aclose()
        if self.open:
            self.end()
            self._close()

    # ------------------------------------------------------------------- frames

    def on_frame(self, kind: int, received: list[Any]) -> None:
        """Handle a frame that the state table allows. Raises ProtocolViolation."""
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
        """Hand a message of the request stream to the handler."""
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
        if self.state is _RUNNING:
            messages.finish()

    # ------------------------------------------------------------------- ends

    def watch_deadline(self, loop: asyncio.AbstractEventLoop) -> None:
        """End the request when its deadline passes."""
        remaining_s = self.context.remaining_s()
        if remaining_s is not None and self.open:
            late = "the request's deadline passed"
            self._timer = loop.call_later(max(0.0, remaining_s), lambda: self.abort(DeadlineExceeded(late)))

    def accept(self) -> None:
        """Send ACCEPT: the request is accepted, and its first item is not ready yet."""
        self.has_sent = True
        self._connection.send(frame.encode_accept(self._stream_id))

    def fail(self, error: PlaneError) -> None:
        """End with an error, after the items that were sent before it."""
        if self.open:
            self.endpoint.counts.add_error(error.code, _describe(error))
            self.flush_batch()
            self._connection.send(error_frame(self._stream_id, error))
            self._close()

    def abort(self, error: PlaneError) -> None:
        """End with an error, and have the handler end."""
        if self.open:
            self.fail(error)
            self._end_handler()

    def kill(self) -> None:
        """End without a frame, and have the handler end: the caller does not read the answer any more."""
        if self.open:
            self.endpoint.counts.cancelled_count += 1
            self._close()
            self._end_handler()

    def cancel(self) -> None:
        """Cancel the handler at its current `await`, if it runs."""
        if self._task is not None:
            self._task.cancel()

    def _end_handler(self) -> None:
        """Kill the handler's context, and cancel the handler after its grace time."""
        _quietly(self.context.kill)
        if self._task is not None:  # started, or about to start in the next turn of the event loop
            self._schedule_cancel(self._task)
        elif not self.has_begun:
            self._admission.dequeue(self)

    def _schedule_cancel(self, task: asyncio.Task[None]) -> None:
        """Cancel the handler after the time that it has to end by itself. At a yield it is closed at once."""
        grace_s = self.endpoint.cancel_grace_s
        if grace_s:
            self._timer = task.get_loop().call_later(grace_s, task.cancel)
        else:
            task.cancel()

    def _close(self) -> None:
        """Close the stream: nothing more is sent. Called once."""
        self.drop()
        self.state = _CLOSED
        self._connection.streams.pop(self._stream_id, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._messages is not None:
            self._messages.kill()


def context_of(headers: dict[str, Any]) -> Context:
    """Make the context that the headers describe. Raises InvalidRequest."""
    request_id, deadline_ms = headers.get("id"), headers.get("deadline_ms")
    traceparent, meta = headers.get("traceparent"), headers.get("meta")
    if not (
        isinstance(request_id, str | None)
        and isinstance(traceparent, str | None)
        and isinstance(meta, dict | None)
        and (deadline_ms is None or (type(deadline_ms) is int and 0 <= deadline_ms <= frame.MAX_DEADLINE_MS))
        and (not meta or all(type(key) is type(value) is str for key, value in meta.items()))
    ):
        raise InvalidRequest("malformed request headers")
    deadline = None if deadline_ms is None else time.monotonic() + deadline_ms / 1000
    return Context(request_id, meta, deadline=deadline, traceparent=traceparent)


def error_frame(stream_id: int, error: PlaneError) -> bytes:
    """Encode ERROR. An error of a handler that cannot be encoded becomes HandlerFailed with its type's
    name."""
    try:
        if type(error.code) is not str:
            raise TypeError(f"the code of {type(error).__name__} is no text")
        details = None
        if isinstance(error, Overloaded) and error.retry_after_s is not None:
            retry_after_s = error.retry_after_s
            if 0 <= retry_after_s < _LONGEST_RETRY_S:  # a handler may have set infinity
                details = {"retry_after_ms": round(retry_after_s * 1000)}
        return frame.encode_error(stream_id, error.code, str(error), details)
    except Exception:  # noqa: BLE001 - see above
        return frame.encode_error(stream_id, HandlerFailed.code, type(error).__name__, None)


def _describe(exc: BaseException) -> str:
    try:
        return f"{type(exc).__name__}: {exc}"
    except Exception:  # noqa: BLE001 - its `__str__` may raise anything
        return type(exc).__name__


def _quietly(cancel: Callable[[], None]) -> None:
    """Run a context's callbacks, and log what they raise. Neither their exceptions nor the context variables
    that they set reach the connection."""
    try:
        copy_context().run(cancel)
    except Exception:  # noqa: BLE001 - see above
        _log.exception("a cancellation callback raised")
