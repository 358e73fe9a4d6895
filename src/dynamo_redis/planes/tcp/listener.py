"""Accepts connections: the listening sockets, and the limit of open files.

The event loops' own servers are not used, for two reasons. At the process's limit of open files asyncio logs
each pending connection each second, and uvloop closes callers without a message. And both accept all pending
connections in one turn, while the answers of present connections wait. Here a turn accepts at most
`ACCEPTS_A_TURN`. The rest stays in the kernel's backlog: 4,096 connections, or the limit
`net.core.somaxconn`. Past that the kernel drops the SYN, and the caller's kernel repeats it after a second.

At the limit of open files a file kept in reserve is closed to accept a caller and tell it that the worker is
overloaded.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from dynamo_redis.errors import Overloaded, PlaneError
from dynamo_redis.rate_limited_log import RateLimitedLog
from dynamo_redis.wire.handshake import refusal

BACKLOG: Final = 4096
ACCEPTS_A_TURN: Final = 64

_NO_FILES: Final = (errno.EMFILE, errno.ENFILE)
_PAUSE_S: Final = 0.1
_RESERVED_FILES: Final = 64
"""Files that a process needs beside its server's connections: libraries, Redis, logs, its own connections."""

_log = logging.getLogger(__name__)


class SocketListener:
    """Listens and accepts until `close`. It owns a timer while the system refuses it sockets."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sockets: list[socket.socket],
        on_socket: Callable[[socket.socket], None],
        refuse: Callable[[socket.socket, PlaneError], None] | None = None,
    ) -> None:
        """Accept on sockets that listen already; `open` makes them.

        `on_socket` gets each connection's socket, non-blocking, and must not raise. `refuse` sends a caller
        the error and closes its socket; None: `refuse_socket`.
        """
        self._loop = loop
        self._sockets = sockets
        self._on_socket = on_socket
        self._refuse = refuse_socket if refuse is None else refuse
        self._paused: dict[socket.socket, asyncio.TimerHandle] = {}
        self._reserve = _spare_file()
        self._complaints = RateLimitedLog(_log, logging.ERROR)
        for listening in sockets:
            loop.add_reader(listening, self._accept, listening)

    @classmethod
    async def open(
        cls,
        loop: asyncio.AbstractEventLoop,
        host: str,
        port: int,
        on_socket: Callable[[socket.socket], None],
    ) -> SocketListener:
        """Listen on every address of the host, on one port; 0: a free one. Raises OSError."""
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        sockets: list[socket.socket] = []
        try:
            for family, _, _, _, address in dict.fromkeys(found):
                listening = socket.socket(family, socket.SOCK_STREAM)
                sockets.append(listening)
                listening.setblocking(False)
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listening.bind((address[0], port, *address[2:]))
                listening.listen(BACKLOG)
                port = listening.getsockname()[1]
        except OSError:
            for listening in sockets:
                listening.close()
            raise
        return cls(loop, sockets, on_socket)

    @property
    def sockets(self) -> list[socket.socket]:
        """The listening sockets."""
        return self._sockets

    @property
    def port(self) -> int:
        """The port that all its sockets listen on."""
        return int(self._sockets[0].getsockname()[1])

    def accept_waiting(self) -> None:
        """Accept the connections that are in the backlog now, as before `close`."""
        for listening in self._sockets:
            turns = 0 if listening in self._paused else BACKLOG // ACCEPTS_A_TURN
            while turns and self._accept(listening):
                turns -= 1

    def close(self) -> None:
        """Stop listening. Connections in the backlog are reset. Idempotent."""
        for listening in self._sockets:
            if (timer := self._paused.pop(listening, None)) is not None:
                timer.cancel()
            else:
                self._loop.remove_reader(listening)
            listening.close()
        self._sockets = []
        if self._reserve is not None:
            os.close(self._reserve)
            self._reserve = None

    def _accept(self, listening: socket.socket) -> bool:
        """Accept up to `ACCEPTS_A_TURN` connections; pause if the system refuses the sockets.

        Return whether there may be more.
        """
        for _ in range(ACCEPTS_A_TURN):
            try:
                sock, _address = listening.accept()
            except (BlockingIOError, InterruptedError):
                return False
            except ConnectionAbortedError:  # the caller has gone meanwhile
                continue
            except OSError as exc:
                if exc.errno not in _NO_FILES or not self._refuse_one(listening):
                    self._complaints.log("connections have to wait: %s", exc)
                    self._loop.remove_reader(listening)
                    self._paused[listening] = self._loop.call_later(_PAUSE_S, self._resume, listening)
                    return False
            else:
                sock.setblocking(False)
                self._on_socket(sock)
                if not self._sockets:  # closed meanwhile
                    return False
        return True

    def _refuse_one(self, listening: socket.socket) -> bool:
        """Refuse one connection, with the file in reserve. Return False if that is in use, too."""
        if self._reserve is None:
            return False
        os.close(self._reserve)
        try:
            with suppress(BlockingIOError, ConnectionAbortedError):
                self._refuse(
                    listening.accept()[0],
                    Overloaded("this process has no file left for a connection (RLIMIT_NOFILE)"),
                )
        except OSError:  # another thread was faster
            return False
        finally:
            self._reserve = _spare_file()
        self._complaints.log(
            "connections are refused: every file this process may open is in use (%s)", describe_file_limit()
        )
        return True

    def _resume(self, listening: socket.socket) -> None:
        del self._paused[listening]
        if self._reserve is None:
            self._reserve = _spare_file()
        self._loop.add_reader(listening, self._accept, listening)


def refuse_socket(sock: socket.socket, error: PlaneError) -> None:
    """Send a caller the error as a refusal, and close its socket. Never waits."""
    with suppress(OSError):
        sock.setblocking(False)
        sock.send(refusal(error))
        sock.shutdown(socket.SHUT_WR)
        sock.recv(4096)  # unread bytes at the close would make the kernel reset the connection
    sock.close()


def connection_limit(wanted_count: int) -> int:
    """Return the count of connections that a server may have: `wanted_count`, or less by the limit of
    files."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files == resource.RLIM_INFINITY:
        return wanted_count
    return max(1, min(wanted_count, files - _RESERVED_FILES))


def describe_file_limit() -> str:
    """Describe the limit of open files, and the way to raise it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return (
            f"RLIMIT_NOFILE is {soft}, the most that this process may have: raise it where the process is "
            "started, as by LimitNOFILE= of systemd or --ulimit of Docker"
        )
    most = "without bound" if hard == resource.RLIM_INFINITY else f"up to {hard}"
    return f"RLIMIT_NOFILE is {soft}; `ulimit -n` raises it, {most}"


def _spare_file() -> int | None:
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
