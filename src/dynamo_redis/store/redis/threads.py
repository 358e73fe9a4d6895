"""Access to Redis from threads: a connection of a thread's own, or those of an event loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import Any, Protocol

import redis
from redis import exceptions as redis_errors

from dynamo_redis.errors import StoreError, StoreUnavailable
from dynamo_redis.store.redis.blocking import Argument
from dynamo_redis.store.redis.pool import with_raw_replies
from dynamo_redis.store.redis.server_errors import FAILURES, reply
from dynamo_redis.store.redis.server_state import ServerState
from dynamo_redis.store.scripts import Script


def do_nothing() -> None:
    """Do nothing."""


class ThreadScripts(Protocol):
    """Blocking calls of scripts, for a thread."""

    def script(self, script: Script, keys: Sequence[Argument], args: Sequence[Argument] = ()) -> Any:
        """As `RedisClient.script`."""
        ...


class ThreadConnection(ThreadScripts, Protocol):
    """A connection for one thread. `close` may be called from any thread once that thread has ended."""

    def connect(self) -> None:
        """Connect now, not at the first script. Raises StoreError."""
        ...

    def abort(self) -> None:
        """Make the exchange under way fail. For a thread other than the connection's."""
        ...

    def close(self) -> None:
        """Close the connection. Never raises."""
        ...


class EventLoopScripts:
    """Runs scripts from a thread over a client's event loop; each call waits at most `timeout_s`.

    `run` is `RedisClient.script`."""

    def __init__(
        self,
        run: Callable[..., Coroutine[Any, Any, Any]],
        address: Callable[[], str],
        loop: asyncio.AbstractEventLoop,
        timeout_s: float,
    ) -> None:
        self._run = run
        self._address = address
        self._loop = loop
        self._timeout_s = timeout_s

    def script(self, script: Script, keys: Sequence[Argument], args: Sequence[Argument] = ()) -> Any:
        """As `RedisClient.script`. Raises StoreUnavailable, too, if the event loop hangs or has ended."""
        work = self._run(script, keys, args)
        try:
            answer = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError as exc:
            work.close()
            raise StoreUnavailable("the event loop has ended") from exc
        try:
            return answer.result(self._timeout_s)
        except (TimeoutError, CancelledError) as exc:
            answer.cancel()
            raise StoreUnavailable(f"Redis at {self._address()} does not answer in time") from exc


class SyncConnection:
    """A connection for one thread. `close` may be called from any thread once that thread has ended."""

    def __init__(
        self, server: ServerState, pool: redis.ConnectionPool, on_move: Callable[[], None] = do_nothing
    ) -> None:
        self._on_move = on_move
        self._server = server
        self._pool = pool
        self._redis = with_raw_replies(redis.Redis(connection_pool=pool))
        self._made_in = server.epoch()
        self._login_version = server.login_version

    def script(self, script: Script, keys: Sequence[Argument], args: Sequence[Argument] = ()) -> Any:
        """As `RedisClient.script`. After a connection error the next call reconnects."""
        if self._made_in != (epoch := self._server.epoch()):
            self._pool.disconnect()
            self._made_in = epoch
        server = self._server
        try:
            self._log_in_again()
            if server.sends_hashes:
                try:
                    return self._redis.execute_command("EVALSHA", script.sha, len(keys), *keys, *args)
                except redis_errors.ResponseError as exc:
                    if not server.wants_source(exc):
                        raise
            return self._redis.execute_command("EVAL", script.source, len(keys), *keys, *args)
        except FAILURES as exc:
            raise self._failed(exc, "EVALSHA or EVAL") from exc

    def script_asking(self, script: Script, keys: Sequence[Argument], args: Sequence[Argument] = ()) -> Any:
        """As `script`, at a node of a cluster to which the keys' slot is moving."""
        try:
            self._log_in_again()
            self._redis.execute_command("ASKING")
            return self._redis.execute_command("EVAL", script.source, len(keys), *keys, *args)
        except FAILURES as exc:
            raise self._failed(exc, "EVAL") from exc

    def _log_in_again(self) -> None:
        """Send AUTH if user or password have changed. A refusal leaves the connection as it was."""
        version = self._server.login_version
        if self._login_version == version:
            return
        connection: Any = self._pool.get_connection()
        try:
            connection.send_command("AUTH", *self._server.login_words, check_health=False)
            connection.read_response(disconnect_on_error=False)
        except redis_errors.RedisError as exc:
            if reply(exc) is None:
                raise
            self._server.note_refusal(exc)
        finally:
            self._pool.release(connection)
        self._login_version = version

    def connect(self) -> None:
        """Connect now, not at the first script. Raises StoreError."""
        try:
            self._redis.execute_command("PING")
        except FAILURES as exc:
            raise self._failed(exc) from exc

    def _failed(self, exc: BaseException, command: str = "") -> StoreError:
        """Return the error for a failure. The connection is kept if the server answered with that error."""
        error = self._server.error(exc, command)
        if not error.answered:
            self._pool.disconnect()
        return error

    def abort(self) -> None:
        """End the connection, and make an exchange under way fail. For other threads than its own."""
        open_connections: Any = (*self._pool._in_use_connections, *self._pool._available_connections)
        for connection in open_connections:
            if (open_socket := connection._sock) is not None:
                with suppress(OSError):
                    open_socket.shutdown(socket.SHUT_RDWR)

    def leave_server(self) -> None:
        """End the connection, since a new one leads to another server. From any other thread."""
        self.abort()
        self._on_move()

    def close(self) -> None:
        """Close the connection. Never raises."""
        self._pool.disconnect()
