"""The first commands of each new connection: login, name, and a check of the server's role.

The role is checked where the address comes from a third party, such as a Sentinel, which may be late: a
replica would refuse writes, and a reader of it would miss them.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from redis import exceptions as redis_errors

from dynamo_redis.rate_limited_log import RateLimitedLog
from dynamo_redis.store.redis.server_errors import (
    FAILURES,
    ErrorReply,
    RouteError,
    drop,
    is_about_command,
    is_about_password,
    is_cut_off,
    prepare,
    reply,
)
from dynamo_redis.store.redis.server_state import ServerState

logger = logging.getLogger(__name__)

REFUSAL_REPEATED_S: Final = 60.0
"""Shortest time between two log lines about new connections that are refused for the same reason."""
ROTATED_REMEDY: Final = (
    "; open connections go on until they break: change DYN_REDIS_URL and restart this process, or use"
    " DYN_REDIS_PASSWORD_FILE, which needs no restart"
)

_refusals: Final = RateLimitedLog(logger, pause_s=REFUSAL_REPEATED_S)
"""Shared by all clients of this process, since each would log the same."""


class Login:
    """Sets up the new connections of a client. `client_name` is shown by CLIENT LIST if that is allowed."""

    def __init__(self, server: ServerState, client_name: str) -> None:
        self._server = server
        self._client_name = client_name

    async def log_in(self, connection: Any) -> None:
        """Log in, and name the connection. Raises one of FAILURES."""
        prepare(connection)
        reader = connection._reader
        server = self._server
        try:
            if not await self._authenticate(connection):
                return
            if server.names_connections:
                await connection.send_command("CLIENT", "SETNAME", self._client_name)
                try:
                    await connection.read_response()
                except redis_errors.ResponseError as exc:
                    self._check_unnamed(exc)
                server.has_logged_in = True
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
            if server.has_logged_in or not server.names_connections or not is_cut_off(exc):
                raise
            # Some proxies close a connection upon a command that they do not know.
            server.names_connections = False
            try:
                await connection.disconnect(nowait=True)
                await connection.connect()
            except BaseException:
                server.names_connections = True
                raise
            return
        if server.route.needs_primary:
            await connection.send_command("ROLE")
            try:
                self._check_role(connection, await connection.read_response())
            except redis_errors.ResponseError as exc:
                self._check_role_unknown(exc)

    async def _authenticate(self, connection: Any) -> bool:
        """Send user and password. If they are refused and there are newer ones now, connect again with those,
        and return False: the connection is set up."""
        credentials = self._server.credentials
        connection.login_version = 0
        if credentials is None:
            await connection.on_connect()
            return True
        await credentials.current()
        connection.login_version = version = credentials.version
        try:
            await connection.on_connect()
        except redis_errors.RedisError as exc:
            if not is_about_password(exc) or not await credentials.renewed(version):
                raise
            await connection.disconnect(nowait=True)
            await connection.connect()
            return False
        return True

    def _authenticate_in_thread(self, connection: Any) -> bool:
        """As `_authenticate`, for a thread."""
        credentials = self._server.credentials
        if credentials is None:
            connection.on_connect()
            return True
        credentials.current_in_thread()
        version = credentials.version
        try:
            connection.on_connect()
        except redis_errors.RedisError as exc:
            if not is_about_password(exc) or not credentials.renewed_in_thread(version):
                raise
            connection.disconnect()
            connection.connect()
            return False
        return True

    async def renew(self, connection: Any) -> None:
        """Log an open connection of the pool in again if user or password have changed. Raises one of
        FAILURES; then the connection is closed.

        A refusal leaves it logged in as before."""
        version = self._server.login_version
        if connection.login_version == version:
            return
        connection.login_version = version
        try:
            await connection.send_command("AUTH", *self._server.login_words, check_health=False)
            await connection.read_response(disconnect_on_error=False)
        except BaseException as exc:
            if reply(exc) is None:
                drop(connection)  # the answer would be left unread
                raise
            self._server.note_refusal(exc)

    def log_in_from_thread(self, connection: Any) -> None:
        """As `log_in`, for a thread; it is never the first connection to a server."""
        prepare(connection)
        try:
            if not self._authenticate_in_thread(connection):
                return
            if self._server.names_connections:
                connection.send_command("CLIENT", "SETNAME", self._client_name)
                try:
                    connection.read_response()
                except redis_errors.ResponseError as exc:
                    self._check_unnamed(exc)
        except FAILURES as exc:
            self._log_refusal(exc)
            raise
        if self._server.route.needs_primary:
            connection.send_command("ROLE")
            try:
                self._check_role(connection, connection.read_response())
            except redis_errors.ResponseError as exc:
                self._check_role_unknown(exc)
        self._server.has_logged_in = True

    def _check_role(self, connection: Any, role: Any) -> None:
        """Raise RouteError for a server that is no primary."""
        if role[0] != b"master":
            self._server.route.failed((connection.host, connection.port))
            raise RouteError(
                f"Redis at {self._server.address} is a replica, and no other primary is known yet"
            )

    def _check_role_unknown(self, exc: redis_errors.ResponseError) -> None:
        """Check that the server refuses only to tell its role. Raises `exc` otherwise."""
        if not is_about_command(exc):
            raise exc
        logger.debug("ROLE is not allowed at %s, a demoted primary is noticed later", self._server.address)

    def _check_unnamed(self, exc: redis_errors.ResponseError) -> None:
        """Check that the server refuses only to name a connection. Raises `exc` otherwise."""
        if not is_about_command(exc):
            raise exc
        logger.debug("CLIENT SETNAME is not allowed at %s", self._server.address)

    def _log_refusal(self, exc: BaseException) -> None:
        """Warn that a server refuses a new connection after it accepted others.

        Open connections may work for long and hide the refusal. Safe from any thread."""
        if not self._server.has_logged_in or reply(exc) is None:
            return
        text = str(self._server.error(exc))
        is_fixed = self._server.credentials is None
        remedy = ROTATED_REMEDY if is_fixed and is_about_password(exc) else ""
        _refusals.log("a new connection is refused: %s%s", text, remedy, kind=text)
