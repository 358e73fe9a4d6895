"""Reads DYN_REDIS_URL: redis-py's connection options, checked before anything connects.

A password with a character that a URL takes for its own (`#`, `/`, `?`, ...) falls apart: a piece of it
becomes the host, the port or an option. So the pieces are checked here, and no message repeats any of them
but the names of options and of files.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import SplitResult, unquote, urlsplit

import redis.asyncio
import redis.asyncio.connection
import redis.connection
from redis import exceptions as redis_errors

from dynamo_redis.errors import ConfigError

_FORM: Final = "redis://[user:password@]host:port, rediss://… for TLS, or unix:///path/of/the/socket"
_ENCODE: Final = (
    "in a password write # as %23, / as %2F, ? as %3F, @ as %40, : as %3A, [ as %5B, % as %25, a space as %20"
)
_OPTION: Final = re.compile(r"(?:username|password)=.*|[a-z][a-z0-9_]*=[^@]*", re.DOTALL)
"""An @ elsewhere would be that before the host: what comes before it is a password."""
_UNKNOWN_OPTION: Final = re.compile(r"unexpected keyword argument '(\w+)'")
"""How Python words it that a connection class does not know an option."""
_INVALID_OPTION: Final = re.compile(r"Invalid value for '(\w+)'")
"""How redis-py words it that an option is not of its type."""
_FILES: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_ca_path")

Parser = Callable[[str], Any]
"""`parse_url` of redis-py, for the event loop or for a thread."""


def parse_url(url: str, parser: Parser) -> dict[str, Any]:
    """redis-py's connection options of a URL. Raises ConfigError, which never shows a piece of a password."""
    url = url.strip()
    _check_pieces(url)
    try:
        options: dict[str, Any] = dict(parser(url))
    except ValueError as exc:
        invalid = _INVALID_OPTION.search(str(exc))
        reason = f"the value of its option {invalid[1]!r} cannot be used" if invalid else f"write {_FORM}"
        raise ConfigError(f"DYN_REDIS_URL: {reason}") from None
    if options.get("db", 0) != 0:
        raise ConfigError("DYN_REDIS_URL: only database 0 is used; separate deployments by DYN_REDIS_PREFIX")
    options.setdefault("connection_class", _default_class(parser))
    _check_options(options)
    return options


def address(options: dict[str, Any]) -> str:
    """Where the options lead to, as it is shown: `host:port`, or a socket's path."""
    if "path" in options:
        return str(options["path"])
    host = str(options.get("host", "localhost"))
    return f"[{host}]:{options.get('port', 6379)}" if ":" in host else f"{host}:{options.get('port', 6379)}"


def make_connection(options: dict[str, Any]) -> Any:
    """An unconnected connection of the options' own class."""
    return options["connection_class"](**{k: v for k, v in options.items() if k != "connection_class"})


def _check_pieces(url: str) -> None:
    """That each piece is what it should be, so that none is part of a password."""
    scheme, found, rest = url.partition("://")
    if not found or scheme.lower() not in ("redis", "rediss", "unix"):
        raise ConfigError(f"DYN_REDIS_URL must begin with redis://, rediss://, unix://: write {_FORM}")
    try:
        pieces = urlsplit(url)
        pieces.port  # noqa: B018 - it is read here for its error
    except ValueError:
        raise ConfigError(_wrong_server(rest)) from None
    if "#" in url:
        raise ConfigError(f"DYN_REDIS_URL has a # in it: {_ENCODE}")
    if any(_OPTION.fullmatch(option) is None for option in pieces.query.split("&") if option):
        raise ConfigError(f"DYN_REDIS_URL: behind the ? there must be options, as name=value; {_ENCODE}")
    if scheme.lower() == "unix":
        if pieces.path in ("", "/"):
            raise ConfigError("DYN_REDIS_URL: write unix:///path/of/the/socket")
    else:
        _check_server(pieces)


def _check_server(pieces: SplitResult) -> None:
    user, _, host = pieces.netloc.rpartition("@")
    # Not every Python refuses brackets there, which are an address's.
    if "[" in user or "]" in user or (host.count(":") > 1 and not host.startswith("[")):
        raise ConfigError(_wrong_server(host))
    database = unquote(pieces.path).strip("/")
    if database and not database.isdecimal():
        raise ConfigError(f"DYN_REDIS_URL: behind host:port/ there is only a database, which is 0; {_ENCODE}")


def _wrong_server(rest: str) -> str:
    host = rest.rpartition("@")[2]
    if "," in host:
        return f"DYN_REDIS_URL names several servers: give one; {_ENCODE}"
    return f"DYN_REDIS_URL: its host:port is not understood; an IPv6 address is written [::1]:6379; {_ENCODE}"


def _check_options(options: dict[str, Any]) -> None:
    """That there are such options, and the files that they name. Raises ConfigError."""
    try:
        make_connection(options)
    except (TypeError, ValueError, redis_errors.RedisError) as exc:
        unknown = _UNKNOWN_OPTION.search(str(exc))
        reason = f"there is no option {unknown[1]!r}" if unknown else "they cannot be used together"
        if not unknown and "ssl_cert_reqs" in options:
            reason = "ssl_cert_reqs is required, optional or none"
        raise ConfigError(f"DYN_REDIS_URL: its options, behind the `?`: {reason}") from None
    for name in _FILES:
        path = options.get(name)
        if path is not None and not Path(path).exists():
            raise ConfigError(f"DYN_REDIS_URL: {name}: there is no file {path}")
    authorities = options.get("ssl_ca_certs")
    if authorities is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(authorities)
        except OSError:  # an SSLError is one
            raise ConfigError(
                f"DYN_REDIS_URL: ssl_ca_certs: {authorities} cannot be read as certificates (PEM)"
            ) from None


def _default_class(parser: Parser) -> type:
    is_async = parser is redis.asyncio.connection.parse_url
    return redis.asyncio.Connection if is_async else redis.Connection
