"""The facts about a server that all connections of a client share, and the errors for failed exchanges."""

from __future__ import annotations

import logging
from typing import Final

from redis import exceptions as redis_errors

from dynamo_redis.errors import StoreError, StoreUnavailable
from dynamo_redis.rate_limited_log import RateLimitedLog
from dynamo_redis.store.redis.credentials import CredentialSource
from dynamo_redis.store.redis.route import Route
from dynamo_redis.store.redis.server_errors import (
    WRITE_REFUSALS,
    UntestedScheme,
    does_not_take,
    is_about_password,
    is_wrong_server,
    reply,
    store_error,
)

_refusals: Final = RateLimitedLog(logging.getLogger(__name__), pause_s=60.0)


class ServerState:
    """Safe from any thread.

    Attributes:
        route: Leads to the server.
        credentials: The source of user and password, if they change.
        has_logged_in: A connection has been accepted before.
        names_connections: The server allows CLIENT SETNAME, as far as is known.
        sends_hashes: The server allows EVALSHA, as far as is known.
    """

    def __init__(self, route: Route, *, is_tls: bool, credentials: CredentialSource | None = None) -> None:
        self.route = route
        self.credentials = credentials
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

    @property
    def login_version(self) -> int:
        """The version of the credentials; 0 if they do not change."""
        return 0 if self.credentials is None else self.credentials.version

    @property
    def login_words(self) -> tuple[str, ...]:
        """The present arguments of AUTH."""
        known = None if self.credentials is None else self.credentials.known
        return () if known is None else known.words

    def note_refusal(self, exc: BaseException) -> None:
        """Note that the server refuses the present credentials for an open connection, which goes on with its
        earlier ones."""
        text = str(self.error(exc))
        _refusals.log("an open connection keeps its earlier login: %s", text, kind=text)

    def replace_connections(self) -> None:
        """Begin another epoch."""
        self._replaced_count += 1

    def wants_source(self, exc: redis_errors.ResponseError) -> bool:
        """Return whether EVALSHA failed since the script, or the command itself, is not known."""
        if does_not_take(exc, "EVALSHA"):
            self.sends_hashes = False  # a proxy, or a user without the right: EVAL is used from now on
            return True
        return isinstance(exc, redis_errors.NoScriptError)

    def error(self, exc: BaseException, command: bytes | str | float = "") -> StoreError:
        """Return the error for a failed exchange; `command` is its name.

        If this is not, or no longer, the right server, all connections are replaced before their next use:
        only a new connection asks the route again, and so finds the new primary.
        """
        if is_wrong_server(exc):
            self.route.leave()
        untested = None if self.has_logged_in else self._untested
        error = store_error(exc, self.address, untested=untested, command=str(command))
        text = reply(exc)
        if self.credentials is not None and is_about_password(exc):
            error = StoreUnavailable(self._refusal(text or ""))
        error.answered = text is not None
        error.answer_code = (text or "").partition(" ")[0]
        error.refuses_writes = error.answer_code in WRITE_REFUSALS
        return error

    def _refusal(self, text: str) -> str:
        """Return the message for refused credentials that are read again."""
        name = "" if self.credentials is None else self.credentials.name
        said = text.partition(". ")[0]
        what = f"the user name or password of {name}, which is read again"
        return f"Redis at {self.address} refuses {what} ({said})"
