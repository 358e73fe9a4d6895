"""The TLS handshakes of a server: a connection reaches it once its TLS stands.

The gate takes the socket of each accepted connection, waits for its first byte, and gives it to the event
loop with the present certificates. A handshake has a time-out. At most
`MAX_WAITING_COUNT` are under way: past that the oldest is dropped; an honest handshake takes milliseconds.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from dynamo_redis.planes.address import format_address
from dynamo_redis.planes.reloaded import ReloadedContext
from dynamo_redis.planes.tcp.life_signs import asks_for_life
from dynamo_redis.planes.tcp.tls import explain
from dynamo_redis.rate_limited_log import RateLimitedLog

MAX_WAITING_COUNT: Final = 1024
"""The most connections in a TLS handshake. One that stops there costs 50 KiB with uvloop, else 300."""

_TLS_RECORD: Final = b"\x16"  # RFC 8446, 5.1: a handshake record, as the first of every connection is
_LEAST_S: Final = 0.01
_log = logging.getLogger(__name__)


class TlsGate:
    """Holds the connections in their TLS handshake.

    It owns a task for each, which ends with the handshake, after the time-out, or by `aclose`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        tls: ReloadedContext,
        make_protocol: Callable[[], asyncio.BaseProtocol],
        timeout_s: float,
        refuse: Callable[[socket.socket], None],
        remedy: str,
    ) -> None:
        """`make_protocol` makes the protocol of a connection whose TLS stands; `timeout_s` bounds a
        handshake. `refuse` answers and closes a connection that does not speak TLS; `remedy` is for the
        log."""
        self._refuse = refuse
        self._remedy = remedy
        self._loop = loop
        self._tls = tls
        self._make_protocol = make_protocol
        self._timeout_s = timeout_s
        self._arrivals: dict[asyncio.Task[None], _Arrival] = {}
        self._complaints = RateLimitedLog(_log)

    @property
    def waiting_count(self) -> int:
        """Count of connections in their TLS handshake."""
        return len(self._arrivals)

    async def aclose(self) -> None:
        """Drop the connections in their TLS handshake. Idempotent."""
        tasks = list(self._arrivals)
        while self._arrivals:
            self.drop_oldest()
        if tasks:
            await asyncio.wait(tasks, timeout=self._timeout_s)

    def drop_oldest(self) -> None:
        """Drop the connection whose handshake began first, if there is one."""
        for task, arrival in self._arrivals.items():
            del self._arrivals[task]
            arrival.drop(task)
            return

    def admit(self, sock: socket.socket) -> None:
        """Begin the handshake of a connection. The gate owns its socket from now on."""
        if len(self._arrivals) >= MAX_WAITING_COUNT:
            self.drop_oldest()
        arrival = _Arrival(sock)
        task = self._loop.create_task(self._do_handshake(arrival))
        self._arrivals[task] = arrival
        task.add_done_callback(lambda done: self._arrivals.pop(done, None))
        task.add_done_callback(lambda _: arrival.close())

    async def _do_handshake(self, arrival: _Arrival) -> None:
        """Wait for the first byte, then hand the socket to the event loop with TLS, or refuse it."""
        give_up_at = self._loop.time() + self._timeout_s
        try:
            async with asyncio.timeout_at(give_up_at):
                first = await self._first_byte(arrival.sock)
            if first == _TLS_RECORD:
                await self._loop.connect_accepted_socket(
                    self._make_protocol,
                    arrival.hand_over(),
                    ssl=self._tls.current(),
                    ssl_handshake_timeout=max(give_up_at - self._loop.time(), _LEAST_S),
                )
            elif first and not asks_for_life(arrival.sock):
                self._note(arrival, f"it does not speak TLS: {self._remedy}")
                self._refuse(arrival.hand_over())
        except TimeoutError:
            self._note(arrival, f"it says nothing for {self._timeout_s} s")
        except ConnectionError as exc:
            reason = str(exc) or "it ended the connection; perhaps it refuses this side's certificate"
            self._note(arrival, reason)
        except OSError as exc:
            self._note(arrival, explain(exc))

    async def _first_byte(self, sock: socket.socket) -> bytes:
        """Wait for the first byte, and return it without removing it; empty if the peer closes. Raises
        OSError."""
        readable = self._loop.create_future()

        def wake() -> None:
            if not readable.done():
                readable.set_result(None)

        self._loop.add_reader(sock, wake)
        try:
            await readable
        finally:
            self._loop.remove_reader(sock)
        return sock.recv(1, socket.MSG_PEEK)

    def _note(self, arrival: _Arrival, why: str) -> None:
        self._complaints.log("no TLS with %s: %s", arrival.peer, why)


class _Arrival:
    """A connection in its TLS handshake. Its socket is closed here, unless it has been handed over."""

    __slots__ = ("_owns_socket", "peer", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.peer = "a caller"
        self._owns_socket = True
        with suppress(OSError):
            self.peer = format_address(*sock.getpeername()[:2])

    def hand_over(self) -> socket.socket:
        """Return the socket to code that closes it from now on."""
        self._owns_socket = False
        return self.sock

    def drop(self, task: asyncio.Task[None]) -> None:
        """End the handshake."""
        if self._owns_socket:
            task.cancel()
        else:
            # The event loop notices it by the socket. If the task were cancelled in the turn in which TLS
            # stands, asyncio would close the connection without telling the protocol that has it already.
            with suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket. Idempotent."""
        if self._owns_socket:
            self.sock.close()
