"""The context of one request: its identity, its deadline, and its cancellation."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import re
import time
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Literal, Protocol

Strength = Literal["stop", "kill"]

_RUNNING, _STOPPED, _KILLED = 0, 1, 2

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]{0,128})?")


class Subscriber(Protocol):
    """An object that a context notifies of its cancellation."""

    def on_cancelled(self, strength: Strength) -> None:
        """Handle a stop or kill of the request. Must not raise, and must be quick."""
        ...


class Context:
    """The context of a request, at the caller and at the handler.

    Cancellation has two strengths. *Stop* ends the answer where it is, without an error: the caller wants no
    more items. *Kill* ends it with an error. A handler's context is stopped or killed when its caller ends
    the request or is lost. Both are final and idempotent. A handler that passes its context on to another
    call links the two: cancelling the first cancels the second.

    Not thread-safe: use it on the event loop that made it.
    """

    __slots__ = (
        "_id",
        "_metadata",
        "_other_subscribers",
        "_state",
        "_subscriber",
        "_traceparent",
        "deadline",
    )

    def __init__(
        self,
        id: str | None = None,  # noqa: A002 - the name users of dynamo.runtime know
        metadata: dict[str, str] | None = None,
        *,
        deadline: float | None = None,
        traceparent: str | None = None,
    ) -> None:
        """Make a context.

        Args:
            id: the request id; one is made on first use if None.
            metadata: headers that travel with the request, text to text.
            deadline: a `time.monotonic()` value; None or infinity: no deadline.
            traceparent: a W3C trace context header.

        Raises ValueError for a deadline that is no number, and TypeError for metadata of other types than
        text.
        """
        if metadata and not all(type(key) is type(value) is str for key, value in metadata.items()):
            raise TypeError("metadata maps texts to texts")
        self._id = id
        self._metadata = metadata
        self._traceparent = traceparent
        if deadline is not None and math.isnan(deadline):
            raise ValueError("a deadline must be a number")
        self.deadline = None if deadline == math.inf else deadline
        self._state = _RUNNING
        self._subscriber: Subscriber | None = None  # most requests have one
        self._other_subscribers: dict[Subscriber, None] | None = None

    def __repr__(self) -> str:
        state = ("running", "stopped", "killed")[self._state]
        return f"<Context {self.id()} {state}>"

    def id(self) -> str:
        """Return the request id; it is made on first use if none was given."""
        if self._id is None:
            self._id = _ids.next()
        return self._id

    @property
    def metadata(self) -> dict[str, str]:
        """Headers that travel with the request, with those that are added before the call."""
        if self._metadata is None:
            self._metadata = {}
        return self._metadata

    @metadata.setter
    def metadata(self, metadata: dict[str, str]) -> None:
        self._metadata = metadata

    @property
    def given_metadata(self) -> dict[str, str] | None:
        """The metadata; None if it was neither given nor read."""
        return self._metadata

    @property
    def traceparent(self) -> str | None:
        """The W3C trace context that the request came with, or that of a span that was begun for it since."""
        return self._traceparent

    @traceparent.setter
    def traceparent(self, traceparent: str | None) -> None:
        self._traceparent = traceparent

    @property
    def trace_id(self) -> str | None:
        """The trace the request belongs to, 32 hex digits; None without a (valid) trace context."""
        return self._trace_part(1, 32)

    @property
    def span_id(self) -> str | None:
        """The caller's span within the trace, 16 hex digits; None without a (valid) trace context."""
        return self._trace_part(2, 16)

    def trace_headers(self) -> dict[str, str] | None:
        """Return W3C trace headers for a call to an engine; None without a (valid) trace context."""
        if self._traceparent is None or not _TRACEPARENT.fullmatch(self._traceparent):
            return None
        return {"traceparent": self._traceparent}

    def _trace_part(self, index: int, length: int) -> str | None:
        parts = (self._traceparent or "").split("-")
        return parts[index] if len(parts) >= 4 and len(parts[index]) == length else None

    def detached(self, id: str) -> Context:  # noqa: A002 - the name users of dynamo.runtime know
        """Return a context with its own cancellation and id, this one's trace, and a copy of the metadata."""
        return Context(id, dict(self._metadata or {}), traceparent=self._traceparent)

    def remaining_s(self) -> float | None:
        """Return the seconds until the deadline (negative once passed), or None without one."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    def is_stopped(self) -> bool:
        """Return whether the request was stopped or killed."""
        return self._state >= _STOPPED

    def is_killed(self) -> bool:
        """Return whether the request was killed."""
        return self._state >= _KILLED

    def stop_generating(self) -> None:
        """End the answer early: the caller's iteration ends, and the handler at its next yield."""
        self._advance(_STOPPED, "stop")

    def kill(self) -> None:
        """End the request with an error: `RequestCancelled` at the caller."""
        self._advance(_KILLED, "kill")

    def on_cancel(self, callback: Callable[[Strength], None]) -> Callable[[], None]:
        """Call `callback` at a stop and at a kill, at once if that has happened. Return the function that
        unsubscribes it.

        The callback runs inside `stop_generating`/`kill`, must not raise, and must be quick.
        """
        subscriber = _Callback(callback)
        self.subscribe(subscriber)
        return partial(self.unsubscribe, subscriber)

    def subscribe(self, subscriber: Subscriber) -> None:
        """Notify `subscriber` as `on_cancel` does, until `unsubscribe(subscriber)`."""
        if self._subscriber is None:
            self._subscriber = subscriber
        elif self._other_subscribers is None:
            self._other_subscribers = {subscriber: None}
        else:
            self._other_subscribers[subscriber] = None
        if self._state:
            subscriber.on_cancelled("kill" if self._state == _KILLED else "stop")

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Notify `subscriber` no more. Idempotent."""
        if self._subscriber is subscriber:
            self._subscriber = None
        elif self._other_subscribers is not None:
            self._other_subscribers.pop(subscriber, None)

    def async_killed_or_stopped(self) -> asyncio.Future[bool]:
        """Return a future that is True once the request is stopped or killed. Cancel it to stop waiting."""
        woken: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if self._state:
            woken.set_result(True)
            return woken

        def wake(_: Strength) -> None:
            if not woken.done():
                woken.set_result(True)

        unsubscribe = self.on_cancel(wake)
        woken.add_done_callback(lambda _: unsubscribe())
        return woken

    def _advance(self, state: int, strength: Strength) -> None:
        if self._state >= state:
            return
        self._state = state
        for subscriber in (self._subscriber, *(self._other_subscribers or ())):
            if subscriber is not None:
                subscriber.on_cancelled(strength)


current_request: ContextVar[Context | None] = ContextVar("current_request", default=None)
"""The request that this code serves, for log lines. Handlers and their tasks have it."""


class _Ids:
    """Makes request ids of 32 hexadecimal digits: a count and a random part of this process. A `uuid4` would
    cost a small request a twentieth of its time."""

    def __init__(self) -> None:
        self._random = os.urandom(10).hex()
        self._count = itertools.count(int.from_bytes(os.urandom(5)))

    def next(self) -> str:
        return f"{next(self._count):012x}{self._random}"


_ids = _Ids()
os.register_at_fork(after_in_child=_ids.__init__)  # type: ignore[misc]


class _Callback:
    """A subscriber that is a function."""

    __slots__ = ("on_cancelled",)

    def __init__(self, callback: Callable[[Strength], None]) -> None:
        self.on_cancelled = callback
