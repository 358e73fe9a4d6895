"""A connection that waits for the server: XREAD BLOCK and the like.

Every process reads every change of the registry, so this is the hot path of the whole deployment. redis-py
makes the connection (address, TLS, login); then, where hiredis is there, its transport is given to a protocol
that does nothing but parse what arrives: a fraction of the work of a pool, a stream and two time-outs a read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from typing import Any, Final, Protocol

from redis import exceptions as redis_errors

from dynamo_redis.errors import StoreError
from dynamo_redis.store.server_errors import FAILURES

HAS_HIREDIS: Final = find_spec("hiredis") is not None

Argument = bytes | str | int | float
"""What a command is made of."""

_PART: Final = object()


def pack(*words: Argument, more_count: int = 0) -> bytes:
    """A command as the protocol has it; the caller appends `more_count` further words to it."""
    return b"".join((b"*%d\r\n" % (len(words) + more_count), *map(pack_word, words)))


def pack_word(word: Argument) -> bytes:
    """A word of a command."""
    content = word if isinstance(word, bytes) else str(word).encode()
    return b"$%d\r\n%b\r\n" % (len(content), content)


class Link(Protocol):
    """A connection over which one request at a time is sent."""

    async def exchange(self, request: bytes, limit_s: float) -> Any:
        """Send a request and await its answer for `limit_s`. Raises one of FAILURES; then abort it."""
        ...

    def abort(self) -> None: ...


class BlockingConnection:
    """One connection, made when needed. For one task at a time; its owner closes it.

    `connect` answers a redis-py connection that has logged in. `error` tells what a failure means.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[Any]],
        error: Callable[[BaseException], StoreError],
        timeout_s: float,
    ) -> None:
        self._connect = connect
        self._error = error
        self._timeout_s = timeout_s
        self._link: Link | None = None

    async def execute(self, command: bytes, *, block_s: float) -> Any:
        """Run a packed command that may block for `block_s`. After any StoreError the next connects anew."""
        try:
            if self._link is None:
                async with asyncio.timeout(self._timeout_s):
                    self._link = _link(await self._connect())
            return await self._link.exchange(command, block_s + self._timeout_s)
        except FAILURES as exc:
            self._drop()
            raise self._error(exc) from exc
        except BaseException:  # cancelled: nobody would read the answer
            self._drop()
            raise

    def _drop(self) -> None:
        if self._link is not None:
            self._link.abort()
            self._link = None

    async def aclose(self) -> None:
        """Close the connection. Never waits for the server."""
        self._drop()


def _link(connection: Any) -> Link:
    return _ParserLink(connection) if HAS_HIREDIS else _StreamLink(connection)


class _ParserLink(asyncio.Protocol):
    """On the transport of a redis-py connection, in the place of its stream.

    One timer serves all exchanges: it looks at the deadline when it fires, and is set again if there is time.
    """

    def __init__(self, connection: Any) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = connection  # owns the writer, which would close the transport with itself
        self._transport: asyncio.Transport = connection._writer.transport
        import hiredis

        self._parser = hiredis.Reader(
            protocolError=redis_errors.InvalidResponse,
            replyError=redis_errors.ResponseError,
            notEnoughData=_PART,
        )
        self._answer: asyncio.Future[Any] | None = None
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._lost: Exception | None = None
        self._transport.set_protocol(self)

    async def exchange(self, request: bytes, limit_s: float) -> Any:
        if self._lost is not None:
            raise self._lost
        self._answer = self._loop.create_future()
        self._deadline = self._loop.time() + limit_s
        if self._timer is None:
            self._timer = self._loop.call_later(limit_s, self._check)
        self._transport.write(request)
        return await self._answer

    def _check(self) -> None:
        self._timer = None
        if self._answer is None:
            return
        left_s = self._deadline - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._check)
        else:
            self._finish(TimeoutError())

    def _finish(self, answer: Any) -> None:
        waiting, self._answer = self._answer, None
        if waiting is None or waiting.done():
            return
        if isinstance(answer, Exception):
            waiting.set_exception(answer)
        else:
            waiting.set_result(answer)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed(data)
            answer = self._parser.gets()
        except redis_errors.InvalidResponse as exc:
            answer = exc
        if answer is not _PART:
            self._finish(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = redis_errors.ConnectionError(f"Connection lost: {exc or 'closed by server'}")
        self._finish(self._lost)

    def abort(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._transport.abort()
        self._connection._close()


class _StreamLink:
    """All by redis-py."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def exchange(self, request: bytes, limit_s: float) -> Any:
        async with asyncio.timeout(limit_s):
            await self._connection.send_packed_command(request, check_health=False)
            # Not the socket's own time-out, and one that never passes: `limit_s` does first.
            return await self._connection.read_response(timeout=limit_s + 1.0)

    def abort(self) -> None:
        self._connection._close()
