"""Reads DYN_REDIS_URL: redis-py's connection options, checked before a connection is made.

A password that contains a delimiter of URLs (`#`, `/`, `?`, ...) is split: a part of it becomes the host, the
port or an option. So the parts are checked here, and messages repeat only the names of options and files.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

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
"""An @ in another option would be the one before the host: the text before it is a password."""
_UNKNOWN_OPTION: Final = re.compile(r"unexpected keyword argument '(\w+)'")
"""Python's message for an option that a connection class does not know."""
_INVALID_OPTION: Final = re.compile(r"Invalid value for '(\w+)'")
"""redis-py's message for an option of a wrong type."""
_FILES: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_ca_path")

Parser = Callable[[str], Any]
"""`parse_url` of redis-py, for the event loop or for a thread."""


def parse_url(url: str, parser: Parser) -> dict[str, Any]:
    """Return redis-py's connection options for a URL. Raises ConfigError, which never shows part of a
    password."""
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
    is_async = parser is redis.asyncio.connection.parse_url
    options.setdefault("connection_class", redis.asyncio.Connection if is_async else redis.Connection)
    _check_options(options)
    return options


def address(options: dict[str, Any]) -> str:
    """Return the address in the options, for display: `host:port`, or a socket's path."""
    if "path" in options:
        return str(options["path"])
    host = str(options.get("host", "localhost"))
    return f"[{host}]:{options.get('port', 6379)}" if ":" in host else f"{host}:{options.get('port', 6379)}"


def make_connection(options: dict[str, Any]) -> Any:
    """Return a connection of the class in the options, not yet connected."""
    return options["connection_class"](**{k: v for k, v in options.items() if k != "connection_class"})


def _check_pieces(url: str) -> None:
    """Check that each part of a URL is valid, so that none is part of a password. Raises ConfigError."""
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
        return
    user, _, host = pieces.netloc.rpartition("@")
    # Brackets belong to an IPv6 address; not every Python version refuses them in a password.
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
    """Check that the options exist, and the files that they name. Raises ConfigError."""
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
