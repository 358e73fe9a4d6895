"""How long an exchange with Redis may take: as long as bytes come.

A large answer over a slow link takes longer than any time-out that finds a dead server soon. So a deadline
counts from the last byte received. An answer that drips ends all the same, after `LONGEST_TIMES` the limit.

A large request leaves slowly, too, and nothing is received meanwhile. Which part of it still waits in buffers
on the way cannot be seen from here: each request gets, beside the limit, the time that it takes at
`SLOWEST_BYTES_PER_S`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextvars import ContextVar
from functools import cache
from types import TracebackType
from typing import Any, Final, Self

LONGEST_TIMES: Final = 20
"""So many times its limit an exchange takes at most."""
SLOWEST_BYTES_PER_S: Final = 1 << 16
"""The speed that large requests are given time for."""

_CURRENT: ContextVar[Deadline | None] = ContextVar("dynamo_redis_deadline", default=None)


def leaving_s(request_bytes: int) -> float:
    """How long a request of that size may take to leave."""
    return request_bytes / SLOWEST_BYTES_PER_S


class Deadline:
    """Bounds what runs in `async with`; raises TimeoutError there.

    It begins with `limit_s`, connecting included. Once a request has been sent over a connection of
    `watched_class`, bytes that this connection receives move it, and those around it. One timer looks: a byte
    costs no more.
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
    )

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._connection: Any = None
        self._request_bytes = 0
        self._outer = _CURRENT.get()

    async def __aenter__(self) -> Self:
        self._timeout = asyncio.timeout(None)
        await self._timeout.__aenter__()
        self._began_at = self._loop.time()
        self._timer = self._loop.call_later(self._limit_s, self._check)
        self._token = _CURRENT.set(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _CURRENT.reset(self._token)
        self._timer.cancel()
        await self._timeout.__aexit__(kind, exc, traceback)

    def watch(self, connection: Any, request_bytes: int) -> None:
        """A request of that size goes over this connection now."""
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


class _Watched:
    """The part that `watched_class` adds to a connection of redis-py."""

    heard_at = 0.0
    """When it last received something, on the event loop's clock."""

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


@cache
def watched_class(connection_class: type) -> type:
    """A class of redis-py's asynchronous connections whose received bytes a `Deadline` sees."""
    return type(f"Watched{connection_class.__name__}", (_Watched, connection_class), {})
