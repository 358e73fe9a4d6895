"""The port of the HTTP server: its URL, and its sockets, of which several processes can have one each."""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys
from typing import Final

from dynamo_redis.errors import ConfigError

BACKLOG: Final = 2048

_BALANCES: Final = sys.platform == "linux"
"""True if the kernel shares new connections out among sockets with SO_REUSEPORT. Others give all of them to
one."""


HTTP_OPTION: Final = "--http-port (DYN_HTTP_PORT)"


def bind(host: str, port: int, option: str = HTTP_OPTION) -> socket.socket:
    """Return a socket bound to an address, not listening yet. Raises ConfigError, which says what to do.

    `option` is the one that has the port."""
    try:
        [(family, _, _, _, address), *_] = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as exc:
        raise ConfigError(
            f"DYN_HTTP_HOST={host!r}: {exc.strerror}: write an address of this machine"
        ) from exc
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as exc:
        listener.close()
        raise _refused(host, port, option, exc) from exc
    listener.setblocking(False)
    return listener


def url_of(listener: socket.socket, scheme: str = "http") -> str:
    """Return the URL that a browser on this machine opens."""
    host, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.is_unspecified:
        return f"{scheme}://localhost:{port}"
    return f"{scheme}://[{host}]:{port}" if address.version == 6 else f"{scheme}://{host}:{port}"


class SharedPort:
    """A port for several processes, reserved until `close`. `open` makes a socket for each.

    Linux gives each new connection to one of the sockets that listen (SO_REUSEPORT), so a process that has
    not begun to listen gets none, and one that has ended gets none any more. Elsewhere all processes accept
    from one queue.

    The first socket listens before SO_REUSEPORT is set, so a program that has the port already, or another
    frontend, is an error. A program of the same user that sets SO_REUSEPORT itself could still join later.
    """

    def __init__(self, host: str, port: int, option: str = HTTP_OPTION, scheme: str = "http") -> None:
        """Reserve the port; 0: a free one. Raises ConfigError if it cannot be had."""
        self._scheme = scheme
        self._first: socket.socket | None = bind(host, port, option)
        try:
            self._first.listen(BACKLOG)
            self._address = self._first.getsockname()
            if _BALANCES:
                self._first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                self._reserve = self._bind_another(self._first.family)
                # Without it, a program that sets SO_REUSEADDR could bind the port while no socket listens.
                self._reserve.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            else:
                self._reserve = self._first.dup()
        except OSError as exc:
            self._first.close()
            raise _refused(host, port, option, exc) from exc

    def open(self) -> socket.socket:
        """Return a socket for a further process, which listens on it. Raises OSError."""
        if self._first is not None:
            first, self._first = self._first, None
            return first
        return self._bind_another(self._reserve.family) if _BALANCES else self._reserve.dup()

    def close(self) -> None:
        """Give the port up, but for the sockets that `open` has returned. Idempotent."""
        self._reserve.close()
        if self._first is not None:
            self._first.close()

    @property
    def number(self) -> int:
        """The number of the port."""
        port: int = self._address[1]
        return port

    @property
    def url(self) -> str:
        """The URL that a browser on this machine opens."""
        return url_of(self._reserve, self._scheme)

    def _bind_another(self, family: int) -> socket.socket:
        another = socket.socket(family, socket.SOCK_STREAM)
        try:
            another.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            another.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            another.bind(self._address)
        except OSError:
            another.close()
            raise
        return another


def _refused(host: str, port: int, option: str, exc: OSError) -> ConfigError:
    if exc.errno == errno.EADDRINUSE:
        return ConfigError(
            f"port {port} is in use: stop the program that has it, or choose another with {option}; 0 takes "
            "a free one"
        )
    if exc.errno == errno.EACCES:
        return ConfigError(f"port {port} needs a privilege: choose one above 1023 with {option}")
    return ConfigError(f"cannot listen on {host}:{port}: {exc.strerror}: set --http-host (DYN_HTTP_HOST)")
