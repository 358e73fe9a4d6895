"""The door of the frontend: how many connections there may be, and who makes room for others.

The listening socket is served as that of a worker is (`planes/tcp/listener`), so that at the limit of open
files a client is told so, and a flood of connections waits in the kernel.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Final, Protocol

from dynamo_redis.errors import Overloaded, PlaneError
from dynamo_redis.frontend.http.errors import api_error
from dynamo_redis.planes.tcp.listener import SocketListener, connection_limit
from dynamo_redis.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)

BACKLOG: Final = 2048


class Guest(Protocol):
    """A connection that may have to make room."""

    def give_way(self) -> None:
        """Close the connection; the client may connect again."""


class Door:
    """Lets connections in while there are fewer than may be.

    Past that, the one makes room that has been without a whole request for longest: an honest client sends
    its request within milliseconds, or is between two. If all have one, the newcomer is refused.
    """

    def __init__(
        self,
        listening: socket.socket,
        make_guest: Callable[[], asyncio.Protocol],
        guests: Collection[object],
        waiting: dict[Guest, None],
        wanted_count: int,
    ) -> None:
        """`guests` are the open connections, `waiting` those without a whole request, the longest first."""
        self._loop = asyncio.get_running_loop()
        self._make_guest = make_guest
        self._guests = guests
        self._waiting = waiting
        self._most_count = connection_limit(wanted_count)
        self._arriving: set[asyncio.Task[object]] = set()
        self._complaints = RateLimitedLog(log, logging.WARNING)
        listening.listen(BACKLOG)
        self._listener = SocketListener(self._loop, [listening], self._let_in, refuse=turn_away)

    def close(self) -> None:
        """Let no one in any more. Idempotent."""
        self._listener.close()

    async def wait_closed(self) -> None:
        """Wait until those who were let in have come through."""
        await asyncio.gather(*self._arriving, return_exceptions=True)

    def _let_in(self, sock: socket.socket) -> None:
        if len(self._guests) + len(self._arriving) >= self._most_count and not self._make_room():
            self._complaints.log(
                "connections are refused: %d are open, and all have a request", self._most_count
            )
            turn_away(sock, Overloaded(f"{self._most_count} connections are open (DYN_HTTP_MAX_CONNECTIONS)"))
            return
        coming = self._loop.create_task(self._come_in(sock))
        self._arriving.add(coming)
        coming.add_done_callback(self._arriving.discard)

    async def _come_in(self, sock: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make_guest, sock)
        except OSError:  # it has gone already
            sock.close()

    def _make_room(self) -> bool:
        if not self._waiting:
            return False
        guest = next(iter(self._waiting))
        del self._waiting[guest]
        guest.give_way()
        return True


def turn_away(sock: socket.socket, error: PlaneError) -> None:
    """Answer 503 to whatever a client asks, and close. Never waits."""
    refusal = api_error(error)
    body = refusal.body_bytes()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    lines = b"".join(b"%s: %s\r\n" % header for header in [*headers, *refusal.headers()])
    with suppress(OSError):
        sock.setblocking(False)
        sock.send(b"HTTP/1.1 503 Service Unavailable\r\n" + lines + b"connection: close\r\n\r\n" + body)
        sock.shutdown(socket.SHUT_WR)
        sock.recv(65536)  # what is unread at the close would have the kernel reset the connection
    sock.close()
