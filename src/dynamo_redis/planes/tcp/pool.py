"""The connections to one instance, shared by the requests that go there.

One connection carries all small requests: more of them cost CPU and gain nothing. What it does not carry well
is a large payload beside small ones, which wait behind it. So large requests, and requests of endpoints that
were seen to answer small ones with large items, go to a connection of their own, and a small request passes
over a connection that is busy with a large payload. Where all are busy another is opened, up to
`DYN_TCP_POOL_SIZE`. Earlier connections are preferred, so later ones become idle, and close, when the load
falls.

A request waits for a connection only where there is none, or, if it is small, where all are busy and another
is being dialled; should that one not come soon, it takes a busy one. Requests that wait are bounded by the
connect time-out, their deadlines and their callers. After a dial that failed the next waits for a random
time, so that the callers of a worker that comes back do not come in step; a probe does not wait, it has
pauses of its own. When an instance neither answers a PING nor lets itself be dialled for `QUIET_AT` sweeps,
the pool says so, and goes on waiting.

Two queues can form here: parked requests, and bytes that a connection's socket does not take. Neither grows
over `MAX_QUEUED_MESSAGES` of the largest size, the first not over `MAX_PARKED_COUNT` either: what comes then
ends as Overloaded.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextvars import Context
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
from dynamo_redis.planes.tcp.client_connection import LARGE_BYTES, ClientConnection
from dynamo_redis.planes.tcp.connection import QUIET_AT, SWEEPS_PER_INTERVAL
from dynamo_redis.planes.tcp.dial import dial
from dynamo_redis.planes.tcp.life_signs import ask_for_life
from dynamo_redis.planes.tcp.response_stream import TcpResponseStream
from dynamo_redis.planes.tcp.tls import TlsContext
from dynamo_redis.wire.decoder import ReadBuffers

MAX_PARKED_COUNT: Final = 4096
MAX_QUEUED_MESSAGES: Final = 8
REDIAL_PAUSE_S: Final = (0.05, 0.5)
"""The longest pause after the first failed dial, which doubles with each, and the longest of all."""
FAILURES_REMEMBERED_S: Final = 10.0
"""How long a pool without requests or connections remembers that its dials failed."""


class Pool:
    """The connections to one instance, and the requests that wait for the first of them."""

    def __init__(
        self,
        target: Target,
        settings: PlaneSettings,
        tls: TlsContext | None,
        loop: asyncio.AbstractEventLoop,
        buffers: ReadBuffers,
        variables: Context,
        on_empty: Callable[[Pool], None],
        on_quiet: Callable[[Target], None],
    ) -> None:
        """`variables` are the context variables that its connections live in: no request's."""
        self.target = target
        self.settings = settings
        self._tls = tls
        self.loop = loop
        self._variables = variables
        self._on_empty = on_empty
        self._on_quiet = on_quiet
        self._buffers = buffers
        self._connections: list[ClientConnection] = []
        self._large_answers: set[str] = set()
        self._parked: dict[TcpResponseStream, int] = {}
        self._parked_bytes = 0
        self._max_queued_bytes = MAX_QUEUED_MESSAGES * settings.max_message_bytes
        self._awaiting: list[asyncio.Future[ClientConnection]] = []
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
        """Requests under way, parked ones included."""
        return len(self._parked) + sum(len(connection.streams) for connection in self._connections)

    @property
    def connection_count(self) -> int:
        """Connections, those in their handshake included."""
        return len(self._connections)

    # ------------------------------------------------------------------- requests

    def begin(self, stream: TcpResponseStream) -> None:
        """Send the stream's request, or park it until there is a connection."""
        if stream.payload_bytes > LARGE_BYTES or stream.subject in self._large_answers:
            connection = self._pick_for_large()
        else:
            connection = self._pick()
            if connection is not None and _is_busy(connection) and self._may_wait_for_dial:
                connection = None
        if connection is None:
            self._park(stream)
        elif connection.paused and connection.unsent_bytes > self._max_queued_bytes:
            stream.lose(Overloaded("the connections to the worker take no more"))
        else:
            connection.begin(stream)

    def remove(self, stream: TcpResponseStream) -> None:
        """Forget a parked stream that has ended."""
        self._parked_bytes -= self._parked.pop(stream, 0)

    @property
    def _may_wait_for_dial(self) -> bool:
        """Whether a connection is about to come, and small requests that wait for it are not too many."""
        is_coming = self._connecting is not None and not self._dial_is_quiet
        return is_coming and len(self._parked) < MAX_PARKED_COUNT

    def _pick(self) -> ClientConnection | None:
        """The first that is not busy with something large; if all are, the least busy, and one is dialled."""
        for connection in self._connections:
            if connection.usable and not _is_busy(connection):
                return connection
        usable = self._usable()
        if usable:
            self._extend()
        return min(usable, key=_unsent_bytes, default=None)

    def _least_busy(self) -> ClientConnection | None:
        """Choose the least busy of the connections that are not stale."""
        answering = [connection for connection in self._usable() if not connection.is_stale]
        return min(answering, key=_unsent_bytes, default=None)

    def _pick_for_large(self) -> ClientConnection | None:
        """Not the first, if there is another; one more is dialled for each `max_message_bytes` unsent."""
        usable = self._usable()
        choice = usable[1:] or usable
        best = min(choice, key=_unsent_bytes, default=None)
        if best is not None and (choice is usable or best.unsent_bytes > self.settings.max_message_bytes):
            self._extend()
        return best

    def _usable(self) -> list[ClientConnection]:
        return [connection for connection in self._connections if connection.usable]

    def _extend(self) -> None:
        if len(self._connections) < self.settings.pool_size:
            self._connect()

    def on_large_answer(self, subject: str) -> None:
        """An endpoint answers small requests with large items."""
        self._large_answers.add(subject)

    def _park(self, stream: TcpResponseStream) -> None:
        if self._draining is not None:
            stream.lose(self._draining)
            return
        size_bytes = stream.payload_bytes
        too_much = self._parked_bytes + size_bytes > self._max_queued_bytes
        if len(self._parked) >= MAX_PARKED_COUNT or too_much:
            stream.lose(Overloaded("too many requests wait for a connection to the worker"))
            return
        self._parked[stream] = size_bytes
        self._parked_bytes += size_bytes
        stream.park(self)
        self._connect()
        if self._dial_is_quiet:
            self.loop.call_soon(self._on_quiet, self.target)

    # ------------------------------------------------------------------- dialling

    def _connect(self, *, at_once: bool = False) -> None:
        """Dial, unless a dial is under way; after one that failed, wait for the pause or dial `at_once`."""
        if self._connecting is not None:
            return
        now = self.loop.time()
        give_up_at = now + self.settings.connect_timeout_s
        if at_once or now >= self._dial_from:
            self._dial(give_up_at)
        elif self._dial_timer is None:
            self._dial_timer = self.loop.call_at(self._dial_from, self._dial_if_wanted, give_up_at)

    def _dial_if_wanted(self, give_up_at: float) -> None:
        self._dial_timer = None
        if self._parked or self._connections:
            self._dial(give_up_at)

    def _dial(self, give_up_at: float) -> None:
        self._stop_dial_timer()
        self._connecting = self.loop.create_task(
            self._open_connection(give_up_at), context=self._variables.copy()
        )

    async def _open_connection(self, give_up_at: float) -> None:
        quiet_after_s = self.settings.keepalive_interval_s * QUIET_AT / SWEEPS_PER_INTERVAL
        quiet_timer = self.loop.call_later(quiet_after_s, self._note_quiet_dial)
        connection: ClientConnection | None = None
        error: PlaneError = ConnectionLost("the client was closed")
        try:
            connection = await dial(
                self.target.address, self._tls, self._new_connection, self._connections.append, give_up_at
            )
            error = connection.error or self._draining or ConnectionLost("the connection broke")
            self._forget_failures()
            self._drop_stale()
        except PlaneError as exc:
            error = exc
            self._note_failed_dial()
        finally:
            quiet_timer.cancel()
            self._dial_is_quiet = False
            self._connecting = None
            usable = connection is not None and connection.usable
            self._release(connection if usable else None, error)
            self._discard_if_empty()

    def _drop_stale(self) -> None:
        """Drop the connections that are silent since they were idle, after a dial that was answered."""
        for connection in tuple(self._connections):
            if connection.is_stale:
                connection.give_back()
                connection.fail(ConnectionLost("the connection was dropped on its way while it was idle"))

    def _new_connection(self) -> ClientConnection:
        return ClientConnection(self, self.target, self.settings, self.loop, self._buffers)

    def _release(self, connection: ClientConnection | None, error: PlaneError) -> None:
        """The dial is over: what waited for it begins, there or on a busy connection, or ends."""
        self._begin_parked(connection or self._least_busy(), error)
        awaiting, self._awaiting = self._awaiting, []
        for connected in awaiting:
            if connected.done():
                continue
            if connection is not None:
                connected.set_result(connection)
            else:
                connected.set_exception(error)

    def _begin_parked(self, connection: ClientConnection | None, error: PlaneError) -> None:
        parked, self._parked = self._parked, {}
        self._parked_bytes = 0
        for stream in parked:
            if connection is not None:
                connection.begin(stream)
            else:
                stream.lose(error)

    def _note_failed_dial(self) -> None:
        least_s, most_s = REDIAL_PAUSE_S
        most_s = min(most_s, self.settings.connect_timeout_s / 2)  # which a request's pause counts towards
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
        """Wait until the instance has answered a PING. Raises PlaneError: NotAccepted if its event loop is
        busy but its process lives."""
        connection: ClientConnection | None = None
        life = self.loop.create_task(self._shows_life(timeout_s / 3), context=self._variables.copy())
        try:
            async with asyncio.timeout(timeout_s):
                connection = self._pick_for_ping() or await self._connected()
                await connection.ping()
        except TimeoutError:
            if life.done() and life.result():
                raise NotAccepted(f"the process at {self.target.address} lives, but is busy") from None
            if connection is not None and not connection.streams:
                # Nothing sweeps it, and the kernel may try for minutes: the next PING is to dial anew.
                connection.fail(ConnectionLost("a PING was not answered"))
            raise CannotConnect(f"no answer from {self.target.address} in {timeout_s} s") from None
        finally:
            life.cancel()

    async def _shows_life(self, after_s: float) -> bool:
        await asyncio.sleep(after_s)
        try:
            return await ask_for_life(self.target.address, self.target.secret, self.target.instance_id)
        except (OSError, ValueError):
            return False

    def _pick_for_ping(self) -> ClientConnection | None:
        """Choose one on which a PING does not wait behind large payloads, and that has not gone stale."""
        for connection in self._connections:
            if connection.usable and not (_is_busy(connection) or connection.is_stale):
                return connection
        if len(self._connections) < self.settings.pool_size:
            return None
        return self._least_busy()

    async def _connected(self) -> ClientConnection:
        if self._draining is not None:
            raise self._draining
        connected: asyncio.Future[ClientConnection] = self.loop.create_future()
        self._awaiting.append(connected)
        self._connect(at_once=True)
        return await connected

    # ------------------------------------------------------------------- what connections say (Owner)

    def _note_quiet_dial(self) -> None:
        self._dial_is_quiet = True
        error = CannotConnect(f"no connection to {self.target.address} yet")
        busy = self._least_busy()
        if busy is not None:
            self._begin_parked(busy, error)
        for stream in tuple(self._parked):
            if stream.sent:  # and lost: it has waited long enough, and others may take it
                stream.lose(error)
        self._on_quiet(self.target)

    def on_quiet(self, connection: ClientConnection) -> None:
        """The instance owes an answer. If the connection may have gone stale, a dial tells."""
        if connection.is_stale:
            self._connect(at_once=True)
        self._on_quiet(self.target)

    def begin_anew(self, stream: TcpResponseStream) -> None:
        """Send a request again that was lost with a stale connection: on a fresh one."""
        if self._dial_is_quiet:
            stream.lose(CannotConnect(f"no connection to {self.target.address} yet"))
        else:
            self._park(stream)

    def on_draining(self, error: Draining) -> None:
        """The instance takes no more requests."""
        self._draining = error

    def on_closed(self, connection: ClientConnection) -> None:
        """A connection has ended."""
        if connection in self._connections:
            self._connections.remove(connection)
        self._discard_if_empty()

    # ------------------------------------------------------------------- the end

    def _discard_if_empty(self) -> None:
        if not (self._connections or self._parked or self._connecting or self._failed_dials):
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
            if not connection.streams and (subject is None or not self._is_wanted(connection)):
                connection.close()
        if not self._parked:
            self._stop_dial_timer()
            self._forget_and_discard()

    def _is_wanted(self, connection: ClientConnection) -> bool:
        """Whether requests of other endpoints, or a probe, wait for it."""
        if connection.shaken.done():
            return connection.is_pinged
        return bool(self._parked or self._awaiting)

    async def aclose(self) -> None:
        """Close everything. Requests under way end with ConnectionLost."""
        error = ConnectionLost("the client was closed")
        for stream in tuple(self._parked):
            stream.lose(error)
        connecting = self._connecting
        if connecting is not None:
            connecting.cancel()
            await asyncio.wait([connecting])
        self.end(error)


def _is_busy(connection: ClientConnection) -> bool:
    """Whether a request would wait there, behind a large one or for a large answer."""
    return connection.paused or connection.receives_large


def _unsent_bytes(connection: ClientConnection) -> int:
    return connection.unsent_bytes
