"""A connection for commands that block at the server, such as XREAD BLOCK.

Every process reads every change of the registry, so this is the hot path of the whole deployment. redis-py
makes the connection (address, TLS, login). Then, if hiredis is installed, a protocol that only parses answers
takes over the transport. That is a fraction of the work of a pool, a stream and two time-outs a read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from importlib.util import find_spec
from typing import Any, Final, Protocol

from redis import exceptions as redis_errors

from dynamo_redis.errors import StoreError
from dynamo_redis.store.redis.deadline import LONGEST_TIMES, Deadline, leaving_s
from dynamo_redis.store.redis.server_errors import FAILURES, ErrorReply, drop
from dynamo_redis.store.redis.server_state import ServerState

HAS_HIREDIS: Final = find_spec("hiredis") is not None

Argument = bytes | str | int | float
"""A word of a command."""

_PART: Final = object()


def pack(*words: Argument, more_count: int = 0) -> bytes:
    """Encode a command; the caller appends `more_count` further words, each encoded by `pack_word`."""
    return b"".join((b"*%d\r\n" % (len(words) + more_count), *map(pack_word, words)))


def pack_word(word: Argument) -> bytes:
    """Encode one word of a command."""
    content = word if isinstance(word, bytes) else str(word).encode()
    return b"$%d\r\n%b\r\n" % (len(content), content)


class Link(Protocol):
    """A connection that sends one request at a time: several commands, sent and answered together."""

    async def exchange(
        self, request: bytes, answer_count: int, limit_s: float, *, keeps_errors: bool = False
    ) -> list[Any]:
        """Send commands and return all answers; `limit_s` is the longest time between two bytes, as in
        `Deadline`. With `keeps_errors`, errors of the server are among the answers.

        Raises one of FAILURES; then abort the connection."""
        ...

    def abort(self) -> None: ...


class BlockingConnection:
    """One connection, made when needed. For one task at a time; its owner closes it.

    `connect` returns a redis-py connection that has logged in. In another epoch of the server, and when its
    login has changed, the connection is replaced or logs in again before the next command.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[Any]],
        server: ServerState,
        timeout_s: float,
    ) -> None:
        self._connect = connect
        self._server = server
        self._error = server.error
        self._epoch = server.epoch
        self._login_version = 0
        self._made_in = 0
        self._timeout_s = timeout_s
        self._link: Link | None = None

    async def execute(self, command: bytes, *, block_s: float) -> Any:
        """Run a packed command that may block for `block_s`. After any StoreError the next call
        reconnects."""
        return (await self.execute_all((command,), block_s=block_s))[0]

    async def execute_all(self, commands: Sequence[bytes], *, block_s: float) -> list[Any]:
        """Run several commands as `execute`, in order and in one round trip. Raises the first error."""
        return await self._exchange(commands, block_s)

    async def execute_each(self, commands: Sequence[bytes], *, block_s: float = 0.0) -> list[Any]:
        """Run commands as `execute_all`; the StoreError of one that the server refuses is its answer.

        Raises StoreError if the connection breaks."""
        answers = await self._exchange(commands, block_s, keeps_errors=True)
        return [self._caused(one) if isinstance(one, Exception) else one for one in answers]

    def _caused(self, exc: Exception) -> StoreError:
        error = self._error(exc)
        error.__cause__ = exc
        return error

    async def _exchange(
        self, commands: Sequence[bytes], block_s: float, *, keeps_errors: bool = False
    ) -> list[Any]:
        if self._made_in != self._epoch():
            self._drop()
        try:
            if self._link is None:
                self._made_in = self._epoch()
                async with asyncio.timeout(self._timeout_s):
                    made = await self._connect()
                    self._login_version = made.login_version
                    self._link = _ParserLink(made) if HAS_HIREDIS else _StreamLink(made)
            elif self._login_version != self._server.login_version:
                await self._log_in_again(self._link)
            request = commands[0] if len(commands) == 1 else b"".join(commands)
            return await self._link.exchange(
                request, len(commands), block_s + self._timeout_s, keeps_errors=keeps_errors
            )
        except FAILURES as exc:
            self._drop()
            raise self._error(exc) from exc
        except BaseException:  # cancelled: the answer would be left unread
            self._drop()
            raise

    async def _log_in_again(self, link: Link) -> None:
        """Send AUTH with the present credentials. A refusal leaves the connection as it was."""
        self._login_version = self._server.login_version
        request = pack("AUTH", *self._server.login_words)
        (answer,) = await link.exchange(request, 1, self._timeout_s, keeps_errors=True)
        if isinstance(answer, Exception):
            self._server.note_refusal(answer)

    def abort(self) -> None:
        """Close the connection, so that a command under way raises StoreError. For the event loop."""
        self._drop()

    def _drop(self) -> None:
        if self._link is not None:
            self._link.abort()
            self._link = None

    async def aclose(self) -> None:
        """Close the connection. Never waits for the server."""
        self._drop()


class OneServerSending:
    """`Sending` on one connection."""

    def __init__(self, connection: BlockingConnection) -> None:
        self._connection = connection

    async def execute_each(self, commands: Sequence[tuple[str, bytes]]) -> list[Any]:
        return await self._connection.execute_each([command for _, command in commands])

    async def aclose(self) -> None:
        await self._connection.aclose()


class _ParserLink(asyncio.Protocol):
    """A link that parses answers with hiredis, on the transport of a redis-py connection.

    One timer serves all exchanges: it checks the deadline when it fires, and is set again if there is time
    left. Each received part of an answer moves the deadline (`deadline.Deadline`), up to the latest.
    """

    def __init__(self, connection: Any) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = connection  # owns the writer, which would close the transport with itself
        self._transport: asyncio.Transport = connection._writer.transport
        import hiredis

        self._parser = hiredis.Reader(
            protocolError=redis_errors.InvalidResponse,
            replyError=ErrorReply,
            notEnoughData=_PART,
        )
        self._answer: asyncio.Future[list[Any]] | None = None
        self._answers: list[Any] = []
        self._wanted_count = 0
        self._keeps_errors = False
        self._limit_s = 0.0
        self._deadline = 0.0
        self._latest = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._lost: Exception | None = None
        self._transport.set_protocol(self)

    async def exchange(
        self, request: bytes, answer_count: int, limit_s: float, *, keeps_errors: bool = False
    ) -> list[Any]:
        if self._lost is not None:
            raise self._lost
        self._keeps_errors = keeps_errors
        self._answer = self._loop.create_future()
        self._answers = []
        self._wanted_count = answer_count
        now = self._loop.time()
        self._limit_s = limit_s
        self._deadline = now + limit_s + leaving_s(len(request))
        self._latest = now + LONGEST_TIMES * limit_s
        if self._timer is None:
            self._timer = self._loop.call_later(limit_s, self._check)
        self._transport.write(request)
        return await self._answer

    def _check(self) -> None:
        self._timer = None
        if self._answer is None:
            return
        left_s = min(self._deadline, self._latest) - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._check)
        else:
            self._finish(TimeoutError())

    def _finish(self, error: Exception | None = None) -> None:
        waiting, self._answer = self._answer, None
        if waiting is None or waiting.done():
            return
        if error is not None:
            waiting.set_exception(error)
        else:
            waiting.set_result(self._answers)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed(data)
            while (answer := self._parser.gets()) is not _PART:
                if isinstance(answer, Exception) and not self._keeps_errors:
                    self._finish(answer)
                    return
                self._answers.append(answer)
                if len(self._answers) >= self._wanted_count:
                    self._finish()
                    return
            self._deadline = self._loop.time() + self._limit_s
        except redis_errors.InvalidResponse as exc:
            self._finish(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = redis_errors.ConnectionError(f"Connection lost: {exc or 'closed by server'}")
        self._finish(self._lost)

    def abort(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._transport.abort()
        self._connection._close()


class _StreamLink:
    """A link that leaves sending and parsing to redis-py."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def exchange(
        self, request: bytes, answer_count: int, limit_s: float, *, keeps_errors: bool = False
    ) -> list[Any]:
        answers: list[Any] = []
        async with Deadline(limit_s):
            await self._connection.send_packed_command(request, check_health=False)
            while len(answers) < answer_count:
                try:
                    answers.append(await self._connection.read_response())
                except redis_errors.ResponseError as exc:
                    if not keeps_errors:
                        raise
                    answers.append(exc)
        return answers

    def abort(self) -> None:
        drop(self._connection)
