"""What a request plane promises, as Protocols.

A plane carries one request to one endpoint of one instance and a stream of items back: 0..N items, then an
end or a typed `PlaneError`. Four planes can stand behind this contract, and one conformance suite
(`tests/contract/`) holds for each. Requests and items are anything msgpack carries: tuples
arrive as lists, timestamps as seconds since 1970.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from dynamo_redis.planes.context import Context
from dynamo_redis.wire.frame import Packed

Handler = Callable[[Any, Context], AsyncIterator[Any] | Awaitable[Any]]
"""Serves an endpoint. An async generator function answers with its items; a coroutine function with one item.

For an endpoint registered with `request_stream=True` the first argument is an `AsyncIterator` of the
caller's messages: the request, then those that follow it. When the caller stops or kills the request or is
lost, and when the deadline passes, the context says so; a generator is closed at its next yield, and after
`DYN_CANCEL_GRACE_S` the handler is cancelled (`CancelledError` at its current await). Raise a `PlaneError` to
answer with it; any other exception becomes `HandlerFailed`.
"""


@dataclass(frozen=True, slots=True)
class Target:
    """One endpoint of one instance, as its registry record describes it.

    `address` is the plane's own (`host:port` for tcp), `subject` what the server calls the endpoint, and
    `secret` the instance's, which both sides prove and no text shows; None where `DYN_PLANE_AUTH` is off.
    """

    instance_id: int
    address: str
    subject: str
    secret: bytes | None = field(default=None, repr=False)


class ResponseStream(Protocol):
    """The answer to one request, item by item. It has one reader at a time: a second gets a RuntimeError.

    Iteration ends with StopAsyncIteration after a normal end, or raises the PlaneError the request ended
    with. Abandoning it early (`aclose()`, leaving `async with`) kills the request at the worker. Cancelling
    a read, as a time-out does, takes nothing from the stream: the next read goes on.
    """

    def __aiter__(self) -> Self: ...
    async def __anext__(self) -> Any: ...
    async def aclose(self) -> None: ...
    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *exc_info: object) -> None: ...

    @property
    def sent(self) -> bool:
        """Whether the request has left this process: False while it waits for a connection."""
        ...

    @property
    def packed(self) -> Packed:
        """The request as it was sent, until `forget_request`: `open` takes it to send the same again."""
        ...

    def forget_request(self) -> None:
        """Let go of the request's bytes: it is answered, and is sent nowhere else."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether the answer has come to its end, not by an error, and all of it has been read."""
        ...

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Have the event loop of the stream call something, from any thread: a finaliser runs in whichever
        the garbage collector was called in, in the middle of anything."""
        ...

    def abandon(self) -> None:
        """End the stream once the request has been sent: its answer is not wanted. A handler that is started
        at once runs to its first `yield`, or for `DYN_CANCEL_GRACE_S`."""
        ...

    def fail(self, error: Exception) -> None:
        """End the stream from outside with `error`, unless it has ended. The worker is told to kill."""
        ...


class RequestPlaneClient(Protocol):
    """Sends requests. One a process; it owns and shares the connections."""

    def open(
        self,
        target: Target,
        request: Any,
        context: Context | None,
        *,
        messages: AsyncIterable[Any] | None = None,
    ) -> ResponseStream:
        """Send a request, without waiting: connecting, refusal and errors show when the answer is read.

        The request is packed at once; one that is `Packed`, by another stream, is sent as it is. With
        `messages`, these follow `request` as a request stream, under flow control. The context's deadline
        and cancellation go with the request; None if the caller keeps no context. Raises PayloadTooLarge and
        TypeError (not msgpack) at once.
        """
        ...

    async def probe(self, target: Target, timeout_s: float) -> None:
        """Ask whether the instance answers. Raises PlaneError: NotAccepted if its process lives but takes no
        requests, as its event loop is busy; CannotConnect, AuthenticationFailed, …."""
        ...

    def forget(self, target: Target) -> None:
        """An instance has left: what is pending on the target's endpoint fails with InstanceRemoved,
        retryable, and connections that have nothing else to do are closed. Other endpoints of the same
        instance keep theirs."""
        ...

    async def aclose(self) -> None:
        """Close all connections; pending requests end with ConnectionLost."""
        ...


class RequestPlaneServer(Protocol):
    """Receives requests for the endpoints of this process."""

    @property
    def plane(self) -> str:
        """The plane's name, the key of its address in an instance record: `tcp`, …"""
        ...

    @property
    def address(self) -> str:
        """What callers dial. Valid after `start`."""
        ...

    @property
    def in_flight_count(self) -> int:
        """Requests admitted and not yet answered, over all endpoints."""
        ...

    async def start(self) -> None:
        """Listen. Raises ConfigError if an explicit address cannot be had."""
        ...

    def register(self, subject: str, handler: Handler, *, request_stream: bool = False) -> None:
        """Serve an endpoint from now on. Raises ValueError if the subject is taken."""
        ...

    async def unregister(self, subject: str, *, grace_s: float) -> None:
        """Refuse new requests of the endpoint, and those that still wait for a handler (retryable); let those
        under way finish, at most `grace_s` seconds, then end the rest, retryable too. Idempotent."""
        ...

    async def drain(self, grace_s: float) -> None:
        """The same for all endpoints, after telling every caller to go elsewhere (GOAWAY); then see that the
        callers have their answers: at most a second longer, or up to `grace_s` in all for one that is slow to
        read."""
        ...

    async def aclose(self) -> None:
        """Stop listening, kill what is under way, close all connections."""
        ...
