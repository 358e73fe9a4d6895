"""The pool of the connections that commands share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import redis.asyncio


class EpochPool(redis.asyncio.BlockingConnectionPool):
    """A pool that uses only connections of the present epoch, and closes idle ones of earlier epochs."""

    epoch: Callable[[], int]
    _swept_in = 0

    def sweep(self) -> None:
        """Close the idle connections."""
        idle: Any
        for idle in self._available_connections:
            idle._close()

    def close(self) -> None:
        """Close every connection without waiting; what is in use there fails. A `disconnect` that is
        cancelled leaves them open."""
        connection: Any
        for connection in (*self._available_connections, *self._in_use_connections):
            with suppress(RuntimeError):  # its event loop is closed
                connection._close()

    async def ensure_connection(self, connection: Any) -> None:
        epoch = self.epoch()
        if self._swept_in != epoch:
            self._swept_in = epoch
            self.sweep()
        if connection.is_connected and connection.made_in != epoch:
            connection._close()
        if not connection.is_connected:
            connection.made_in = epoch
        await super().ensure_connection(connection)


def with_raw_replies(client: Any) -> Any:
    """Make a client of redis-py return replies as the protocol has them: those of redis-py differ between its
    releases."""
    client.response_callbacks.clear()
    return client
