"""Meanings of failed exchanges with a server: one line each, without a password.

There are three kinds of failure: no answer (StoreUnavailable, it may pass), an error from Redis
(`ERROR_MEANINGS` explains each), and an answer that does not come from Redis or not over the expected TLS.

redis-py removes the code from some errors and leaves it on others. So its parsers are changed to keep each
error as the server sent it (`prepare`), and only that text is used.
"""

from __future__ import annotations

import errno
import re
import ssl
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar, cast

from redis import exceptions as redis_errors

from dynamo_redis.errors import StoreError, StoreRefused, StoreUnavailable, StreamLost

# The TimeoutError of a deadline is an OSError; uvloop raises RuntimeError on a transport that the peer has
# closed.
FAILURES: Final = (redis_errors.RedisError, OSError, RuntimeError)
"""Exceptions that redis-py and the event loop raise for a failed exchange."""

_E = TypeVar("_E", bound=BaseException)

UntestedScheme = Literal["plain", "tls"]
"""The scheme of the URL, while the server has never answered: it may expect the other scheme."""


@dataclass(frozen=True, slots=True)
class ErrorMeaning:
    """The meaning of an error that a server sends.

    `kind`: StoreUnavailable is worth another attempt, StoreRefused needs an operator. `leave`: this is not,
    or no longer, the right server, so all connections are replaced, which resolves its name again. `meaning`
    follows "Redis at ADDRESS"; it names the remedy if there is one.
    """

    kind: type[StoreError]
    meaning: str
    leave: bool = False


_NO_PASSWORD: Final = ErrorMeaning(
    StoreRefused,
    "needs a password: set DYN_REDIS_URL to redis://[user]:password@host:port",
    leave=True,
)
_WRONG_PASSWORD: Final = ErrorMeaning(StoreRefused, "refuses the user name or password of DYN_REDIS_URL")
_NEEDLESS_PASSWORD: Final = ErrorMeaning(
    StoreRefused, "has no password, but DYN_REDIS_URL gives one: leave it out"
)
_DENIED: Final = ErrorMeaning(
    StoreRefused,
    "does not permit this user to do that (ACL): `dynamo-redis acl` prints the rules that it needs, see"
    " docs/security.md",
)
_CREDENTIALS: Final = frozenset({_NO_PASSWORD, _WRONG_PASSWORD, _NEEDLESS_PASSWORD})
"""Meanings of the errors about a user name or password."""
_TOO_MANY: Final = ErrorMeaning(
    StoreUnavailable,
    "has as many connections as it allows: raise its maxclients, or find out which are needless",
)
_UNKNOWN_COMMAND: Final = ErrorMeaning(
    StoreRefused, "does not know a command that is needed: is it a proxy, or was the command renamed?"
)
_NO_SERVER_BEHIND: Final = ErrorMeaning(StoreUnavailable, "is a proxy that reaches no server", leave=True)
_REFUSED: Final = ErrorMeaning(StoreRefused, "refuses a command")

ERROR_MEANINGS: Final = {
    # Not, or no longer, the server that holds our keys.
    "READONLY": ErrorMeaning(
        StoreUnavailable,
        "takes no writes, it is a read-only replica: set DYN_REDIS_URL to the primary, and restart what runs"
        " with this one",
        leave=True,
    ),
    "UNBLOCKED": ErrorMeaning(
        StoreUnavailable, "ended a waiting read, it is no longer the primary", leave=True
    ),
    "MASTERDOWN": ErrorMeaning(StoreUnavailable, "is a replica that has lost its primary", leave=True),
    "LOADING": ErrorMeaning(StoreUnavailable, "is still loading its data", leave=True),
    "CLUSTERDOWN": ErrorMeaning(StoreUnavailable, "is a node of a cluster that is down", leave=True),
    "MOVED": ErrorMeaning(
        StoreUnavailable,
        "is a cluster node that does not hold these keys: set DYN_REDIS_URL to the one that does, or a proxy",
        leave=True,
    ),
    # The server will serve again by itself.
    "ASK": ErrorMeaning(StoreUnavailable, "is a cluster node that is moving these keys to another node"),
    "TRYAGAIN": ErrorMeaning(StoreUnavailable, "is a cluster node that is moving these keys to another node"),
    "BUSY": ErrorMeaning(StoreUnavailable, "is busy running a script"),
    "NOREPLICAS": ErrorMeaning(
        StoreUnavailable,
        "takes no writes, it has too few replicas: start its replica again, or lower min-replicas-to-write",
    ),
    # An operator is needed.
    "OOM": ErrorMeaning(StoreRefused, "is out of memory: raise its maxmemory"),
    "MISCONF": ErrorMeaning(
        StoreRefused, "takes no writes because it cannot save to disk: repair its disk, or see its log"
    ),
    "NOAUTH": _NO_PASSWORD,
    "WRONGPASS": _WRONG_PASSWORD,
    "NOPERM": _DENIED,
    "DENIED": ErrorMeaning(
        StoreRefused,
        "is in protected mode, it answers only on its own machine: give it a password (requirepass), and"
        " DYN_REDIS_URL the same one",
    ),
    "WRONGTYPE": ErrorMeaning(
        StoreRefused, "holds a key that is not this program's: delete it, or choose another DYN_REDIS_PREFIX"
    ),
    "CROSSSLOT": ErrorMeaning(
        StoreRefused, "is a cluster, and the keys of a command are not all in one slot of it"
    ),
    # The stream or group of the command no longer exists.
    "NOGROUP": ErrorMeaning(StreamLost, "no longer has the event stream, or the reader's group in it"),
}
"""Meanings of error codes: the first word of an error as the server sent it."""

WRITE_REFUSALS: Final = frozenset({"READONLY", "NOREPLICAS", "OOM", "MISCONF"})
"""Codes by which a server refuses all writes for a time."""

_BY_WORDS: Final = (
    # Errors without a code of their own, by the beginning of their text.
    ("UNBLOCKED the stream key no longer exists", ERROR_MEANINGS["NOGROUP"]),
    ("ERR max number of clients", _TOO_MANY),
    ("ERR invalid password", _WRONG_PASSWORD),
    ("ERR Client sent AUTH, but no password is set", _NEEDLESS_PASSWORD),
    ("ERR AUTH <password> called without any password configured", _NEEDLESS_PASSWORD),
    ("ERR ACL failure in script", _DENIED),
    ("ERR The user executing the script can't", _DENIED),
    ("The user executing the script can't", _DENIED),
    ("ERR unknown command", _UNKNOWN_COMMAND),
    ("ERR unsupported command", _UNKNOWN_COMMAND),
    ("upstream failure", _NO_SERVER_BEHIND),
    ("no upstream host", _NO_SERVER_BEHIND),
)

_RAISED_IN_SCRIPT: Final = re.compile(
    r"ERR Error running script \(call to \w+\): (?:@?user_script: ?\d+: )+-?"
)
"""Text that Redis 6.2 puts before an error of a command that a script calls."""
_PLACE_IN_SCRIPT: Final = re.compile(r" script: (?:\w+, )?on @user_script:\d+\.$")
"""Text that later releases put after it."""
_REPLY_LENGTH: Final = 400
"""Most characters shown of an error; that of protected mode is longer."""
_ARGUMENTS: Final = re.compile(r",? with args beginning with:.*")
"""The part of an error that repeats an unknown command: it may contain a password."""

_TLS_ALERT: Final = 'got "\\x15"'
_CONNECTION_REFUSED: Final = f"[Errno {errno.ECONNREFUSED}]"
"""Found in the text if several addresses were tried: asyncio then raises a plain OSError."""
_WRONG_HOST: Final = (
    "name the host in DYN_REDIS_URL as its certificate does, or add ?ssl_check_hostname=false"
)
_WRONG_TIME: Final = "the server needs a new certificate, or a clock is wrong"
_CERTIFICATE_REMEDIES: Final = {62: _WRONG_HOST, 64: _WRONG_HOST, 9: _WRONG_TIME, 10: _WRONG_TIME}
"""Remedies for a refused certificate, by OpenSSL's numbers of X509_V_ERR_HOSTNAME_MISMATCH,
IP_ADDRESS_MISMATCH, CERT_NOT_YET_VALID and CERT_HAS_EXPIRED."""
_CUT_OFF: Final = ("reset by peer", "closed by server", "Connection lost", "Connection reset")


def store_error(
    exc: BaseException, address: str, *, untested: UntestedScheme | None = None, command: str = ""
) -> StoreError:
    """Return the error that a failed exchange with the server at `address` means to a caller.

    `untested`: set while no exchange with that server has succeeded, so that a wrong URL may be the cause.
    `command`: name of the failed command, or "".
    """
    if route := _cause(exc, RouteError):
        return (StoreRefused if route.refused else StoreUnavailable)(str(route))
    text = reply(exc)
    if text is not None:
        meaning = _meaning(text)
        # Of a known error the first sentence is enough: the others only explain it.
        shown = text if meaning is _REFUSED else text.partition(". ")[0]
        return meaning.kind(f"Redis at {address} {meaning.meaning} ({shown})")
    return (
        _not_understood(exc, address, untested)
        or _no_answer(exc, address, untested, command)
        or StoreRefused(f"Redis at {address} refuses a command: {one_line(exc)}")
    )


def is_wrong_server(exc: BaseException) -> bool:
    """Return whether the error shows that this is not, or no longer, the right server."""
    text = reply(exc)
    return text is not None and _meaning(text).leave


def is_about_password(exc: BaseException) -> bool:
    """Return whether the server refuses the user name or password, or requires one."""
    return _meaning(reply(exc) or "") in _CREDENTIALS


def is_full(exc: BaseException | None) -> bool:
    """Return whether an error was caused by the server's limit of connections."""
    while exc is not None:
        if _meaning(reply(exc) or "") is _TOO_MANY:
            return True
        exc = exc.__cause__
    return False


def does_not_take(exc: BaseException, command: str) -> bool:
    """Return whether the server, or a proxy before it, refuses a command regardless of its arguments."""
    text = reply(exc) or ""
    meaning = _meaning(text)
    return meaning is _UNKNOWN_COMMAND or (meaning is _DENIED and f"'{command.lower()}" in text)


def is_about_command(exc: BaseException) -> bool:
    """Return whether an error concerns the command, not the server or the connection."""
    return _meaning(reply(exc) or "") in (_UNKNOWN_COMMAND, _DENIED, _REFUSED)


def is_about_tls(exc: BaseException) -> bool:
    """Return whether TLS failed: the certificate is refused, or the peer does not speak it."""
    return _cause(exc, ssl.SSLError) is not None


def is_cut_off(exc: BaseException) -> bool:
    """Return whether a connection was made and then ended by the peer."""
    return any(mark in one_line(exc) for mark in _CUT_OFF)


def reply(exc: BaseException) -> str | None:
    """Return the error that a server sent, without its remarks on scripts and arguments; None without one."""
    sent = getattr(exc, "reply", None)
    if sent is None:
        return None
    text = _RAISED_IN_SCRIPT.sub("", " ".join(sent.split()), count=1)
    text = _ARGUMENTS.sub("", _PLACE_IN_SCRIPT.sub("", text))
    return text if len(text) <= _REPLY_LENGTH else f"{text[:_REPLY_LENGTH]}…"


def _meaning(text: str) -> ErrorMeaning:
    found = next((meaning for beginning, meaning in _BY_WORDS if text.startswith(beginning)), None)
    return found or ERROR_MEANINGS.get(text.partition(" ")[0], _REFUSED)


class ErrorReply(redis_errors.ResponseError):
    """An error with the complete text that the server sent."""

    def __init__(self, sent: str) -> None:
        super().__init__(sent)
        self.reply = sent


class RouteError(redis_errors.ConnectionError):
    """No server is known to connect to. `refused`: an operator is needed. Shows no password."""

    def __init__(self, text: str, *, refused: bool = False) -> None:
        super().__init__(text)
        self.refused = refused


def drop(connection: Any) -> None:
    """Close a connection of redis-py at once. With TLS, a mere close waits for the server's answer to it."""
    if connection._writer is not None:
        connection._writer.transport.abort()
    connection._close()


def drop_upon_failures(connection: Any) -> None:
    """Have redis-py drop a connection, too, where it would close it, as when a call is cancelled. Then the
    connection cannot be used again."""

    async def disconnect(*_: object, **__: object) -> None:
        drop(connection)

    connection.disconnect = disconnect


def prepare(connection: Any) -> None:
    """Set up a redis-py connection before its login: its exceptions get the server's text as `reply`."""
    # No CLIENT SETINFO: it is not needed here, and some proxies close a connection upon it.
    connection.driver_info = connection.lib_name = connection.lib_version = None
    parser = connection._parser
    parse = type(parser).parse_error

    def parse_error(response: str) -> Exception:
        try:
            error: Any = parse(response)
        except (ValueError, IndexError):  # redis-py cannot read this MOVED
            return ErrorReply(response)
        error.reply = response
        return cast("Exception", error)

    parser.parse_error = parse_error


def one_line(exc: BaseException) -> str:
    """Return an exception's message on one line, or its name if it has no message."""
    return " ".join(str(exc).split()) or type(exc).__name__


def _not_understood(exc: BaseException, address: str, untested: UntestedScheme | None) -> StoreError | None:
    """Return the error for an answer that does not come from Redis, or not from a trusted one; else None."""
    text = one_line(exc)
    if certificate := _cause(exc, ssl.SSLCertVerificationError):
        remedy = _CERTIFICATE_REMEDIES.get(
            certificate.verify_code, "add ?ssl_ca_certs=FILE to DYN_REDIS_URL for a CA of your own"
        )
        return StoreRefused(f"no TLS connection to Redis at {address}: {text} ({remedy})")
    if _cause(exc, ssl.SSLError):
        hint = ": does it speak TLS? If not, write redis://" if untested == "tls" else ""
        return StoreRefused(f"no TLS connection to Redis at {address}: {text.rstrip('.')}{hint}")
    if isinstance(exc, redis_errors.InvalidResponse):
        if _TLS_ALERT in text:
            return StoreRefused(f"what answers at {address} speaks TLS: write rediss:// in DYN_REDIS_URL")
        return StoreRefused(f"what answers at {address} is not a Redis: {text}")
    return None


def _no_answer(
    exc: BaseException, address: str, untested: UntestedScheme | None, command: str
) -> StoreError | None:
    """Return the error for a missing or incomplete answer; None for another failure."""
    text = one_line(exc)
    if isinstance(exc, TimeoutError | redis_errors.TimeoutError):
        hint = " (does it speak TLS? If not, write redis://)" if untested == "tls" else ""
        return StoreUnavailable(f"Redis at {address} does not answer in time{hint}")
    if _cause(exc, ConnectionRefusedError) or _CONNECTION_REFUSED in text:
        return StoreUnavailable(f"no Redis answers at {address} (connection refused): is it running there?")
    if address.startswith("/") and _cause(exc, FileNotFoundError):
        return StoreUnavailable(f"no Redis answers at {address} (there is no such socket): is it running?")
    if isinstance(exc, redis_errors.ConnectionError | OSError | RuntimeError):
        hint = ""
        if is_cut_off(exc):
            hint = f" (in answer to {command})" * bool(command)
            hint += " (is it TLS? Then write rediss://)" * (untested == "plain")
        return StoreUnavailable(f"no connection to Redis at {address}: {text}{hint}")
    return None


def _cause(exc: BaseException | None, kind: type[_E]) -> _E | None:
    """Return the first exception of a kind in a chain of causes."""
    while exc is not None:
        if isinstance(exc, kind):
            return exc
        exc = exc.__cause__ or exc.__context__
    return None
