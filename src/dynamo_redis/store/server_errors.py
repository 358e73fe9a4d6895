"""What it means when an exchange with a server fails, as redis-py tells it: one line, without a password.

Three kinds of trouble: nobody answers (StoreUnavailable, it may pass), a Redis that says no (StoreRefused),
and something that answers and is no Redis, or is one that speaks TLS where we do not.
"""

from __future__ import annotations

import errno
import ssl
from typing import Final, Literal

from redis import exceptions as redis_errors

from dynamo_redis.errors import StoreError, StoreRefused, StoreUnavailable, StreamLost

# A deadline's TimeoutError is an OSError; uvloop raises RuntimeError on a transport that the peer has closed.
FAILURES: Final = (redis_errors.RedisError, OSError, RuntimeError)
"""All that redis-py and the event loop raise for a failed exchange."""

Stranger = Literal["plain", "tls"]
"""How we spoke to a server that has never answered us yet: it may be that it speaks the other way."""

_REFUSALS: Final = (
    # (in the server's message, what it means and what to do)
    ("NOAUTH", "needs a password: set DYN_REDIS_URL to redis://[user]:password@host:port"),
    ("Authentication required", "needs a password: set DYN_REDIS_URL to redis://[user]:password@host:port"),
    ("WRONGPASS", "refuses the user name or password of DYN_REDIS_URL"),
    ("invalid username-password", "refuses the user name or password of DYN_REDIS_URL"),
    ("invalid password", "refuses the user name or password of DYN_REDIS_URL"),
    ("without any password configured", "has no password, but DYN_REDIS_URL gives one: leave it out"),
    ("READONLY", "takes no writes, it is a read-only replica: set DYN_REDIS_URL to the primary"),
    ("read only replica", "takes no writes, it is a read-only replica: set DYN_REDIS_URL to the primary"),
    ("OOM ", "is out of memory: raise its maxmemory"),
    ("used memory > 'maxmemory'", "is out of memory: raise its maxmemory"),
    ("MISCONF", "takes no writes because it cannot save to disk: repair its disk, or see its log"),
    (
        "WRONGTYPE",
        "holds a key that is not this program's (WRONGTYPE): delete it, or choose another DYN_REDIS_PREFIX",
    ),
    ("MOVED ", "is a cluster node that does not hold these keys: use the node that does, or a proxy"),
)

_DENIALS: Final = ("NOPERM", "ACL failure", "can't run this command", "can't access at least one")
"""What an ACL answers, to a command itself and, in other words, to one inside a script."""

_LOST_STREAM: Final = ("NOGROUP", "UNBLOCKED the stream key no longer exists")

_AWAY: Final = ("LOADING", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "NOREPLICAS", "UNBLOCKED", "BUSY ")
"""Answers of a server that will serve again: starting, failing over, or waiting for its replicas."""

_TLS_ALERT: Final = 'got "\\x15"'
_CONNECTION_REFUSED: Final = f"[Errno {errno.ECONNREFUSED}]"
"""In the text, where several addresses were tried: asyncio then raises a plain OSError."""
_CUT_OFF: Final = ("reset by peer", "closed by server", "Connection lost", "Connection reset")


def store_error(exc: BaseException, address: str, *, stranger: Stranger | None = None) -> StoreError:
    """What a failed exchange with the server at `address` means to a caller.

    `stranger`: no exchange with that server has succeeded yet, so a wrong URL may be the cause.
    """
    return (
        _refused_by_server(exc, address)
        or _not_understood(exc, address, stranger)
        or _nobody_there(exc, address, stranger)
        or StoreRefused(f"Redis at {address} refuses a command: {one_line(exc)}")
    )


def one_line(exc: BaseException) -> str:
    """An exception's message, or its name if it has none."""
    return " ".join(str(exc).split()) or type(exc).__name__


def _refused_by_server(exc: BaseException, address: str) -> StoreError | None:
    """A Redis that answers, and says no."""
    text = one_line(exc)
    if isinstance(exc, redis_errors.ConnectionError | redis_errors.ResponseError):
        for mark, meaning in _REFUSALS:
            if mark in text:
                return StoreRefused(f"Redis at {address} {meaning}")
    if isinstance(exc, redis_errors.ResponseError) and any(mark in text for mark in _LOST_STREAM):
        return StreamLost(f"Redis at {address} no longer has the event stream, or the reader's group in it")
    if isinstance(exc, redis_errors.NoPermissionError) or any(mark in text for mark in _DENIALS):
        return StoreRefused(
            f"Redis at {address} does not permit this user to do that (ACL): {text};"
            " SECURITY.md has the line of ACL SETUSER with the rights it needs"
        )
    return None


def _not_understood(exc: BaseException, address: str, stranger: Stranger | None) -> StoreError | None:
    """Something answers, but not as a Redis does, or not as one that we trust."""
    text = one_line(exc)
    if _caused_by(exc, ssl.SSLCertVerificationError):
        return StoreRefused(
            f"no TLS connection to Redis at {address}: {text}"
            " (add ?ssl_ca_certs=FILE to DYN_REDIS_URL for a CA of your own)"
        )
    if _caused_by(exc, ssl.SSLError):
        hint = ": does it speak TLS? If not, write redis://" if stranger == "tls" else ""
        return StoreRefused(f"no TLS connection to Redis at {address}: {text.rstrip('.')}{hint}")
    if isinstance(exc, redis_errors.InvalidResponse):
        if _TLS_ALERT in text:
            return StoreRefused(f"what answers at {address} speaks TLS: write rediss:// in DYN_REDIS_URL")
        return StoreRefused(f"what answers at {address} is not a Redis: {text}")
    return None


def _nobody_there(exc: BaseException, address: str, stranger: Stranger | None) -> StoreError | None:
    """No answer, an end in the middle of it, or one of a server that will serve again."""
    text = one_line(exc)
    if isinstance(exc, TimeoutError | redis_errors.TimeoutError):
        hint = " (does it speak TLS? If not, write redis://)" if stranger == "tls" else ""
        return StoreUnavailable(f"Redis at {address} does not answer in time{hint}")
    if _caused_by(exc, ConnectionRefusedError) or _CONNECTION_REFUSED in text:
        return StoreUnavailable(f"no Redis answers at {address} (connection refused): is it running there?")
    if address.startswith("/") and _caused_by(exc, FileNotFoundError):
        return StoreUnavailable(f"no Redis answers at {address} (there is no such socket): is it running?")
    if any(mark in text for mark in _AWAY):
        return StoreUnavailable(f"no connection to Redis at {address}: {text}")
    if isinstance(exc, redis_errors.ConnectionError | OSError | RuntimeError):
        cut_off = stranger == "plain" and any(mark in text for mark in _CUT_OFF)
        hint = " (is it TLS? Then write rediss://)" if cut_off else ""
        return StoreUnavailable(f"no connection to Redis at {address}: {text}{hint}")
    return None


def _caused_by(exc: BaseException | None, kind: type[BaseException]) -> bool:
    while exc is not None:
        if isinstance(exc, kind):
            return True
        exc = exc.__cause__ or exc.__context__
    return False
