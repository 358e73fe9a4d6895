"""The connections to one instance, shared by the requests that go there.

Requests share connections: one is enough for an instance until its socket takes no more, then another is
opened beside it, up to `DYN_TCP_POOL_SIZE`. A request never waits for a connection while there is one. A
pool without any parks its requests, which are bounded by the connect time-out, their deadlines and their
callers. When an instance neither answers a PING nor lets itself be dialled for `QUIET_AT` sweeps, the pool
says so, and goes on waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import CannotConnect, ConnectionLost, Draining, PlaneError
from dynamo_redis.planes.address import parse_address
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.tcp_calling import ClientConnection
from dynamo_redis.planes.tcp_connection import QUIET_AT, SWEEPS_PER_INTERVAL
from dynamo_redis.planes.tcp_stream import TcpResponseStream
from dynamo_redis.wire.decoder import ReadBuffers


class Pool:
    """The connections to one instance, and the requests that wait for the first of them."""

    def __init__(
        self,
        target: Target,
        settings: PlaneSettings,
        loop: asyncio.AbstractEventLoop,
        buffers: ReadBuffers,
        on_empty: Callable[[Pool], None],
        on_quiet: Callable[[Target], None],
    ) -> None:
        self.target = target
        self.settings = settings
        self.loop = loop
        self._on_empty = on_empty
        self._on_quiet = on_quiet
        self._dial_is_quiet = False
        self._awaiting: list[asyncio.Future[ClientConnection]] = []
        self._buffers = buffers
        self._connections: list[ClientConnection] = []
        self._connecting: asyncio.Task[None] | None = None
        self._parked: dict[TcpResponseStream, None] = {}
        self._draining: Draining | None = None

    def __repr__(self) -> str:
        streams = sum(len(connection.streams) for connection in self._connections)
        return (
            f"<Pool {self.target.address}: {len(self._connections)} connections, {streams} streams, "
            f"{len(self._parked)} parked>"
        )

    @property
    def pending_count(self) -> int:
        """Requests under way, parked ones included."""
        return len(self._parked) + sum(len(connection.streams) for connection in self._connections)

    @property
    def connection_count(self) -> int:
        """Connections, those in their handshake included."""
        return len(self._connections)

    def begin(self, stream: TcpResponseStream) -> None:
        """Send the stream's request, or park it until there is a connection."""
        connection = self._pick()
        if connection is not None:
            connection.begin(stream)
        elif self._draining is not None:
            stream.lose(self._draining)
        else:
            self._parked[stream] = None
            stream.park(self)
            self._connect()
            if self._dial_is_quiet:
                self.loop.call_soon(self._on_quiet, self.target)

    def remove(self, stream: TcpResponseStream) -> None:
        """Forget a parked stream that has ended."""
        self._parked.pop(stream, None)

    def _pick(self) -> ClientConnection | None:
        best = None
        for connection in self._connections:
            if connection.usable:
                if not connection.paused:
                    return connection
                if best is None or len(connection.streams) < len(best.streams):
                    best = connection
        if best is not None and len(self._connections) < self.settings.pool_size:
            self._connect()
        return best

    def _connect(self) -> None:
        if self._connecting is None:
            self._connecting = self.loop.create_task(self._open_connection())

    async def _open_connection(self) -> None:
        error: PlaneError = ConnectionLost("the client was closed")
        connection: ClientConnection | None = None
        try:
            connection = await self._dial()
            error = connection.error or self._draining or ConnectionLost("the connection broke")
        except PlaneError as exc:
            error = exc
        finally:
            self._connecting = None
            parked, self._parked = self._parked, {}
            awaiting, self._awaiting = self._awaiting, []
            if connection is not None and not connection.usable:
                connection = None
            for stream in parked:
                if connection is not None:
                    connection.begin(stream)
                else:
                    stream.lose(error)
            for connected in awaiting:
                if connected.done():
                    continue
                if connection is not None:
                    connected.set_result(connection)
                else:
                    connected.set_exception(error)
            self._discard_if_empty()

    async def _dial(self) -> ClientConnection:
        """A connection whose handshake is done. Raises CannotConnect, AuthenticationFailed, …"""
        address, timeout_s = self.target.address, self.settings.connect_timeout_s
        connection: ClientConnection | None = None
        quiet_after_s = self.settings.keepalive_interval_s * QUIET_AT / SWEEPS_PER_INTERVAL
        quiet_handle = self.loop.call_later(quiet_after_s, self._note_quiet_dial)
        try:
            host, port = parse_address(address)
            async with asyncio.timeout(timeout_s):
                _, connection = await self.loop.create_connection(
                    lambda: ClientConnection(self, self.target, self.settings, self.loop, self._buffers),
                    host,
                    port,
                )
                self._connections.append(connection)
                await connection.shaken
            return connection
        except TimeoutError:
            self._abandon(connection)
            raise CannotConnect(f"no answer from {address} in {timeout_s} s") from None
        except (OSError, ValueError, ConnectionLost) as exc:
            raise CannotConnect(f"cannot connect to {address}: {exc}") from exc
        except asyncio.CancelledError:
            self._abandon(connection)
            raise
        finally:
            quiet_handle.cancel()
            self._dial_is_quiet = False

    def _abandon(self, connection: ClientConnection | None) -> None:
        if connection is not None:
            connection.fail(ConnectionLost("the handshake was given up"))

    async def ping(self, timeout_s: float) -> None:
        """Wait until the instance has answered a PING. Raises PlaneError."""
        connection: ClientConnection | None = None
        try:
            async with asyncio.timeout(timeout_s):
                connection = self._pick() or await self._connected()
                await connection.ping()
        except TimeoutError:
            if connection is not None and not connection.streams:
                # Nothing sweeps it, and the kernel may try for minutes: the next PING is to dial anew.
                connection.fail(ConnectionLost("a PING was not answered"))
            raise CannotConnect(f"no answer from {self.target.address} in {timeout_s} s") from None

    async def _connected(self) -> ClientConnection:
        if self._draining is not None:
            raise self._draining
        connected: asyncio.Future[ClientConnection] = self.loop.create_future()
        self._awaiting.append(connected)
        self._connect()
        return await connected

    def _note_quiet_dial(self) -> None:
        self._dial_is_quiet = True
        self.on_quiet()

    def on_quiet(self) -> None:
        """The instance owes an answer."""
        self._on_quiet(self.target)

    def on_draining(self, error: Draining) -> None:
        """The instance takes no more requests."""
        self._draining = error

    def on_closed(self, connection: ClientConnection) -> None:
        """A connection has ended."""
        if connection in self._connections:
            self._connections.remove(connection)
        self._discard_if_empty()

    def _discard_if_empty(self) -> None:
        if not self._connections and not self._parked and self._connecting is None:
            self._on_empty(self)

    def end(self, error: PlaneError, subject: str | None = None) -> None:
        """Fail the requests of one endpoint, or all; close the connections that have none left."""
        for stream in tuple(self._parked):
            if subject in (None, stream.subject):
                stream.lose(error)
        for connection in tuple(self._connections):
            for stream in tuple(connection.streams.values()):
                if subject in (None, stream.subject):
                    stream.fail(error)
            if not connection.streams:
                connection.close()

    async def aclose(self) -> None:
        """Close everything. Requests under way end with ConnectionLost."""
        connecting = self._connecting
        if connecting is not None:
            connecting.cancel()
            await asyncio.wait([connecting])
        self.end(ConnectionLost("the client was closed"))
