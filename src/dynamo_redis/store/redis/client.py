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
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from threading import Lock
from typing import Any, Final
from weakref import WeakSet

import redis
import redis.asyncio
from redis import exceptions as redis_errors
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from dynamo_redis.config import RedisLogin
from dynamo_redis.errors import StoreError, StoreRefused, StoreUnavailable
from dynamo_redis.histogram import Histogram
from dynamo_redis.store.redis.base import Sending
from dynamo_redis.store.redis.blocking import Argument as Argument
from dynamo_redis.store.redis.blocking import BlockingConnection, OneServerSending
from dynamo_redis.store.redis.deadline import Deadline
from dynamo_redis.store.redis.key_types import MOST_KEYS_COUNT, describe_wrong_types
from dynamo_redis.store.redis.login import Login
from dynamo_redis.store.redis.pool import EpochPool, with_raw_replies
from dynamo_redis.store.redis.route import Route, open_route, route_options, route_thread_options
from dynamo_redis.store.redis.server_errors import FAILURES
from dynamo_redis.store.redis.server_state import ServerState
from dynamo_redis.store.redis.subscription import ChannelSubscription
from dynamo_redis.store.redis.threads import EventLoopScripts, SyncConnection, ThreadScripts, do_nothing
from dynamo_redis.store.redis.url import make_connection, parse_server_url
from dynamo_redis.store.scripts import Script

logger = logging.getLogger(__name__)

TRIP_LIMITS_S: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
"""Upper limits of the durations of commands that are counted together."""

MINIMUM_VERSION: Final = (6, 2)
MAX_CONNECTIONS_COUNT: Final = 32
"""Commands in flight at once; further ones wait for a connection, within their deadline."""
CLOSE_TIMEOUT_S: Final = 1.0


class RedisClient:
    """A process's client of one Redis. Connects at the first command; close it with `aclose`.

    `timeout_s` bounds each call, connecting included. While an answer arrives, it counts from the last byte
    (`deadline.Deadline`). Cancelling a call is safe: its connection is dropped. Then it is unknown whether
    the server ran the command. Raises ConfigError for a URL that cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        client_name: str = "dynamo-redis",
        route: Route | None = None,
        login: RedisLogin | None = None,
    ) -> None:
        """`route`: leads to the server, instead of the route that the URL describes. Released at `aclose`.
        `login`: user and password that do not stand in the URL."""
        self.timeout_s = timeout_s
        self._url = parse_server_url(url, login)
        self._credentials = self._url.credentials()
        self._route = open_route(self._url) if route is None else route
        self._server = ServerState(self._route, is_tls=self._url.is_tls, credentials=self._credentials)
        self._login = Login(self._server, client_name)
        options = self._url.options()
        # Each call has a `Deadline`. With a time-out of its own, redis-py would send through
        # `asyncio.wait_for`, which costs a task a command and, before Python 3.12, can suppress the caller's
        # cancellation.
        self._options = route_options(options | _common(timeout_s), self._route) | {
            "socket_timeout": None,
            "retry": AsyncRetry(NoBackoff(), 0),
            "redis_connect_func": self._login.log_in,
        }
        self._pool = EpochPool(max_connections=MAX_CONNECTIONS_COUNT, timeout=timeout_s, **self._options)
        self._pool.epoch = self._server.epoch
        self._pool.renew = self._login.renew
        self._redis = with_raw_replies(redis.asyncio.Redis(connection_pool=self._pool))
        self._others: WeakSet[BlockingConnection | ChannelSubscription] = WeakSet()
        self._of_threads: WeakSet[SyncConnection] = WeakSet()
        self._of_threads_lock = Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._move = asyncio.Event()
        self._route.add_listener(self._on_move)
        self.trips_s = Histogram(TRIP_LIMITS_S)
        """The durations of commands, scripts and pipelines that were answered."""
        self._closed = False

    def __repr__(self) -> str:
        return f"<RedisClient {self.address}>"

    @property
    def address(self) -> str:
        """The server, for messages."""
        return self._server.address

    @property
    def user(self) -> str:
        """The user at the server, as far as it is known."""
        return self._url.user

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

    async def execute(self, *command: Argument, beside: Argument | None = None) -> Any:
        """As `StoreClient.execute`."""
        del beside  # there is one server
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
                if self._server.sends_hashes:
                    try:
                        return await self._redis.execute_command("EVALSHA", script.sha, *rest)
                    except redis_errors.ResponseError as exc:
                        if not self._server.wants_source(exc):
                            raise
                return await self._redis.execute_command("EVAL", script.source, *rest)
        except FAILURES as exc:
            raise await self.named(self.error(exc, "EVALSHA or EVAL"), keys) from exc

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

    async def each(self, commands: Iterable[Sequence[Argument]]) -> list[Any]:
        """As `pipeline`, without a transaction; the StoreError of a command that is refused is its answer."""
        self._check_open()
        pipe = self._redis.pipeline(transaction=False)
        for command in commands:
            pipe.execute_command(*command)
        try:
            async with Deadline(self.timeout_s, self.trips_s):
                answers = await pipe.execute(raise_on_error=False)
        except FAILURES as exc:
            raise self.error(exc) from exc
        return [self._caused(one) if isinstance(one, Exception) else one for one in answers]

    def _caused(self, exc: Exception) -> StoreError:
        error = self.error(exc)
        error.__cause__ = exc
        return error

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
        if not self._closed:
            self._closed = True
            self._route.remove_listener(self._on_move)
            self._route.release()
            if self._credentials is not None:
                self._credentials.release()
        self._pool.close()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._redis.aclose()
                await self._pool.disconnect()
        except FAILURES as exc:
            logger.debug("closing a connection: %s", exc)

    def disconnect(self) -> None:
        """Close idle connections now, and others before their next use. For the event loop."""
        self._server.replace_connections()
        self._pool.sweep()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreUnavailable(f"the connection to Redis at {self.address} has been closed")
        if self._loop is None:
            self._loop = asyncio.get_running_loop()

    # ------------------------------------------------------------------ when the server is another one

    async def pause(self, wait_s: float) -> None:
        """Wait before another attempt; end early if new connections lead to another server meanwhile."""
        move = self._move
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await move.wait()

    def _on_move(self) -> None:
        """Close all connections, since new ones lead to another server. Called from any thread."""
        with self._of_threads_lock:
            of_threads = tuple(self._of_threads)
        for connection in of_threads:
            connection.leave_server()
        if self._loop is not None:
            with suppress(RuntimeError):  # the event loop is closed
                self._loop.call_soon_threadsafe(self._leave_server)

    def _leave_server(self) -> None:
        self._pool.close()
        for other in tuple(self._others):
            other.abort()
        self._move.set()
        self._move = asyncio.Event()

    # ------------------------------------------------------------------ other connections

    def blocking(self, key: Argument = "") -> BlockingConnection:
        """Return a connection for blocking reads; its owner closes it."""
        del key  # there is one server

        async def connect() -> Any:
            self._check_open()
            connection = make_connection(self._options)
            await connection.connect()
            return connection

        made = BlockingConnection(connect, self._server, self.timeout_s)
        self._others.add(made)
        return made

    def sending(self) -> Sending:
        """As `StoreClient.sending`."""
        return OneServerSending(self.blocking())

    async def subscribe(self, pattern: str, *, beside: Argument = "") -> ChannelSubscription:
        """Subscribe to a channel pattern, on a separate connection. Raises StoreError."""
        del beside  # there is one server
        return await self._subscribe("PSUBSCRIBE", (pattern,))

    async def subscribe_channel(self, channel: str) -> ChannelSubscription:
        """Subscribe to one channel, on a separate connection. Raises StoreError."""
        return await self._subscribe("SUBSCRIBE", (channel,))

    async def _subscribe(self, command: str, names: Sequence[str]) -> ChannelSubscription:
        self._check_open()
        subscription = ChannelSubscription(
            self._server, lambda: make_connection(self._options), self.timeout_s
        )
        self._others.add(subscription)
        await subscription.start(command, names)
        return subscription

    def sync(
        self, timeout_s: float, *, key: Argument = "", on_move: Callable[[], None] = do_nothing
    ) -> SyncConnection:
        """As `StoreClient.sync`."""
        del key  # there is one server
        options = route_thread_options(self._url.thread_options() | _common(timeout_s), self._route)
        options |= {"retry": Retry(NoBackoff(), 0), "redis_connect_func": self._login.log_in_from_thread}
        pool = redis.ConnectionPool(max_connections=1, **options)
        made = SyncConnection(self._server, pool, on_move)
        with self._of_threads_lock:
            self._of_threads.add(made)
        return made

    def from_thread(self, loop: asyncio.AbstractEventLoop, timeout_s: float) -> ThreadScripts:
        """Return an access to this client's connections for a thread other than that of `loop`."""
        return EventLoopScripts(self.script, lambda: self.address, loop, timeout_s)

    # ------------------------------------------------------------------ errors

    def error(self, exc: BaseException, command: Argument = "") -> StoreError:
        """As `ServerState.error`."""
        return self._server.error(exc, command)

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


def _common(timeout_s: float) -> dict[str, Any]:
    """Return the options of all kinds of connection."""
    return {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "health_check_interval": 0,
        "decode_responses": False,
        "protocol": 2,
        "db": 0,
    }


def _text(value: Argument) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def _parse_info(reply: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in reply.decode("utf-8", "replace").splitlines())
    return {name: value for name, colon, value in lines if colon}
