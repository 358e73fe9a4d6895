"""Accepting the frontend's connections, up to a maximum. Beyond it, new connections replace idle ones.

The listening socket is served by the workers' `planes/tcp/listener`: at the limit of open files a client gets
an answer that says so, and a flood of connections waits in the kernel.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Final, Protocol

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from dynamo_redis.errors import Overloaded, PlaneError
from dynamo_redis.frontend.http.errors import ApiError, api_error
from dynamo_redis.frontend.http.port import BACKLOG
from dynamo_redis.planes.reloaded import ReloadedContext
from dynamo_redis.planes.tcp.listener import SocketListener, connection_limit
from dynamo_redis.planes.tcp.tls_gate import TlsGate
from dynamo_redis.rate_limited_log import RateLimitedLog

HANDSHAKE_S: Final = 10.0
"""Longest time of a TLS handshake."""

log = logging.getLogger(__name__)


class Evictable(Protocol):
    """A connection that can be closed in favour of another."""

    def evict(self) -> None:
        """Close the connection; the client may connect again."""


class Acceptor:
    """Accepts connections up to a maximum.

    At the maximum, a new connection replaces the one that has been without a whole request for longest: an
    honest client sends its request within milliseconds, or is between two requests. If all connections have
    a request, the new one is refused.
    """

    def __init__(
        self,
        listening: socket.socket,
        make_protocol: Callable[[], asyncio.Protocol],
        connections: Collection[object],
        waiting: dict[Evictable, None],
        max_count: int,
        tls: ReloadedContext | None = None,
        overload_status: int = 503,
    ) -> None:
        """Listen, and accept from now on.

        Args:
            listening: the bound socket.
            make_protocol: makes the protocol of a new connection.
            connections: the open connections.
            waiting: the connections without a whole request, the longest-waiting first.
            max_count: the most connections; fewer if the limit of open files allows fewer.
            tls: the certificate of the port; None: connections are in the clear.
            overload_status: the HTTP status of a connection that is refused for lack of room.
        """
        self._loop = asyncio.get_running_loop()
        self._make_protocol = make_protocol
        self._connections = connections
        self._waiting = waiting
        self._max_count = connection_limit(max_count)
        self._overload_status = overload_status
        self._opening: set[asyncio.Task[object]] = set()
        self._log = RateLimitedLog(log, logging.WARNING)
        self._gate: TlsGate | None = None
        if tls is not None:
            self._gate = TlsGate(
                self._loop, tls, make_protocol, HANDSHAKE_S, refuse_clear_text, "its URL begins with https://"
            )
        listening.listen(BACKLOG)
        self._listener = SocketListener(self._loop, [listening], self._accept, refuse=self._refuse)

    def close(self) -> None:
        """Accept the connections that have arrived, and no more. Idempotent.

        The kernel resets those that wait when the last copy of the socket is closed.
        """
        self._listener.accept_waiting()
        self._listener.close()

    async def wait_closed(self) -> None:
        """Wait until the accepted connections are open. Those in a TLS handshake are dropped."""
        await asyncio.gather(*self._opening, return_exceptions=True)
        if self._gate is not None:
            await self._gate.aclose()

    def _accept(self, sock: socket.socket) -> None:
        """Open a connection, or refuse it at the maximum."""
        is_full = len(self._connections) + len(self._opening) >= self._max_count
        if is_full and self._waiting:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            oldest.evict()
        elif is_full:
            self._log.log(
                "connections are refused: %d are open, and all have a request (DYN_HTTP_MAX_CONNECTIONS, or "
                "the limit of open files)",
                self._max_count,
            )
            self._refuse(
                sock, Overloaded(f"{self._max_count} connections are open (DYN_HTTP_MAX_CONNECTIONS)")
            )
            return
        if self._gate is not None:
            self._gate.admit(sock)
            return

        async def connect() -> None:
            try:
                await self._loop.connect_accepted_socket(self._make_protocol, sock)
            except OSError:  # the client has left already
                sock.close()

        task = self._loop.create_task(connect())
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    def _refuse(self, sock: socket.socket, error: PlaneError) -> None:
        refuse_connection(sock, api_error(error).with_overload_as(self._overload_status))


def refuse_clear_text(sock: socket.socket) -> None:
    """Answer a client that does not speak TLS, in the clear."""
    refuse_connection(sock, ApiError(400, "This port speaks HTTPS: write https:// in the URL."))


def refuse_connection(sock: socket.socket, refusal: ApiError) -> None:
    """Answer with an error before any request, and close. Never waits."""
    body = refusal.body_bytes()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    lines = b"".join(b"%s: %s\r\n" % header for header in [*headers, *refusal.headers()])
    with suppress(OSError):
        sock.setblocking(False)
        sock.send(STATUS_LINE[refusal.status] + lines + b"connection: close\r\n\r\n" + body)
        sock.shutdown(socket.SHUT_WR)
        sock.recv(65536)  # with unread bytes, the close would reset the connection
    sock.close()
