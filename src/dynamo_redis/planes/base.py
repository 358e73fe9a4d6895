"""The contract of a request plane, as Protocols.

A plane carries one request to one endpoint of one instance and a stream of items back: 0..N items, then an
end or a typed `PlaneError`. One conformance suite (`tests/contract/`) holds for every plane. Requests and
items are values that msgpack carries: tuples arrive as lists, timestamps as seconds since 1970.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

from dynamo_redis.planes.context import Context
from dynamo_redis.planes.stats import EndpointStats
from dynamo_redis.wire.frame import Packed

Handler = Callable[[Any, Context], AsyncIterator[Any] | Awaitable[Any]]
"""Serves an endpoint. An async generator function answers with its items; a coroutine function with one item.

For an endpoint registered with `request_stream=True` the first argument is an `AsyncIterator` of the caller's
messages: the request, then those that follow it. When the caller stops or kills the request or is lost, and
when the deadline passes, the context is stopped or killed. A generator is closed at its next yield. After
`DYN_CANCEL_GRACE_S` the handler is cancelled (`CancelledError` at its current await). A `PlaneError` that the
handler raises is the answer; any other exception becomes `HandlerFailed`.
"""


Describe = Callable[[Literal["ping", "info", "stats"]], dict[str, Any]]
"""Returns what a process says of itself, as a JSON object."""


@dataclass(frozen=True, slots=True)
class Target:
    """One endpoint of one instance, as its registry record describes it.

    `address` has the plane's own form (`host:port` for tcp). `subject` is the server's name of the endpoint.
    `secret` is the instance's: both sides prove that they know it, and no text shows it; None where
    `DYN_PLANE_AUTH` is off.
    """

    instance_id: int
    address: str
    subject: str
    secret: bytes | None = field(default=None, repr=False)


class ResponseStream(Protocol):
    """The answer to one request, item by item. It has one reader at a time: a second one gets a RuntimeError.

    Iteration ends with StopAsyncIteration after a normal end, or raises the PlaneError that the request ended
    with. Closing it early (`aclose()`, leaving `async with`) kills the request at the worker. A read that is
    cancelled, as by a time-out, removes no item: the next read returns it.
    """

    def __aiter__(self) -> Self: ...
    async def __anext__(self) -> Any: ...
    async def aclose(self) -> None: ...
    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *exc_info: object) -> None: ...

    @property
    def sent(self) -> bool:
        """True once the request has left this process; False while it waits for a connection."""
        ...

    @property
    def packed(self) -> Packed:
        """The request as it was sent, until `forget_request`; `open` accepts it to send the same bytes
        again."""
        ...

    def forget_request(self) -> None:
        """Free the request's bytes: it is answered, and will not be sent again."""
        ...

    @property
    def is_over(self) -> bool:
        """True once the answer has ended without an error and all items have been read."""
        ...

    def take_ready(self) -> list[Any]:
        """Return the items that have come and were not read, without waiting."""
        ...

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Have the event loop of the stream call `callback`; may be called from any thread.

        Finalisers need this: the garbage collector may run them in any thread, in the middle of other code.
        """
        ...

    def abandon(self) -> None:
        """End the stream once the request has been sent: its answer is not wanted.

        A handler that is started at once runs to its first `yield`, or for `DYN_CANCEL_GRACE_S`.
        """
        ...

    def fail(self, error: Exception) -> None:
        """End the stream with `error`, unless it has ended. The worker is told to kill the request."""
        ...


class RequestPlaneClient(Protocol):
    """Sends requests. A process has one client; it owns and shares the connections."""

    @property
    def pending_count(self) -> int:
        """Count of requests whose answer has not ended."""
        ...

    @property
    def connection_count(self) -> int:
        """Count of open connections."""
        ...

    def open(
        self,
        target: Target,
        request: Any,
        context: Context | None,
        *,
        messages: AsyncIterable[Any] | None = None,
    ) -> ResponseStream:
        """Send a request, without waiting: a failed connection, a refusal or an error shows when the answer
        is read.

        Args:
            target: the endpoint and instance that gets the request.
            request: is packed at once; a `Packed` of another stream is sent as it is.
            context: its deadline and cancellation go with the request; None if the caller keeps no context.
            messages: follow `request` as a request stream, under flow control.

        Raises PayloadTooLarge and TypeError (not msgpack) at once.
        """
        ...

    async def probe(self, target: Target, timeout_s: float) -> None:
        """Wait until the instance answers.

        Raises PlaneError: NotAccepted if its process lives but its event loop is too busy for requests;
        CannotConnect, AuthenticationFailed, ….
        """
        ...

    def forget(self, target: Target) -> None:
        """Forget an instance that has left the registry.

        Pending requests of the target's endpoint fail with InstanceRemoved, which is retryable. Connections
        without other requests are closed. Other endpoints of the same instance keep their requests.
        """
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
        """The address that callers dial. Valid after `start`."""
        ...

    @property
    def addresses(self) -> dict[str, str]:
        """The address on each plane that it serves, the preferred one first. Valid after `start`."""
        ...

    @property
    def connection_count(self) -> int:
        """Count of open connections."""
        ...

    @property
    def in_flight_count(self) -> int:
        """Count of requests admitted and not yet answered, over all endpoints."""
        ...

    async def start(self) -> None:
        """Start to listen. Raises ConfigError if a configured address cannot be used."""
        ...

    def register(self, subject: str, handler: Handler, *, request_stream: bool = False) -> None:
        """Serve an endpoint from now on. Raises ValueError if the subject is taken."""
        ...

    def stats(self, subject: str) -> EndpointStats | None:
        """Return the counts of an endpoint since it was registered; None if it is not served."""
        ...

    async def announce(self, describe: Describe) -> None:
        """Answer the discovery of the plane's own tools with `describe`, if the plane has such tools."""
        ...

    async def unregister(self, subject: str, *, grace_s: float) -> None:
        """Refuse new requests of the endpoint, and those that still wait for a handler (retryable).

        Running requests may finish for `grace_s` seconds; the rest then ends, retryable too. Idempotent.
        """
        ...

    async def drain(self, grace_s: float) -> None:
        """Tell every caller to use other instances (GOAWAY), and end all endpoints as `unregister` does.

        Then wait until the callers have read their answers: at most a second longer, or up to `grace_s` in
        all while a slow caller still reads.
        """
        ...

    async def aclose(self) -> None:
        """Stop listening, kill running requests, close all connections."""
        ...
