"""The facts about a server that all connections of a client share, and the errors for failed exchanges."""

from __future__ import annotations

from redis import exceptions as redis_errors

from dynamo_redis.errors import StoreError
from dynamo_redis.store.redis.blocking import Argument
from dynamo_redis.store.redis.route import Route
from dynamo_redis.store.redis.server_errors import (
    WRITE_REFUSALS,
    UntestedScheme,
    does_not_take,
    is_wrong_server,
    reply,
    store_error,
)


class ServerState:
    """Safe from any thread.

    Attributes:
        route: Leads to the server.
        has_logged_in: A connection has been accepted before.
        names_connections: The server allows CLIENT SETNAME, as far as is known.
        sends_hashes: The server allows EVALSHA, as far as is known.
    """

    def __init__(self, route: Route, *, is_tls: bool) -> None:
        self.route = route
        self.has_logged_in = False
        self.names_connections = True
        self.sends_hashes = True
        self._untested: UntestedScheme = "tls" if is_tls else "plain"
        self._replaced_count = 0

    @property
    def address(self) -> str:
        """The server, for messages."""
        return self.route.address

    def epoch(self) -> int:
        """Return the present epoch. A connection that was made in another epoch is not used again."""
        return self._replaced_count + self.route.epoch

    def replace_connections(self) -> None:
        """Begin another epoch."""
        self._replaced_count += 1

    def wants_source(self, exc: redis_errors.ResponseError) -> bool:
        """Return whether EVALSHA failed since the script, or the command itself, is not known."""
        if does_not_take(exc, "EVALSHA"):
            self.sends_hashes = False  # a proxy, or a user without the right: EVAL is used from now on
            return True
        return isinstance(exc, redis_errors.NoScriptError)

    def error(self, exc: BaseException, command: Argument = "") -> StoreError:
        """Return the error for a failed exchange; `command` is its name.

        If this is not, or no longer, the right server, all connections are replaced before their next use:
        only a new connection asks the route again, and so finds the new primary.
        """
        if is_wrong_server(exc):
            self.route.leave()
        untested = None if self.has_logged_in else self._untested
        error = store_error(exc, self.address, untested=untested, command=str(command))
        text = reply(exc)
        error.answered = text is not None
        error.answer_code = (text or "").partition(" ")[0]
        error.refuses_writes = error.answer_code in WRITE_REFUSALS
        return error
