"""Connections to Redis or Valkey.

All code that depends on redis-py is here and in `blocking.py`, in `url.py` (its options) and in
`server_errors.py` (its errors). There are four kinds of connection, since they wait in different ways:

- commands (`execute`, `script`, `pipeline`, `scan`): a bounded pool, one deadline a call, no retry. Only
  the caller knows which command may be repeated.
- blocking reads (`blocking`): a connection of their own, whose deadline is the block time plus the usual one.
- subscriptions (`subscribe`): a connection of their own that never reconnects by itself, since a reconnect is
  the only sign that messages were lost.
- a thread's connection (`sync`): for the keepalive, which must not depend on the event loop.

All use RESP2, which every server supports, and database 0, and return raw protocol values (bytes, int, None,
list). Exceptions of redis-py become a `StoreError` here, once; no message contains a password.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import Any, Final, Protocol

import redis.asyncio
import redis.asyncio.connection
import redis.connection
from redis import exceptions as redis_errors
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from dynamo_redis.errors import StoreError, StoreRefused, StoreUnavailable
from dynamo_redis.histogram import Histogram
from dynamo_redis.rate_limited_log import RateLimitedLog
from dynamo_redis.store.redis.blocking import Argument as Argument
from dynamo_redis.store.redis.blocking import BlockingConnection
from dynamo_redis.store.redis.deadline import Deadline, watched_class
from dynamo_redis.store.redis.key_types import MOST_KEYS_COUNT, describe_wrong_types
from dynamo_redis.store.redis.server_errors import (
    FAILURES,
    WRITE_REFUSALS,
    ErrorReply,
    UntestedScheme,
    does_not_take,
    is_about_command,
    is_about_password,
    is_cut_off,
    is_wrong_server,
    keep_replies,
    reply,
    store_error,
)
from dynamo_redis.store.redis.url import address, make_connection, parse_url
from dynamo_redis.store.scripts import Script

logger = logging.getLogger(__name__)

TRIP_LIMITS_S: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
"""Upper limits of the durations of commands that are counted together."""

MINIMUM_VERSION: Final = (6, 2)
MAX_CONNECTIONS_COUNT: Final = 32
"""Commands in flight at once; further ones wait for a connection, within their deadline."""
CLOSE_TIMEOUT_S: Final = 1.0
REFUSAL_REPEATED_S: Final = 60.0
"""Shortest time between two log lines about new connections that are refused for the same reason."""
ROTATED_REMEDY: Final = (
    "; open connections go on until they break: change DYN_REDIS_URL and restart this process"
)

_refusals: Final = RateLimitedLog(logger, pause_s=REFUSAL_REPEATED_S)
"""Shared by all clients of this process, since each would log the same."""

RECONNECT_AGAIN_S: Final = 1.0
"""Shortest time between two replacements of all connections: the address may lead to the wrong server
again."""


class RedisClient:
    """A process's client of one Redis. Connects at the first command; close it with `aclose`.

    `timeout_s` bounds each call, connecting included. While an answer arrives, it counts from the last byte
    (`deadline.Deadline`). Cancelling a call is safe: its connection is dropped. Then it is unknown whether
    the server ran the command. Raises ConfigError for a URL that cannot be used.
    """

    def __init__(self, url: str, *, timeout_s: float, client_name: str = "dynamo-redis") -> None:
        self.timeout_s = timeout_s
        self._client_name = client_name
        self._url = url
        options = parse_url(url, redis.asyncio.connection.parse_url)
        self.address: Final = address(options)
        self.user: Final = str(options.get("username") or "default")
        pool = _Pool(
            max_connections=MAX_CONNECTIONS_COUNT,
            timeout=timeout_s,
            **self._async_options(timeout_s),
        )
        pool.epoch = self._current_epoch
        self._pool = pool
        self._redis = _raw(redis.asyncio.Redis(connection_pool=pool))
        self.trips_s = Histogram(TRIP_LIMITS_S)
        """The durations of commands, scripts and pipelines that were answered."""
        self._closed = False
        self._has_logged_in = False
        self._sends_hashes = True
        self._names_connections = True
        self._epoch = 0  # counts replacements of all connections
        self._left_at = float("-inf")

    def __repr__(self) -> str:
        return f"<RedisClient {self.address}>"

    @property
    def closed(self) -> bool:
        """True after `aclose`: every call raises StoreUnavailable."""
        return self._closed

    # ------------------------------------------------------------------ commands

    async def connect(self) -> None:
        """Check that the server answers, accepts the login and is recent enough.

        Raises StoreUnavailable if it does not answer, StoreRefused with a remedy if it refuses. Warns of a
        server that evicts keys. Warns of a read-only replica, which may be promoted and can be read until
        then. A server that does not allow INFO (some managed services) is not checked.
        """
        try:
            await self.execute("PING")
        except StoreRefused as exc:
            # A server that cannot save refuses even PING; and a user may have few rights.
            if exc.answer_code not in ("MISCONF", "NOPERM"):
                raise
        try:
            server = _parse_info(await self.execute("INFO", "server"))
            replication = _parse_info(await self.execute("INFO", "replication"))
            memory = _parse_info(await self.execute("INFO", "memory"))
        except StoreRefused as exc:
            logger.debug("INFO is not allowed, server version and role are not checked: %s", exc)
            return
        version = server.get("redis_version", "")
        parts = [int(part) for part in version.split(".")[:2] if part.isdigit()]
        if parts and tuple(parts) < MINIMUM_VERSION:
            wanted = ".".join(map(str, MINIMUM_VERSION))
            raise StoreRefused(
                f"Redis at {self.address} is version {version}: upgrade it to {wanted} or later, or to Valkey"
            )
        policy = memory.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            logger.warning(
                "Redis at %s drops keys of its choice when its memory is full (maxmemory-policy %s),"
                " instances and model files among them: set maxmemory-policy to noeviction",
                self.address,
                policy,
            )
        if replication.get("role") == "slave":
            logger.warning(
                "Redis at %s is a read-only replica: set DYN_REDIS_URL to its primary (%s:%s) and restart;"
                " until then this process reads what others write, and writes nothing",
                self.address,
                replication.get("master_host", "?"),
                replication.get("master_port", "?"),
            )

    async def execute(self, *command: Argument) -> Any:
        """Run one command once; return the raw reply. Raises StoreError."""
        self._check_open()
        try:
            async with Deadline(self.timeout_s, self.trips_s):
                return await self._redis.execute_command(*command)
        except FAILURES as exc:
            raise await self.named(self.error(exc, command[0]), command[1:2]) from exc

    async def script(self, script: Script, keys: Sequence[Argument], args: Sequence[Argument] = ()) -> Any:
        """Run a script by its hash; send its source only if the server does not know it.

        A server that does not know the script, or takes no hashes, has not run it, so the second attempt is
        no repetition. Raises StoreError.
        """
        self._check_open()
        rest = (len(keys), *keys, *args)
        try:
            async with Deadline(self.timeout_s, self.trips_s):
                if self._sends_hashes:
                    try:
                        return await self._redis.execute_command("EVALSHA", script.sha, *rest)
                    except redis_errors.ResponseError as exc:
                        if not self._wants_source(exc):
                            raise
                return await self._redis.execute_command("EVAL", script.source, *rest)
        except FAILURES as exc:
            raise await self.named(self.error(exc, "EVALSHA or EVAL"), keys) from exc

    def _wants_source(self, exc: redis_errors.ResponseError) -> bool:
        """Return whether EVALSHA failed since the script, or the command itself, is not known."""
        if does_not_take(exc, "EVALSHA"):
            self._sends_hashes = False  # a proxy, or a user without the right: EVAL is used from now on
            return True
        return isinstance(exc, redis_errors.NoScriptError)

    async def pipeline(
        self, commands: Iterable[Sequence[Argument]], *, transaction: bool = False
    ) -> list[Any]:
        """Run commands in one round trip, in order; return their raw replies.

        Not atomic unless `transaction`. Raises StoreError for the first command that failed; the others
        may have run.
        """
        self._check_open()
        pipe = self._redis.pipeline(transaction=transaction)
        keys: dict[Argument, None] = {}
        for command in commands:
            pipe.execute_command(*command)
            keys.update(dict.fromkeys(command[1:2]))
        try:
            async with Deadline(self.timeout_s, self.trips_s):
                return list(await pipe.execute())
        except FAILURES as exc:
            raise await self.named(self.error(exc), tuple(keys)) from exc

    async def scan(self, match: str, *, count: int = 500) -> AsyncIterator[bytes]:
        """Yield the keys that match a glob pattern. A key may come twice; a key made meanwhile may be
        missed."""
        cursor = b"0"
        while True:
            cursor, found = await self.execute("SCAN", cursor, "MATCH", match, "COUNT", count)
            for key in found:
                yield key
            if cursor == b"0":
                return

    async def aclose(self) -> None:
        """Close the pool; later calls raise StoreUnavailable. Never raises for a dead server."""
        self._closed = True
        self._pool.close()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._redis.aclose()
                await self._pool.disconnect()
        except FAILURES as exc:
            logger.debug("closing a connection: %s", exc)

    def disconnect(self) -> None:
        """Close idle connections now, and others before their next use. For the event loop."""
        self._replace_connections()
        self._pool.sweep()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreUnavailable(f"the connection to Redis at {self.address} has been closed")

    # ------------------------------------------------------------------ other connections

    def blocking(self) -> BlockingConnection:
        """Return a connection for blocking reads; its owner closes it."""
        options = self._async_options(self.timeout_s)

        async def connect() -> Any:
            connection = make_connection(options)
            await connection.connect()
            return connection

        return BlockingConnection(connect, self.error, self._current_epoch, self.timeout_s)

    async def subscribe(self, *patterns: str) -> ChannelSubscription:
        """Subscribe to channel patterns, on a separate connection. Raises StoreError."""
        return await self._subscribe("PSUBSCRIBE", patterns)

    async def subscribe_channel(self, channel: str) -> ChannelSubscription:
        """Subscribe to one channel, on a separate connection. Raises StoreError."""
        return await self._subscribe("SUBSCRIBE", (channel,))

    async def _subscribe(self, command: str, names: Sequence[str]) -> ChannelSubscription:
        connection = make_connection(self._async_options(self.timeout_s))
        subscription = ChannelSubscription(self, connection)
        await subscription.start(command, names)
        return subscription

    def sync(self, timeout_s: float) -> SyncConnection:
        """Return a connection for another thread, each step of which waits at most `timeout_s`."""
        options = parse_url(self._url, redis.connection.parse_url) | self._common(timeout_s)
        options |= {"retry": Retry(NoBackoff(), 0), "redis_connect_func": self._log_in_sync}
        return SyncConnection(self, redis.ConnectionPool(max_connections=1, **options))

    def from_thread(self, loop: asyncio.AbstractEventLoop, timeout_s: float) -> ThreadScripts:
        """Return an access to this client's connections for a thread other than that of `loop`."""
        return _EventLoopScripts(self, loop, timeout_s)

    # ------------------------------------------------------------------ how connections are made

    def _replace_connections(self) -> None:
        self._epoch += 1

    def _current_epoch(self) -> int:
        """Return the present epoch. A connection that was made in another epoch is not used again."""
        return self._epoch

    def _common(self, timeout_s: float) -> dict[str, Any]:
        return {
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "health_check_interval": 0,
            "decode_responses": False,
            "protocol": 2,
            "db": 0,
        }

    def _async_options(self, timeout_s: float) -> dict[str, Any]:
        options = parse_url(self._url, redis.asyncio.connection.parse_url) | self._common(timeout_s)
        # Each call has a `Deadline`. With a time-out of its own, redis-py would send through
        # `asyncio.wait_for`, which costs a task a command and, before Python 3.12, can suppress the caller's
        # cancellation.
        options["socket_timeout"] = None
        options["connection_class"] = watched_class(options["connection_class"])
        return options | {"retry": AsyncRetry(NoBackoff(), 0), "redis_connect_func": self._log_in}

    async def _log_in(self, connection: Any) -> None:
        """Log in, and name the connection for CLIENT LIST if that is allowed."""
        _prepare(connection)
        reader = connection._reader
        try:
            await connection.on_connect()
            if self._names_connections:
                await connection.send_command("CLIENT", "SETNAME", self._client_name)
                try:
                    await connection.read_response()
                except redis_errors.ResponseError as exc:
                    self._check_unnamed(exc)
                self._has_logged_in = True
        except FAILURES as exc:
            if reply(exc) is not None:
                self._log_refusal(exc)
                raise
            # At its limit of connections, and in protected mode, a server sends an error and closes the new
            # connection. If a write fails first, the error is still in the reader's buffer.
            line, end, _ = bytes(reader._buffer).partition(b"\r\n")
            if end and line[:1] == b"-":
                error = ErrorReply(line[1:].decode("utf-8", "replace"))
                self._log_refusal(error)
                raise error from exc
            if self._has_logged_in or not self._names_connections or not is_cut_off(exc):
                raise
            # Some proxies close a connection upon a command that they do not know.
            self._names_connections = False
            try:
                await connection.disconnect(nowait=True)
                await connection.connect()
            except BaseException:
                self._names_connections = True
                raise

    def _log_in_sync(self, connection: Any) -> None:
        """As `_log_in`, for a thread; it is never the first connection to a server."""
        _prepare(connection)
        try:
            connection.on_connect()
            if self._names_connections:
                connection.send_command("CLIENT", "SETNAME", self._client_name)
                try:
                    connection.read_response()
                except redis_errors.ResponseError as exc:
                    self._check_unnamed(exc)
        except FAILURES as exc:
            self._log_refusal(exc)
            raise
        self._has_logged_in = True

    def _check_unnamed(self, exc: redis_errors.ResponseError) -> None:
        """Check that the server refuses only to name a connection. Raises `exc` otherwise."""
        if not is_about_command(exc):
            raise exc
        logger.debug("CLIENT SETNAME is not allowed at %s", self.address)

    def _log_refusal(self, exc: BaseException) -> None:
        """Warn that a server refuses a new connection after it accepted others.

        Open connections may work for long and hide the refusal. Safe from any thread."""
        if not self._has_logged_in or reply(exc) is None:
            return
        text = str(store_error(exc, self.address))
        remedy = ROTATED_REMEDY if is_about_password(exc) else ""
        _refusals.log("a new connection is refused: %s%s", text, remedy, kind=text)

    async def named(self, error: StoreError, keys: Sequence[Argument]) -> StoreError:
        """Return the error; if a key of a wrong type caused it, with that key and the command that repairs
        it."""
        if error.answer_code != "WRONGTYPE":
            return error
        found: dict[str, str] = {}
        try:
            async with Deadline(self.timeout_s):
                for key in keys[:MOST_KEYS_COUNT]:
                    kind = await self._redis.execute_command("TYPE", key)
                    found[_text(key)] = _text(kind)
        except FAILURES:  # TYPE may not be allowed: the error stays as it is
            return error
        described = describe_wrong_types(found)
        if not described:
            return error
        named = type(error)(f"Redis at {self.address}: {described}")
        named.answered, named.answer_code = error.answered, error.answer_code
        return named

    def error(self, exc: BaseException, command: Argument = "") -> StoreError:
        """Return the error for a failed exchange with this server; safe from any thread. `command` is its
        name.

        If this is not, or no longer, the right server, all connections are replaced before their next use:
        only a new connection resolves the name again, and so finds the new primary.
        """
        if is_wrong_server(exc) and time.monotonic() - self._left_at >= RECONNECT_AGAIN_S:
            self._left_at = time.monotonic()
            self._replace_connections()
        scheme: UntestedScheme = "tls" if self._url.startswith("rediss:") else "plain"
        untested = None if self._has_logged_in else scheme
        error = store_error(exc, self.address, untested=untested, command=str(command))
        text = reply(exc)
        error.answered = text is not None
        error.answer_code = (text or "").partition(" ")[0]
        error.refuses_writes = error.answer_code in WRITE_REFUSALS
        return error


def _text(value: Argument) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


class ChannelSubscription:
    """Messages of subscribed channels, from one connection that is never replaced silently."""

    def __init__(self, client: RedisClient, connection: Any) -> None:
        self._client = client
        self._connection = connection
        self._made_in = client._current_epoch()

    async def start(self, command: str, names: Sequence[str]) -> None:
        """Connect and subscribe. Raises StoreError."""
        try:
            async with Deadline(self._client.timeout_s):
                await self._connection.connect()
                await self._connection.send_command(command, *names)
                for _ in names:
                    await self._connection.read_response()
        except FAILURES as exc:
            await self.aclose()
            raise self._client.error(exc) from exc

    async def next_message(self, timeout_s: float) -> tuple[bytes, bytes] | None:
        """Return the next (channel, payload); None if there is none within `timeout_s`.

        A silent connection is checked by PING, and a message on its way is awaited. Raises StoreError when
        the connection is gone: subscribe again, and expect a gap.
        """
        if self._made_in != self._client._current_epoch():
            await self.aclose()
            raise StoreUnavailable(
                f"Redis at {self._client.address} is no longer the primary: subscribe again"
            )
        try:
            reply = await self._connection.read_response(timeout=timeout_s)
            if reply is None:
                try:
                    async with Deadline(self._client.timeout_s):
                        await self._connection.send_command("PING", check_health=False)
                        reply = await self._connection.read_response()
                except redis_errors.ResponseError as exc:
                    if "MISCONF" not in str(self._client.error(exc)):
                        raise
                    return None  # a server that cannot save refuses even PING: it is up
        except FAILURES as exc:
            await self.aclose()
            raise self._client.error(exc) from exc
        kind, *_ = reply
        return (reply[-2], reply[-1]) if kind in (b"message", b"pmessage") else None

    async def aclose(self) -> None:
        """Drop the connection without waiting for the server."""
        await self._connection.disconnect(nowait=True)


class ThreadScripts(Protocol):
    """Blocking calls of scripts, for a thread."""

    def script(self, script: Script, keys: Sequence[Argument], args: Sequence[Argument] = ()) -> Any:
        """As `RedisClient.script`."""
        ...


class _EventLoopScripts:
    """Runs scripts from a thread over a client's event loop; each call waits at most `timeout_s`."""

    def __init__(self, client: RedisClient, loop: asyncio.AbstractEventLoop, timeout_s: float) -> None:
        self._client = client
        self._loop = loop
        self._timeout_s = timeout_s

    def script(self, script: Script, keys: Sequence[Argument], args: Sequence[Argument] = ()) -> Any:
        """As `RedisClient.script`. Raises StoreUnavailable, too, if the event loop hangs or has ended."""
        work = self._client.script(script, keys, args)
        try:
            answer = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError as exc:
            work.close()
            raise StoreUnavailable("the event loop has ended") from exc
        try:
            return answer.result(self._timeout_s)
        except (TimeoutError, CancelledError) as exc:
            answer.cancel()
            raise StoreUnavailable(f"Redis at {self._client.address} does not answer in time") from exc


class SyncConnection:
    """A connection for one thread. `close` may be called from any thread once that thread has ended."""

    def __init__(self, client: RedisClient, pool: redis.ConnectionPool) -> None:
        self._client = client
        self._pool = pool
        self._redis = _raw(redis.Redis(connection_pool=pool))
        self._made_in = client._current_epoch()

    def script(self, script: Script, keys: Sequence[Argument], args: Sequence[Argument] = ()) -> Any:
        """As `RedisClient.script`. After a connection error the next call reconnects."""
        if self._made_in != (epoch := self._client._current_epoch()):
            self._pool.disconnect()
            self._made_in = epoch
        client = self._client
        try:
            if client._sends_hashes:
                try:
                    return self._redis.execute_command("EVALSHA", script.sha, len(keys), *keys, *args)
                except redis_errors.ResponseError as exc:
                    if not client._wants_source(exc):
                        raise
            return self._redis.execute_command("EVAL", script.source, len(keys), *keys, *args)
        except FAILURES as exc:
            raise self._failed(exc, "EVALSHA or EVAL") from exc

    def connect(self) -> None:
        """Connect now, not at the first script. Raises StoreError."""
        try:
            self._redis.execute_command("PING")
        except FAILURES as exc:
            raise self._failed(exc) from exc

    def _failed(self, exc: BaseException, command: str = "") -> StoreError:
        """Return the error for a failure. The connection is kept if the server answered with that error."""
        error = self._client.error(exc, command)
        if not error.answered:
            self._pool.disconnect()
        return error

    def abort(self) -> None:
        """Make the exchange under way fail. For a thread other than the connection's."""
        under_way: Any = tuple(self._pool._in_use_connections)
        for connection in under_way:
            if (open_socket := connection._sock) is not None:
                with suppress(OSError):
                    open_socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection. Never raises."""
        self._pool.disconnect()


# ---------------------------------------------------------------------- redis-py's edges


class _Pool(redis.asyncio.BlockingConnectionPool):
    """A pool that uses only connections of the present epoch, and closes idle ones of earlier epochs."""

    epoch: Callable[[], int]
    _swept_in = 0

    def sweep(self) -> None:
        """Close the idle connections."""
        idle: Any
        for idle in self._available_connections:
            idle._close()

    def close(self) -> None:
        """Close every connection without waiting. A `disconnect` that is cancelled leaves them open."""
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


def _prepare(connection: Any) -> None:
    """Set up a connection before its login."""
    keep_replies(connection)
    # No CLIENT SETINFO: it is not needed here, and some proxies close a connection upon it.
    connection.driver_info = connection.lib_name = connection.lib_version = None


def _raw(client: Any) -> Any:
    """Make a client return replies as the protocol has them: those of redis-py differ between its
    releases."""
    client.response_callbacks.clear()
    return client


def _parse_info(reply: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in reply.decode("utf-8", "replace").splitlines())
    return {name: value for name, colon, value in lines if colon}
