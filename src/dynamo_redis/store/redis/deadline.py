"""Deadlines of exchanges with Redis, which are extended while bytes arrive.

A large answer over a slow link takes longer than any time-out that finds a dead server soon. So a deadline
counts from the last byte received. An answer that only drips still ends, after `LONGEST_TIMES` the limit.

A large request leaves slowly, too, and no byte is received meanwhile. The part that still waits in buffers on
the way is unknown here. So each request gets, in addition to the limit, the time that it takes at
`SLOWEST_BYTES_PER_S`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextvars import ContextVar
from time import perf_counter
from types import TracebackType
from typing import Any, Final, Self

from dynamo_redis.histogram import Histogram

LONGEST_TIMES: Final = 20
"""Longest duration of an exchange, as a multiple of its limit."""
SLOWEST_BYTES_PER_S: Final = 1 << 16
"""Slowest link for which large requests get enough time."""

_CURRENT: ContextVar[Deadline | None] = ContextVar("dynamo_redis_deadline", default=None)


def leaving_s(request_bytes: int) -> float:
    """Return the time in seconds that a request of that size may take to be sent."""
    return request_bytes / SLOWEST_BYTES_PER_S


class Deadline:
    """Bounds the time of an `async with` block; raises TimeoutError there.

    The block has `limit_s`, connecting included. Once a request has been sent over a `Watched`
    connection, each byte that this connection receives extends this deadline and those of outer blocks.
    A single timer checks the time of the last byte, so a byte costs only the note of its time.
    """

    __slots__ = (
        "_began_at",
        "_connection",
        "_limit_s",
        "_loop",
        "_outer",
        "_request_bytes",
        "_timeout",
        "_timer",
        "_token",
        "_trip_began_at",
        "_trips_s",
    )

    def __init__(self, limit_s: float, trips_s: Histogram | None = None) -> None:
        """`trips_s` gets the duration of the block, if it ends without an exception."""
        self._limit_s = limit_s
        self._trips_s = trips_s
        self._loop = asyncio.get_running_loop()
        self._connection: Any = None
        self._request_bytes = 0
        self._outer = _CURRENT.get()

    async def __aenter__(self) -> Self:
        self._timeout = asyncio.timeout(None)
        await self._timeout.__aenter__()
        self._began_at = self._loop.time()
        self._trip_began_at = perf_counter()  # uvloop's own time has milliseconds
        self._timer = self._loop.call_later(self._limit_s, self._check)
        self._token = _CURRENT.set(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _CURRENT.reset(self._token)
        self._timer.cancel()
        await self._timeout.__aexit__(kind, exc, traceback)
        if kind is None and self._trips_s is not None:
            self._trips_s.add(perf_counter() - self._trip_began_at)

    def watch(self, connection: Any, request_bytes: int) -> None:
        """Note that a request of that size is sent over this connection now."""
        self._connection = connection
        self._request_bytes = request_bytes
        if self._outer is not None:
            self._outer.watch(connection, request_bytes)

    def _check(self) -> None:
        now = self._loop.time()
        heard_at = 0.0 if self._connection is None else self._connection.heard_at
        until = max(self._began_at + leaving_s(self._request_bytes), heard_at) + self._limit_s
        left_s = min(until, self._began_at + LONGEST_TIMES * self._limit_s) - now
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._check)
        else:
            self._timeout.reschedule(now)


class Watched:
    """The methods that a connection class of redis-py needs to report received bytes to a `Deadline`."""

    heard_at = 0.0
    """Time of the last received byte, on the event loop's clock."""

    async def _connect(self) -> None:
        await super()._connect()  # type: ignore[misc]
        reader = self._reader  # type: ignore[attr-defined]
        feed, loop = reader.feed_data, asyncio.get_running_loop()

        def note(data: bytes) -> None:
            self.heard_at = loop.time()
            feed(data)

        reader.feed_data = note

    async def send_packed_command(
        self, command: bytes | str | Iterable[bytes], check_health: bool = True
    ) -> None:
        deadline = _CURRENT.get()
        if deadline is not None:
            parts = [command] if isinstance(command, bytes | str) else list(command)
            deadline.watch(self, sum(map(len, parts)))
            command = parts  # type: ignore[assignment]
        await super().send_packed_command(command, check_health)  # type: ignore[misc]
