"""The pool of the connections that commands share."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final

import redis.asyncio

from dynamo_redis.store.redis.server_errors import drop

IDLE_S: Final = 60.0
"""Time without a command after which a connection is closed: a burst of commands leaves none behind."""


class EpochPool(redis.asyncio.BlockingConnectionPool):
    """A pool that uses only connections of the present epoch. It closes idle ones of earlier epochs, and
    those that were not used for `IDLE_S`."""

    epoch: Callable[[], int]
    renew: Callable[[Any], Awaitable[None]]
    """Logs a connection in again if user and password have changed."""
    _swept_in = 0
    _swept_at = 0.0

    def sweep(self) -> None:
        """Close the idle connections."""
        idle: Any
        for idle in self._available_connections:
            drop(idle)

    def _close_unused(self, since: float) -> None:
        """Close the idle connections that were last used before a time."""
        idle: Any
        for idle in self._available_connections:
            if idle.is_connected and idle.used_at < since:
                drop(idle)

    def close(self) -> None:
        """Close every connection without waiting; what is in use there fails. A `disconnect` that is
        cancelled leaves them open."""
        connection: Any
        for connection in (*self._available_connections, *self._in_use_connections):
            with suppress(RuntimeError):  # its event loop is closed
                drop(connection)

    async def ensure_connection(self, connection: Any) -> None:
        epoch = self.epoch()
        if self._swept_in != epoch:
            self._swept_in = epoch
            self.sweep()
        now = time.monotonic()
        if now - self._swept_at > IDLE_S / 4:
            self._swept_at = now
            self._close_unused(now - IDLE_S)
        connection.used_at = now
        if connection.is_connected and connection.made_in != epoch:
            drop(connection)
        if not connection.is_connected:
            connection.made_in = epoch
        await super().ensure_connection(connection)
        await self.renew(connection)


def with_raw_replies(client: Any) -> Any:
    """Make a client of redis-py return replies as the protocol has them: those of redis-py differ between its
    releases."""
    client.response_callbacks.clear()
    return client
