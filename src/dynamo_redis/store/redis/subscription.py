"""Messages of subscribed channels, on a connection of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from redis import exceptions as redis_errors

from dynamo_redis.errors import StoreUnavailable
from dynamo_redis.store.redis.deadline import Deadline
from dynamo_redis.store.redis.server_errors import FAILURES, drop, reply
from dynamo_redis.store.redis.server_state import ServerState


class ChannelSubscription:
    """Messages of subscribed channels, from one connection that is never replaced silently, unless its user
    or password has changed: a subscribed connection cannot log in again. Then another one subscribes before
    the first is closed, so a message may come twice, and none is lost.

    `make` returns a connection, not yet connected."""

    def __init__(self, server: ServerState, make: Callable[[], Any], timeout_s: float) -> None:
        self._server = server
        self._make = make
        self._connection = make()
        self._subscribed: tuple[str, ...] = ()
        self._login_version = 0
        self._received: deque[Any] = deque()
        self._timeout_s = timeout_s
        self._made_in = server.epoch()

    async def start(self, command: str, names: Sequence[str]) -> None:
        """Connect and subscribe. Raises StoreError."""
        self._subscribed = (command, *names)
        try:
            async with Deadline(self._timeout_s):
                await self._subscribe(self._connection)
            self._login_version = self._connection.login_version
        except FAILURES as exc:
            await self.aclose()
            raise self._server.error(exc) from exc

    async def _subscribe(self, connection: Any) -> None:
        """Connect and subscribe. Raises one of FAILURES."""
        await connection.connect()
        await connection.send_command(*self._subscribed)
        for _ in self._subscribed[1:]:
            await connection.read_response()

    async def _replace(self) -> None:
        """Subscribe by another connection, and take what the first one has received until then.

        If that fails, the first one is used on: it is still logged in."""
        self._login_version = self._server.login_version
        old, new = self._connection, self._make()
        try:
            async with Deadline(self._timeout_s):
                await self._subscribe(new)
        except BaseException as exc:
            drop(new)
            if not isinstance(exc, FAILURES):
                raise
            if reply(exc) is None:
                self._login_version = -1  # no answer: tried again
            else:
                self._server.note_refusal(exc)
            return
        self._connection = new
        self._login_version = new.login_version
        try:
            async with Deadline(self._timeout_s):
                await old.send_command("PING", check_health=False)
                while (message := await old.read_response())[0] != b"pong":
                    self._received.append(message)
        except BaseException:
            drop(new)  # messages may be lost: the next call says so
            raise
        finally:
            drop(old)

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
            if self._login_version != self._server.login_version:
                await self._replace()
            if self._received:
                message = self._received.popleft()
            else:
                message = await self._connection.read_response(timeout=timeout_s)
            if message is None:
                try:
                    async with Deadline(self._timeout_s):
                        await self._connection.send_command("PING", check_health=False)
                        message = await self._connection.read_response()
                except redis_errors.ResponseError as exc:
                    if "MISCONF" not in str(self._server.error(exc)):
                        raise
                    return None  # a server that cannot save refuses even PING: it is up
        except FAILURES as exc:
            await self.aclose()
            raise self._server.error(exc) from exc
        kind, *_ = message
        return (message[-2], message[-1]) if kind in (b"message", b"pmessage") else None

    def abort(self) -> None:
        """Close the connection, so that `next_message` raises. For the event loop."""
        drop(self._connection)

    async def aclose(self) -> None:
        """Drop the connection without waiting for the server."""
        drop(self._connection)
