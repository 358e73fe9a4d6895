"""Reads DYN_REDIS_URL: the servers that it names, and redis-py's connection options, checked before a
connection is made.

A password that contains a delimiter of URLs (`#`, `/`, `?`, ...) is split: a part of it becomes the host, the
port or an option. So the parts are checked here, and messages repeat only the names of options and files.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit, urlunsplit

import redis.asyncio
import redis.asyncio.connection
import redis.connection
from redis import exceptions as redis_errors

from dynamo_redis.config import RedisLogin
from dynamo_redis.errors import ConfigError
from dynamo_redis.store.redis.credentials import CredentialSource, SharedCredentials

_FORM: Final = (
    "redis://[user:password@]host:port, rediss://… for TLS, unix:///path/of/the/socket, or"
    " redis+sentinel://[user:password@]sentinel1:26379,sentinel2:26379/master-name, or"
    " redis+cluster://[user:password@]node1:6379,node2:6379"
)
_SENTINEL_FORM: Final = "redis+sentinel://[user:password@]sentinel1:26379,sentinel2:26379/master-name"
_SENTINEL_SCHEMES: Final = {"redis+sentinel": "redis", "rediss+sentinel": "rediss"}
"""Schemes with several hosts, and the scheme of the connections to each."""
_CLUSTER_FORM: Final = "redis+cluster://[user:password@]node1:6379,node2:6379"
_CLUSTER_SCHEMES: Final = {"redis+cluster": "redis", "rediss+cluster": "rediss"}
_SCHEMES: Final = ("redis", "rediss", "unix", *_SENTINEL_SCHEMES, *_CLUSTER_SCHEMES)
_ENCODE: Final = (
    "in a password write # as %23, / as %2F, ? as %3F, @ as %40, : as %3A, [ as %5B, % as %25, a space as %20"
)
_OPTION: Final = re.compile(r"(?:sentinel_)?(?:username|password)=.*|[a-z][a-z0-9_]*=[^@]*", re.DOTALL)
"""An @ in another option would be the one before the host: the text before it is a password."""
_UNKNOWN_OPTION: Final = re.compile(r"unexpected keyword argument '(\w+)'")
"""Python's message for an option that a connection class does not know."""
_INVALID_OPTION: Final = re.compile(r"Invalid value for '(\w+)'")
"""redis-py's message for an option of a wrong type."""
_FILES: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_ca_path")
_SENTINEL_PORT: Final = 26379
_NODE_PORT: Final = 6379
_MOST_SENTINELS_COUNT: Final = 15
_MASTER_NAME: Final = re.compile(r"[A-Za-z0-9._-]+")
"""The names that a Sentinel accepts."""
_SENTINEL_OPTIONS: Final = ("sentinel_username", "sentinel_password")

Parser = Callable[[str], Any]
"""`parse_url` of redis-py, for the event loop or for a thread."""

Address = tuple[str, int]
"""Host and port."""


@dataclass(frozen=True, slots=True)
class ServerUrl:
    """A checked URL. Made by `parse_server_url`.

    `sentinels` and `master_name` are set for a URL of sentinels only. The options of that are for the servers
    and for the sentinels alike, except user and password. `nodes` is set for a URL of a cluster only: some of
    its nodes, by which the others are found. `login`: user and password, where the URL has no password.
    """

    url: str = field(repr=False)
    """A URL that redis-py understands; its host is that of the first sentinel, if there are sentinels."""
    sentinels: tuple[Address, ...] = ()
    master_name: str = ""
    sentinel_login: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    nodes: tuple[Address, ...] = ()
    login: RedisLogin | None = None

    @property
    def is_tls(self) -> bool:
        """True if connections use TLS."""
        return self.url.lower().startswith("rediss:")

    def options(self) -> dict[str, Any]:
        """Return redis-py's options of connections to the server, for an event loop. Raises ConfigError."""
        return self._with_login(_options(self.url, redis.asyncio.connection.parse_url))

    def thread_options(self) -> dict[str, Any]:
        """Return redis-py's options of connections to the server, for a thread. Raises ConfigError."""
        return self._with_login(_options(self.url, redis.connection.parse_url))

    def _with_login(self, options: dict[str, Any]) -> dict[str, Any]:
        login = self.login
        if login is None:
            return options
        if login.changes:
            rest = {name: value for name, value in options.items() if name not in ("username", "password")}
            return rest | {"credential_provider": SharedCredentials(login)}
        given = {"username": login.username, "password": login.password}
        return options | {name: value for name, value in given.items() if value is not None}

    @property
    def user(self) -> str:
        """The user at the server, as far as it is known: a provider may name another one."""
        login = self.login
        if login is not None and login.changes:
            source = CredentialSource.shared(login)
            known = source.known
            source.release()
            return (known and known.username) or login.username or "default"
        return str(self.options().get("username") or "default")

    def credentials(self) -> CredentialSource | None:
        """Return the source of user and password, if they change. Its user releases it. Raises
        ConfigError."""
        return None if self.login is None or not self.login.changes else CredentialSource.shared(self.login)

    def sentinel_options(self, sentinel: Address) -> dict[str, Any]:
        """Return redis-py's options of connections to a sentinel, for an event loop."""
        options = self.options()
        for name in ("username", "password", "credential_provider"):
            options.pop(name, None)
        return options | dict(self.sentinel_login) | {"host": sentinel[0], "port": sentinel[1]}


def parse_server_url(url: str, login: RedisLogin | None = None) -> ServerUrl:
    """Check a URL, and that it goes with a user and password that stand beside it. Raises ConfigError, which
    never shows part of a password."""
    url = url.strip()
    scheme, found, rest = url.partition("://")
    scheme = scheme.lower()
    if not found or scheme not in _SCHEMES:
        raise ConfigError(
            "DYN_REDIS_URL must begin with redis://, rediss://, unix://, redis+sentinel://, redis+cluster://,"
            f" or rediss+ for TLS to both: write {_FORM}"
        )
    if scheme in _SENTINEL_SCHEMES:
        parsed = _parse_sentinels(scheme, rest)
    elif scheme in _CLUSTER_SCHEMES:
        parsed = _parse_cluster(scheme, rest)
    else:
        parsed = ServerUrl(url)
    _check_pieces(parsed.url)
    _check_options(parsed.options())
    return parsed if login is None else replace(parsed, login=_beside(parsed.options(), login))


def _beside(options: dict[str, Any], login: RedisLogin) -> RedisLogin:
    """Return a login with the user of the URL, if it has none itself. Raises ConfigError."""
    given = options.get("username") or None
    if options.get("password") and (login.changes or login.password is not None):
        raise ConfigError(f"DYN_REDIS_URL has a password, and {login.origin} gives one: leave one out")
    if given is not None and given != login.username:
        if login.username is not None or login.username_file is not None:
            raise ConfigError("DYN_REDIS_URL names a user, and DYN_REDIS_USERNAME another one: leave one out")
        return replace(login, username=given)
    return login


def address(options: dict[str, Any]) -> str:
    """Return the address in the options, for display: `host:port`, or a socket's path."""
    if "path" in options:
        return str(options["path"])
    return show_address((str(options.get("host", "localhost")), options.get("port", 6379)))


def show_address(at: Address) -> str:
    """Return `host:port`; an IPv6 address in brackets."""
    host, port = at
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def make_connection(options: dict[str, Any]) -> Any:
    """Return a connection of the class in the options, not yet connected."""
    return options["connection_class"](**{k: v for k, v in options.items() if k != "connection_class"})


# ---------------------------------------------------------------------- several hosts


def _split_hosts(rest: str) -> SplitResult:
    """Split a URL of several hosts, without its scheme. Raises ConfigError."""
    if "#" in rest:
        raise ConfigError(f"DYN_REDIS_URL has a # in it: {_ENCODE}")
    try:
        return urlsplit(f"//{rest}")
    except ValueError:
        raise ConfigError(_wrong_server(rest)) from None


def _parse_sentinels(scheme: str, rest: str) -> ServerUrl:
    """Return the sentinels and the name of the master. Raises ConfigError."""
    pieces = _split_hosts(rest)
    login, at, hosts = pieces.netloc.rpartition("@")
    sentinels = parse_hosts(hosts, _SENTINEL_PORT)
    if len(sentinels) > _MOST_SENTINELS_COUNT:
        raise ConfigError(f"DYN_REDIS_URL: name at most {_MOST_SENTINELS_COUNT} sentinels")
    name = unquote(pieces.path).strip("/")
    if not name:
        raise ConfigError(
            "DYN_REDIS_URL: behind the sentinels there must be the name by which they know the master, as"
            f" /mymaster: write {_SENTINEL_FORM}"
        )
    if not _MASTER_NAME.fullmatch(name):
        raise ConfigError(
            "DYN_REDIS_URL: the name of the master, behind the sentinels, has only letters, digits, and"
            f" . - _; {_ENCODE}"
        )
    _check_query(pieces.query)
    options = parse_qsl(pieces.query, keep_blank_values=True)
    login_of_sentinels = {
        option.removeprefix("sentinel_"): value for option, value in options if option in _SENTINEL_OPTIONS
    }
    if "username" in login_of_sentinels and "password" not in login_of_sentinels:
        raise ConfigError("DYN_REDIS_URL: sentinel_username needs a sentinel_password")
    query = urlencode([pair for pair in options if pair[0] not in _SENTINEL_OPTIONS])
    netloc = f"{login}{at}{show_address(sentinels[0])}"
    one = urlunsplit((_SENTINEL_SCHEMES[scheme], netloc, "", query, ""))
    return ServerUrl(one, sentinels, name, tuple(login_of_sentinels.items()))


def _parse_cluster(scheme: str, rest: str) -> ServerUrl:
    """Return the nodes by which a cluster is found. Raises ConfigError."""
    pieces = _split_hosts(rest)
    login, at, hosts = pieces.netloc.rpartition("@")
    nodes = parse_hosts(hosts, _NODE_PORT)
    if pieces.path.strip("/") not in ("", "0"):
        raise ConfigError(
            f"DYN_REDIS_URL: behind the nodes of a cluster there are only options: write {_CLUSTER_FORM};"
            f" {_ENCODE}"
        )
    netloc = f"{login}{at}{show_address(nodes[0])}"
    one = urlunsplit((_CLUSTER_SCHEMES[scheme], netloc, "", pieces.query, ""))
    return ServerUrl(one, nodes=nodes)


def parse_hosts(text: str, default_port: int) -> tuple[Address, ...]:
    """Return the addresses of a list `host:port,host:port`, each once. Raises ConfigError."""
    found: dict[Address, None] = {}
    for part in text.split(","):
        try:
            pieces = urlsplit(f"//{part}")
            host, port = pieces.hostname, pieces.port
        except ValueError:
            raise ConfigError(_wrong_server(part)) from None
        if not host or (part.count(":") > 1 and not part.startswith("[")):
            raise ConfigError(_wrong_server(""))
        found[(host, port or default_port)] = None
    return tuple(found)


# ---------------------------------------------------------------------- checks


def _options(url: str, parser: Parser) -> dict[str, Any]:
    """Return redis-py's connection options for a URL. Raises ConfigError."""
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
    return options


def _check_pieces(url: str) -> None:
    """Check that each part of a URL is valid, so that none is part of a password. Raises ConfigError."""
    scheme, _, rest = url.partition("://")
    try:
        pieces = urlsplit(url)
        pieces.port  # noqa: B018 - it is read here for its error
    except ValueError:
        raise ConfigError(_wrong_server(rest)) from None
    if "#" in url:
        raise ConfigError(f"DYN_REDIS_URL has a # in it: {_ENCODE}")
    _check_query(pieces.query)
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


def _check_query(query: str) -> None:
    """Check that options are written as options. Raises ConfigError."""
    if any(_OPTION.fullmatch(option) is None for option in query.split("&") if option):
        raise ConfigError(f"DYN_REDIS_URL: behind the ? there must be options, as name=value; {_ENCODE}")


def _wrong_server(rest: str) -> str:
    host = rest.rpartition("@")[2]
    if "," in host:
        return (
            f"DYN_REDIS_URL names several servers: give one, or sentinels, as {_SENTINEL_FORM}, or nodes of a"
            f" cluster, as {_CLUSTER_FORM}; {_ENCODE}"
        )
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
