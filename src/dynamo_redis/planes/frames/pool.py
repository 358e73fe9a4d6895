"""The connections to one instance, shared by the requests that go there.

**Which connection.** One connection carries all small requests: more connections cost CPU and gain nothing.
Small requests would wait behind a large payload on it. So large requests, and requests of endpoints that have
answered small ones with large items, go to another connection, and a small request skips a connection that is
busy with a large payload. When all are busy another is dialled, up to `DYN_TCP_POOL_SIZE`. Earlier
connections are preferred, so later ones become idle and close when the load falls.

**Waiting.** A request is parked if there is no connection. A small one is also parked if all are busy and
another is being dialled; if that dial takes long, it goes to a busy one. Parked requests end with the connect
time-out, their deadlines or their callers. After a failed dial the next one waits for a random time, which
spreads the callers of a worker that comes back. A probe does not wait: it has pauses of its own. If an
instance neither answers a PING nor a dial for `QUIET_AT` sweeps, the pool calls `on_quiet`, and goes on
waiting.

**Bounds.** Two queues can form: parked requests, and bytes that a connection's socket does not take. Each
holds at most `MAX_QUEUED_MESSAGES` times the largest message, and at most `MAX_PARKED_COUNT` requests are
parked. Further requests end as Overloaded.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextvars import Context
from functools import partial
from typing import Final

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import (
    CannotConnect,
    ConnectionLost,
    Draining,
    NotAccepted,
    Overloaded,
    PlaneError,
)
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.frames.carrier import Carrier
from dynamo_redis.planes.frames.client_connection import LARGE_BYTES, ClientConnection
from dynamo_redis.planes.frames.connection import QUIET_AT, SWEEPS_PER_INTERVAL
from dynamo_redis.planes.frames.response_stream import FrameResponseStream
from dynamo_redis.wire.decoder import ReadBuffers

MAX_PARKED_COUNT: Final = 4096
MAX_QUEUED_MESSAGES: Final = 8
REDIAL_PAUSE_S: Final = (0.05, 0.5)
"""The longest pause after the first failed dial, which doubles with each failure, and its limit."""

FAILURES_REMEMBERED_S: Final = 10.0
"""Seconds for which a pool without requests or connections remembers that its dials failed."""


class Pool:
    """The connections to one instance, and the requests that wait for the first of them."""

    def __init__(
        self,
        target: Target,
        settings: PlaneSettings,
        carrier: Carrier,
        loop: asyncio.AbstractEventLoop,
        buffers: ReadBuffers,
        variables: Context,
        on_empty: Callable[[], object],
        on_quiet: Callable[[Target], None],
    ) -> None:
        """Make an empty pool.

        Args:
            target: any endpoint of the instance.
            settings: the plane's settings.
            carrier: opens the connections.
            loop: the event loop of the connections.
            buffers: the read buffers that the client's connections share.
            variables: the context variables that the connections run in, not a request's.
            on_empty: is called when the pool has no connection, request or failure to remember.
            on_quiet: see `select.make_client`.
        """
        self.target = target
        self.settings = settings
        self._carrier = carrier
        self.loop = loop
        self._variables = variables
        self._on_empty = on_empty
        self._on_quiet = on_quiet
        self._buffers = buffers
        self._connections: list[ClientConnection] = []
        self._large_answers: set[str] = set()
        self._parked: dict[FrameResponseStream, int] = {}
        self._parked_bytes = 0
        self._max_queued_bytes = MAX_QUEUED_MESSAGES * settings.max_message_bytes
        self._dial_waiters: list[asyncio.Future[ClientConnection]] = []
        self._draining: Draining | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._dial_is_quiet = False
        self._failed_dials = 0
        self._dial_from = 0.0
        self._dial_timer: asyncio.TimerHandle | None = None
        self._forget_timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        streams = sum(len(connection.streams) for connection in self._connections)
        return (
            f"<Pool {self.target.address}: {len(self._connections)} connections, {streams} streams, "
            f"{len(self._parked)} parked>"
        )

    @property
    def pending_count(self) -> int:
        """Count of pending requests, parked ones included."""
        return len(self._parked) + sum(len(connection.streams) for connection in self._connections)

    @property
    def connection_count(self) -> int:
        """Count of connections, those in their handshake included."""
        return len(self._connections)

    # ------------------------------------------------------------------- requests

    def submit(self, stream: FrameResponseStream) -> None:
        """Send the stream's request, or park it until there is a connection."""
        if stream.payload_bytes > LARGE_BYTES or stream.subject in self._large_answers:
            connection = self._pick_for_large()
        else:
            connection = self._pick()
            if connection is not None and _is_busy(connection):
                is_coming = self._connecting is not None and not self._dial_is_quiet
                if is_coming and len(self._parked) < MAX_PARKED_COUNT:
                    connection = None
        if connection is None:
            self._park(stream)
        elif connection.paused and connection.unsent_bytes > self._max_queued_bytes:
            stream.end_without_cancel(Overloaded("the connections to the worker take no more"))
        else:
            connection.send_request(stream)

    def remove(self, stream: FrameResponseStream) -> None:
        """Forget a parked stream that has ended."""
        self._parked_bytes -= self._parked.pop(stream, 0)

    def _pick(self) -> ClientConnection | None:
        """Choose the first connection that is not busy with a large payload.

        If all are busy, dial another one, and choose the least busy.
        """
        for connection in self._connections:
            if connection.usable and not _is_busy(connection):
                return connection
        usable = self._usable()
        if usable:
            self._extend()
        return min(usable, key=_unsent_bytes, default=None)

    def _least_busy(self) -> ClientConnection | None:
        """Choose the least busy of the connections that are not stale; None without any."""
        answering = [connection for connection in self._usable() if not connection.is_stale]
        return min(answering, key=_unsent_bytes, default=None)

    def _pick_for_large(self) -> ClientConnection | None:
        """Choose a connection for a large payload: not the first, if there is another.

        Another one is dialled if there is only one, or if the chosen one has over `max_message_bytes` unsent.
        """
        usable = self._usable()
        choice = usable[1:] or usable
        best = min(choice, key=_unsent_bytes, default=None)
        if best is not None and (choice is usable or best.unsent_bytes > self.settings.max_message_bytes):
            self._extend()
        return best

    def _usable(self) -> list[ClientConnection]:
        return [connection for connection in self._connections if connection.usable]

    def _extend(self) -> None:
        """Dial another connection, unless the pool is full."""
        if len(self._connections) < self.settings.pool_size:
            self._connect()

    def on_large_answer(self, subject: str) -> None:
        """Note an endpoint that answers small requests with large items."""
        self._large_answers.add(subject)

    def _park(self, stream: FrameResponseStream) -> None:
        """Let the stream wait for a connection, within the bounds, and dial."""
        if self._draining is not None:
            stream.end_without_cancel(self._draining)
            return
        size_bytes = stream.payload_bytes
        too_much = self._parked_bytes + size_bytes > self._max_queued_bytes
        if len(self._parked) >= MAX_PARKED_COUNT or too_much:
            stream.end_without_cancel(Overloaded("too many requests wait for a connection to the worker"))
            return
        self._parked[stream] = size_bytes
        self._parked_bytes += size_bytes
        stream.park(self)
        self._connect()
        if self._dial_is_quiet:
            self.loop.call_soon(self._on_quiet, self.target)

    # ------------------------------------------------------------------- dialling

    def _connect(self, *, at_once: bool = False) -> None:
        """Dial, unless a dial is under way; after a failed one, in its pause, only if `at_once`, else
        later."""
        if self._connecting is not None:
            return

        def dial_if_wanted() -> None:
            self._dial_timer = None
            if self._parked or self._connections:
                self._dial(give_up_at)

        now = self.loop.time()
        give_up_at = now + self.settings.connect_timeout_s
        if at_once or now >= self._dial_from:
            self._dial(give_up_at)
        elif self._dial_timer is None:
            self._dial_timer = self.loop.call_at(self._dial_from, dial_if_wanted)

    def _dial(self, give_up_at: float) -> None:
        self._stop_dial_timer()
        self._connecting = self.loop.create_task(
            self._open_connection(give_up_at), context=self._variables.copy()
        )

    async def _open_connection(self, give_up_at: float) -> None:
        """Dial once. Then start the parked requests on the connection or on a busy one, or end them with the
        error; and hand the connection or the error to the probes that wait for it."""
        quiet_after_s = self.settings.keepalive_interval_s * QUIET_AT / SWEEPS_PER_INTERVAL
        quiet_timer = self.loop.call_later(quiet_after_s, self._note_quiet_dial)
        make = partial(ClientConnection, self, self.target, self.settings, self.loop, self._buffers)
        connection: ClientConnection | None = None
        error: PlaneError = ConnectionLost("the client was closed")
        try:
            connection = await self._carrier.dial(self.target, make, self._connections.append, give_up_at)
            error = connection.error or self._draining or ConnectionLost("the connection broke")
            self._forget_failures()
            for other in tuple(self._connections):
                if other.is_stale:  # silent since it was idle, while the instance answers a dial
                    other.resend_unproven()
                    other.fail(ConnectionLost("the connection was dropped on its way while it was idle"))
        except PlaneError as exc:
            error = exc
            self._note_failed_dial()
        finally:
            quiet_timer.cancel()
            self._dial_is_quiet = False
            self._connecting = None
            if connection is not None and not connection.usable:
                connection = None
            self._start_parked(connection or self._least_busy(), error)
            waiters, self._dial_waiters = self._dial_waiters, []
            for connected in waiters:
                if connected.done():
                    continue
                if connection is not None:
                    connected.set_result(connection)
                else:
                    connected.set_exception(error)
            self._discard_if_empty()

    def _start_parked(self, connection: ClientConnection | None, error: PlaneError) -> None:
        """Start the parked requests on the connection; without one, end them with `error`."""
        parked, self._parked = self._parked, {}
        self._parked_bytes = 0
        for stream in parked:
            if connection is not None:
                connection.send_request(stream)
            else:
                stream.end_without_cancel(error)

    def _note_failed_dial(self) -> None:
        """Set the random pause before the next dial, and the time to forget the failures."""
        least_s, most_s = REDIAL_PAUSE_S
        most_s = min(most_s, self.settings.connect_timeout_s / 2)  # a request's time-out includes the pause
        longest_s = min(least_s * 2.0 ** min(self._failed_dials, 16), most_s)
        self._failed_dials += 1
        self._dial_from = self.loop.time() + random.uniform(0, longest_s)  # noqa: S311 - jitter
        self._stop_forget_timer()
        self._forget_timer = self.loop.call_later(FAILURES_REMEMBERED_S, self._forget_and_discard)

    def _forget_failures(self) -> None:
        self._failed_dials = 0
        self._dial_from = 0.0
        self._stop_forget_timer()

    def _forget_and_discard(self) -> None:
        self._forget_failures()
        self._discard_if_empty()

    def _stop_dial_timer(self) -> None:
        if self._dial_timer is not None:
            self._dial_timer.cancel()
            self._dial_timer = None

    def _stop_forget_timer(self) -> None:
        if self._forget_timer is not None:
            self._forget_timer.cancel()
            self._forget_timer = None

    # ------------------------------------------------------------------- probes

    async def ping(self, timeout_s: float) -> None:
        """Wait until the instance has answered a PING.

        Raises PlaneError: NotAccepted if its process lives but its event loop is busy.
        """

        async def shows_life() -> bool:
            """Ask for a sign of life after a third of the time; return whether the process gives one."""
            await asyncio.sleep(timeout_s / 3)
            try:
                return await self.ask_for_life()
            except (OSError, ValueError):
                return False

        connection: ClientConnection | None = None
        life = self.loop.create_task(shows_life(), context=self._variables.copy())
        try:
            async with asyncio.timeout(timeout_s):
                connection = self._pick_for_ping()
                if connection is None:
                    if self._draining is not None:
                        raise self._draining
                    connected: asyncio.Future[ClientConnection] = self.loop.create_future()
                    self._dial_waiters.append(connected)
                    self._connect(at_once=True)
                    connection = await connected
                await connection.ping()
        except TimeoutError:
            if life.done() and life.result():
                raise NotAccepted(f"the process at {self.target.address} lives, but is busy") from None
            if connection is not None and not connection.streams:
                # It is not swept, and the kernel may try for minutes: the next PING must dial again.
                connection.fail(ConnectionLost("a PING was not answered"))
            raise CannotConnect(f"no answer from {self.target.address} in {timeout_s} s") from None
        finally:
            life.cancel()

    def _pick_for_ping(self) -> ClientConnection | None:
        """Choose a connection that is neither busy with a large payload nor stale; None to dial another
        one."""
        for connection in self._connections:
            if connection.usable and not (_is_busy(connection) or connection.is_stale):
                return connection
        if len(self._connections) < self.settings.pool_size:
            return None
        return self._least_busy()

    # ------------------------------------------------------------------- events of connections
    # (ConnectionOwner)

    def _note_quiet_dial(self) -> None:
        """Handle a dial without an answer for `QUIET_AT` sweeps: do not wait for it any longer."""
        self._dial_is_quiet = True
        error = CannotConnect(f"no connection to {self.target.address} yet")
        busy = self._least_busy()
        if busy is not None:
            self._start_parked(busy, error)
        for stream in tuple(self._parked):
            if stream.sent:  # it was lost with a stale connection: its caller may try another instance
                stream.end_without_cancel(error)
        self._on_quiet(self.target)

    async def ask_for_life(self) -> bool:
        """See `Carrier.ask_for_life`."""
        return await self._carrier.ask_for_life(self.target)

    def on_quiet(self, connection: ClientConnection) -> None:
        """Handle a silent instance. If its connection may be stale, dial another one to find out."""
        if connection.is_stale:
            self._connect(at_once=True)
        self._on_quiet(self.target)

    def resend(self, stream: FrameResponseStream) -> None:
        """Park a request that was lost with a stale connection, until there is a fresh one."""
        if self._dial_is_quiet:
            stream.end_without_cancel(CannotConnect(f"no connection to {self.target.address} yet"))
        else:
            self._park(stream)

    def on_draining(self, error: Draining) -> None:
        """Note that the instance accepts no more requests."""
        self._draining = error

    def on_closed(self, connection: ClientConnection) -> None:
        """Forget a connection that has ended."""
        if connection in self._connections:
            self._connections.remove(connection)
        self._discard_if_empty()

    # ------------------------------------------------------------------- the end

    def _discard_if_empty(self) -> None:
        if not (self._connections or self._parked or self._connecting or self._failed_dials):
            self._on_empty()

    def end(self, error: PlaneError, subject: str | None = None) -> None:
        """Fail the requests of one endpoint, or all; close connections without requests.

        With `subject`, a connection stays that a probe or requests of other endpoints wait for.
        """
        for stream in tuple(self._parked):
            if subject in (None, stream.subject):
                stream.end_without_cancel(error)
        for connection in tuple(self._connections):
            for stream in tuple(connection.streams.values()):
                if subject in (None, stream.subject):
                    stream.fail(error)
            if connection.handshake_done.done():
                is_wanted = connection.is_pinged
            else:
                is_wanted = bool(self._parked or self._dial_waiters)
            if not connection.streams and (subject is None or not is_wanted):
                connection.close()
        if not self._parked:
            self._stop_dial_timer()
            self._forget_and_discard()

    async def aclose(self) -> None:
        """Close all connections. Pending requests end with ConnectionLost."""
        error = ConnectionLost("the client was closed")
        for stream in tuple(self._parked):
            stream.end_without_cancel(error)
        connecting = self._connecting
        if connecting is not None:
            connecting.cancel()
            await asyncio.wait([connecting])
        self.end(error)


def _is_busy(connection: ClientConnection) -> bool:
    """Return whether a request would wait there, behind a large request or a large answer."""
    return connection.paused or connection.receives_large


def _unsent_bytes(connection: ClientConnection) -> int:
    return connection.unsent_bytes
