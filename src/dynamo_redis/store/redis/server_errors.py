"""Meanings of failed exchanges with a server, as redis-py tells them: one line each, without a password.

Three kinds of trouble: silence (StoreUnavailable, it may pass), a Redis that answers with an error (`ANSWERS`
says what each of them is), and something that answers and is no Redis, or is one that speaks TLS where we do
not.

redis-py takes the code off some errors and leaves it on others. So its parsers are made to keep each error as
the server sent it (`keep_replies`), and only that is looked at.
"""

from __future__ import annotations

import errno
import re
import ssl
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar, cast

from redis import exceptions as redis_errors

from dynamo_redis.errors import StoreError, StoreRefused, StoreUnavailable, StreamLost

# A deadline's TimeoutError is an OSError; uvloop raises RuntimeError on a transport that the peer has closed.
FAILURES: Final = (redis_errors.RedisError, OSError, RuntimeError)
"""All that redis-py and the event loop raise for a failed exchange."""

_E = TypeVar("_E", bound=BaseException)

Stranger = Literal["plain", "tls"]
"""How we spoke to a server that has never answered us yet: it may be that it speaks the other way."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An error of a server.

    `kind`: StoreUnavailable is worth another attempt, StoreRefused needs an operator. `leave`: this is not,
    or no longer, the server to talk to, so all connections are made anew, which resolves its name again.
    `meaning` follows "Redis at ADDRESS"; it says what to do where something can be done.
    """

    kind: type[StoreError]
    meaning: str
    leave: bool = False


_NO_PASSWORD: Final = Answer(
    StoreRefused,
    "needs a password: set DYN_REDIS_URL to redis://[user]:password@host:port",
    leave=True,
)
_WRONG_PASSWORD: Final = Answer(StoreRefused, "refuses the user name or password of DYN_REDIS_URL")
_NEEDLESS_PASSWORD: Final = Answer(StoreRefused, "has no password, but DYN_REDIS_URL gives one: leave it out")
_DENIED: Final = Answer(
    StoreRefused,
    "does not permit this user to do that (ACL): docs/security.md has the line of ACL SETUSER with the rights"
    " it needs",
)
_CREDENTIALS: Final = frozenset({_NO_PASSWORD, _WRONG_PASSWORD, _NEEDLESS_PASSWORD})
"""Answers to a user name or password that is not, or no longer, the right one."""
_TOO_MANY: Final = Answer(
    StoreUnavailable,
    "has as many connections as it allows: raise its maxclients, or find out which are needless",
)
_UNKNOWN_COMMAND: Final = Answer(
    StoreRefused, "does not know a command that is needed: is it a proxy, or was the command renamed?"
)
_NO_SERVER_BEHIND: Final = Answer(StoreUnavailable, "is a proxy that reaches no server", leave=True)
_REFUSED: Final = Answer(StoreRefused, "refuses a command")

ANSWERS: Final = {
    # Not, or no longer, the server for our keys.
    "READONLY": Answer(
        StoreUnavailable,
        "takes no writes, it is a read-only replica: set DYN_REDIS_URL to the primary, and restart what runs"
        " with this one",
        leave=True,
    ),
    "UNBLOCKED": Answer(StoreUnavailable, "ended a waiting read, it is no longer the primary", leave=True),
    "MASTERDOWN": Answer(StoreUnavailable, "is a replica that has lost its primary", leave=True),
    "LOADING": Answer(StoreUnavailable, "is still loading its data", leave=True),
    "CLUSTERDOWN": Answer(StoreUnavailable, "is a node of a cluster that is down", leave=True),
    "MOVED": Answer(
        StoreUnavailable,
        "is a cluster node that does not hold these keys: set DYN_REDIS_URL to the one that does, or a proxy",
        leave=True,
    ),
    # It will serve again.
    "ASK": Answer(StoreUnavailable, "is a cluster node that is moving these keys to another node"),
    "TRYAGAIN": Answer(StoreUnavailable, "is a cluster node that is moving these keys to another node"),
    "BUSY": Answer(StoreUnavailable, "is busy running a script"),
    "NOREPLICAS": Answer(
        StoreUnavailable,
        "takes no writes, it has too few replicas: start its replica again, or lower min-replicas-to-write",
    ),
    # An operator is needed.
    "OOM": Answer(StoreRefused, "is out of memory: raise its maxmemory"),
    "MISCONF": Answer(
        StoreRefused, "takes no writes because it cannot save to disk: repair its disk, or see its log"
    ),
    "NOAUTH": _NO_PASSWORD,
    "WRONGPASS": _WRONG_PASSWORD,
    "NOPERM": _DENIED,
    "DENIED": Answer(
        StoreRefused,
        "is in protected mode, it answers only on its own machine: give it a password (requirepass), and"
        " DYN_REDIS_URL the same one",
    ),
    "WRONGTYPE": Answer(
        StoreRefused, "holds a key that is not this program's: delete it, or choose another DYN_REDIS_PREFIX"
    ),
    "CROSSSLOT": Answer(
        StoreRefused, "is a cluster, and the keys of a command are not all in one slot of it"
    ),
    # It no longer has what was asked for.
    "NOGROUP": Answer(StreamLost, "no longer has the event stream, or the reader's group in it"),
}
"""Meanings of error codes: the first word of an error as the server sent it."""

WRITE_REFUSALS: Final = frozenset({"READONLY", "NOREPLICAS", "OOM", "MISCONF"})
"""Codes by which a server refuses whatever writes, until its trouble is over."""

_BY_WORDS: Final = (
    # Errors without a code of their own, by how they begin.
    ("UNBLOCKED the stream key no longer exists", ANSWERS["NOGROUP"]),
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
"""Text that later releases put behind it."""
_REPLY_LENGTH: Final = 400
"""Characters shown of an error; protected mode explains itself in more."""
_ARGUMENTS: Final = re.compile(r",? with args beginning with:.*")
"""A server's repetition of a command that it does not know: a password may be in it."""

_TLS_ALERT: Final = 'got "\\x15"'
_CONNECTION_REFUSED: Final = f"[Errno {errno.ECONNREFUSED}]"
"""In the text, where several addresses were tried: asyncio then raises a plain OSError."""
_CUT_OFF: Final = ("reset by peer", "closed by server", "Connection lost", "Connection reset")


def store_error(
    exc: BaseException, address: str, *, stranger: Stranger | None = None, command: str = ""
) -> StoreError:
    """What a failed exchange with the server at `address` means to a caller.

    `stranger`: no exchange with that server has succeeded yet, so a wrong URL may be the cause. `command`:
    what was asked, where that is known.
    """
    text = reply(exc)
    if text is not None:
        answer = _answer(text)
        shown = text if answer is _REFUSED else text.partition(". ")[0]  # further sentences explain at length
        return answer.kind(f"Redis at {address} {answer.meaning} ({shown})")
    return (
        _not_understood(exc, address, stranger)
        or _no_answer(exc, address, stranger, command)
        or StoreRefused(f"Redis at {address} refuses a command: {one_line(exc)}")
    )


def is_to_be_left(exc: BaseException) -> bool:
    """Whether the server says that it is not, or no longer, the one to talk to."""
    text = reply(exc)
    return text is not None and _answer(text).leave


def is_about_password(exc: BaseException) -> bool:
    """Whether the server does not take the user name or password, or wants one."""
    return _answer(reply(exc) or "") in _CREDENTIALS


def is_full(exc: BaseException | None) -> bool:
    """Whether the server let in no further connection, because it has as many as it allows; by the reply that
    caused an error."""
    while exc is not None:
        if _answer(reply(exc) or "") is _TOO_MANY:
            return True
        exc = exc.__cause__
    return False


def does_not_take(exc: BaseException, command: str) -> bool:
    """Whether the server, or a proxy before it, does not run a command, and did not look at its arguments."""
    text = reply(exc) or ""
    answer = _answer(text)
    return answer is _UNKNOWN_COMMAND or (answer is _DENIED and f"'{command.lower()}" in text)


def is_about_command(exc: BaseException) -> bool:
    """Whether an error is about what was asked, not about the server or the connection."""
    return _answer(reply(exc) or "") in (_UNKNOWN_COMMAND, _DENIED, _REFUSED)


def is_cut_off(exc: BaseException) -> bool:
    """Whether a connection was made, and ended by the other side."""
    return any(mark in one_line(exc) for mark in _CUT_OFF)


def reply(exc: BaseException) -> str | None:
    """The error that a server sent, without what it says of scripts and arguments; None if it sent none."""
    sent = getattr(exc, "reply", None)
    if sent is None:
        return None
    text = _RAISED_IN_SCRIPT.sub("", " ".join(sent.split()), count=1)
    text = _ARGUMENTS.sub("", _PLACE_IN_SCRIPT.sub("", text))
    return text if len(text) <= _REPLY_LENGTH else f"{text[:_REPLY_LENGTH]}…"


def _answer(text: str) -> Answer:
    found = next((answer for beginning, answer in _BY_WORDS if text.startswith(beginning)), None)
    return found or ANSWERS.get(text.partition(" ")[0], _REFUSED)


class ErrorReply(redis_errors.ResponseError):
    """An error that a server sent, whole."""

    def __init__(self, sent: str) -> None:
        super().__init__(sent)
        self.reply = sent


def keep_replies(connection: Any) -> None:
    """Let the exceptions of a redis-py connection, which is not logged in yet, have the server's `reply`."""
    parser = connection._parser
    parse = type(parser).parse_error

    def parse_error(response: str) -> Exception:
        try:
            error: Any = parse(response)
        except (ValueError, IndexError):  # it takes a MOVED apart, and this one is of another form
            return ErrorReply(response)
        error.reply = response
        return cast("Exception", error)

    parser.parse_error = parse_error


def one_line(exc: BaseException) -> str:
    """An exception's message, or its name if it has none."""
    return " ".join(str(exc).split()) or type(exc).__name__


def _not_understood(exc: BaseException, address: str, stranger: Stranger | None) -> StoreError | None:
    """Something answers, but not as a Redis does, or not as one that we trust."""
    text = one_line(exc)
    if certificate := _cause(exc, ssl.SSLCertVerificationError):
        return StoreRefused(f"no TLS connection to Redis at {address}: {text} ({_cure(certificate)})")
    if _cause(exc, ssl.SSLError):
        hint = ": does it speak TLS? If not, write redis://" if stranger == "tls" else ""
        return StoreRefused(f"no TLS connection to Redis at {address}: {text.rstrip('.')}{hint}")
    if isinstance(exc, redis_errors.InvalidResponse):
        if _TLS_ALERT in text:
            return StoreRefused(f"what answers at {address} speaks TLS: write rediss:// in DYN_REDIS_URL")
        return StoreRefused(f"what answers at {address} is not a Redis: {text}")
    return None


def _no_answer(
    exc: BaseException, address: str, stranger: Stranger | None, command: str
) -> StoreError | None:
    """No answer, or an end in the middle of it."""
    text = one_line(exc)
    if isinstance(exc, TimeoutError | redis_errors.TimeoutError):
        hint = " (does it speak TLS? If not, write redis://)" if stranger == "tls" else ""
        return StoreUnavailable(f"Redis at {address} does not answer in time{hint}")
    if _cause(exc, ConnectionRefusedError) or _CONNECTION_REFUSED in text:
        return StoreUnavailable(f"no Redis answers at {address} (connection refused): is it running there?")
    if address.startswith("/") and _cause(exc, FileNotFoundError):
        return StoreUnavailable(f"no Redis answers at {address} (there is no such socket): is it running?")
    if isinstance(exc, redis_errors.ConnectionError | OSError | RuntimeError):
        hint = ""
        if is_cut_off(exc):
            hint = f" (in answer to {command})" * bool(command)
            hint += " (is it TLS? Then write rediss://)" * (stranger == "plain")
        return StoreUnavailable(f"no connection to Redis at {address}: {text}{hint}")
    return None


def _cure(refused: ssl.SSLCertVerificationError) -> str:
    """Say what to do about a certificate, by OpenSSL's `X509_V_ERR_…` number."""
    match refused.verify_code:
        case 62 | 64:  # HOSTNAME_MISMATCH, IP_ADDRESS_MISMATCH
            return "name the host in DYN_REDIS_URL as its certificate does, or add ?ssl_check_hostname=false"
        case 9 | 10:  # CERT_NOT_YET_VALID, CERT_HAS_EXPIRED
            return "the server needs a new certificate, or a clock is wrong"
        case _:
            return "add ?ssl_ca_certs=FILE to DYN_REDIS_URL for a CA of your own"


def _cause(exc: BaseException | None, kind: type[_E]) -> _E | None:
    """Return the first exception of a kind in a chain of causes."""
    while exc is not None:
        if isinstance(exc, kind):
            return exc
        exc = exc.__cause__ or exc.__context__
    return None
