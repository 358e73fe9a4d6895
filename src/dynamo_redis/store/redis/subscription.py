"""Messages of subscribed channels, on a connection of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redis import exceptions as redis_errors

from dynamo_redis.errors import StoreUnavailable
from dynamo_redis.store.redis.deadline import Deadline
from dynamo_redis.store.redis.server_errors import FAILURES, drop
from dynamo_redis.store.redis.server_state import ServerState


class ChannelSubscription:
    """Messages of subscribed channels, from one connection that is never replaced silently."""

    def __init__(self, server: ServerState, connection: Any, timeout_s: float) -> None:
        self._server = server
        self._connection = connection
        self._timeout_s = timeout_s
        self._made_in = server.epoch()

    async def start(self, command: str, names: Sequence[str]) -> None:
        """Connect and subscribe. Raises StoreError."""
        try:
            async with Deadline(self._timeout_s):
                await self._connection.connect()
                await self._connection.send_command(command, *names)
                for _ in names:
                    await self._connection.read_response()
        except FAILURES as exc:
            await self.aclose()
            raise self._server.error(exc) from exc

    async def next_message(self, timeout_s: float) -> tuple[bytes, bytes] | None:
        """Return the next (channel, payload); None if there is none within `timeout_s`.

        A silent connection is checked by PING, and a message on its way is awaited. Raises StoreError when
        the connection is gone: subscribe again, and expect a gap.
        """
        if self._made_in != self._server.epoch():
            await self.aclose()
            raise StoreUnavailable(
                f"Redis at {self._server.address} is no longer the primary: subscribe again"
            )
        try:
            reply = await self._connection.read_response(timeout=timeout_s)
            if reply is None:
                try:
                    async with Deadline(self._timeout_s):
                        await self._connection.send_command("PING", check_health=False)
                        reply = await self._connection.read_response()
                except redis_errors.ResponseError as exc:
                    if "MISCONF" not in str(self._server.error(exc)):
                        raise
                    return None  # a server that cannot save refuses even PING: it is up
        except FAILURES as exc:
            await self.aclose()
            raise self._server.error(exc) from exc
        kind, *_ = reply
        return (reply[-2], reply[-1]) if kind in (b"message", b"pmessage") else None

    def abort(self) -> None:
        """Close the connection, so that `next_message` raises. For the event loop."""
        drop(self._connection)

    async def aclose(self) -> None:
        """Drop the connection without waiting for the server."""
        drop(self._connection)
