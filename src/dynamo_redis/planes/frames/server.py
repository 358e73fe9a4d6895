"""The serving side of a plane of frames: its connections and the endpoints.

At most `DYN_TCP_MAX_CONNECTIONS` authenticated callers are connected, or fewer if a plane has another limit;
a further one is refused. Beside them at most `MAX_HANDSHAKE_COUNT` connections are in their handshake, each
within the connect time-out; past that the oldest of these is refused. An honest handshake takes milliseconds,
so peers that never authenticate cannot keep honest callers out. `admission.py` decides which requests run.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from typing import Final

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import Draining, EndpointNotFound, Overloaded, PlaneError
from dynamo_redis.planes.base import Describe, Handler
from dynamo_redis.planes.frames.admission import AdmissionControl
from dynamo_redis.planes.frames.server_connection import ServerConnection
from dynamo_redis.planes.frames.server_request import RegisteredEndpoint
from dynamo_redis.planes.stats import EndpointStats
from dynamo_redis.rate_limited_log import RateLimitedLog
from dynamo_redis.wire.decoder import ReadBuffers
from dynamo_redis.wire.handshake import ServerHandshake

MAX_HANDSHAKE_COUNT: Final = 4096

_ACLOSE_S: Final = 2.0
_FAREWELL_S: Final = 1.0
_FAREWELL_LOOK_S: Final = 0.1

_FULL: Final = "connections are refused: %d are open (%s); raise this limit, or start more workers"
_MANY_IN_HANDSHAKE: Final = (
    "connections are refused: %d are in their handshake already; if callers cannot be that many, a program "
    "opens connections and sends nothing"
)

_log = logging.getLogger(__name__)


class ServerCore:
    """The endpoints of a process and the requests to them, which its servers share."""

    def __init__(self, settings: PlaneSettings) -> None:
        self.endpoints: dict[str, RegisteredEndpoint] = {}
        self.buffers = ReadBuffers(settings.max_payload_in_flight_bytes)
        self.complaints = RateLimitedLog(_log)
        self.admission = AdmissionControl(
            max_in_flight_count=settings.max_in_flight_count,
            max_queued_count=settings.max_queued_count,
            complaints=self.complaints,
        )


class FrameServer(ABC):
    """Implements `RequestPlaneServer` but for `plane` and `start`. Use it on the event loop that starts it.

    A plane accepts callers in its own way, and gives each a protocol of `_new_connection`.
    """

    def __init__(
        self,
        settings: PlaneSettings,
        *,
        secret: bytes | None,
        instance_id: int,
        core: ServerCore | None = None,
    ) -> None:
        """See `select.make_server`. `core` is shared with the process's other servers; None for the only
        one."""
        self._settings = settings
        self._secret = secret
        self._instance_id = instance_id
        self._address = ""
        core = core or ServerCore(settings)
        self._buffers = core.buffers
        self._endpoints = core.endpoints
        self._complaints = core.complaints
        self._admission = core.admission
        self._connections: set[ServerConnection] = set()
        self._in_handshake: dict[ServerConnection, None] = {}  # oldest first
        self._max_authenticated_count = settings.max_connections_count
        self._max_handshake_count = MAX_HANDSHAKE_COUNT
        self._draining = False
        self._all_closed: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self._address or 'not started'}: {len(self._connections)} connections, "
            f"{self._admission.running_count} in flight, {self._admission.waiting_count} queued>"
        )

    @property
    @abstractmethod
    def plane(self) -> str:
        """See `RequestPlaneServer.plane`."""

    @property
    def address(self) -> str:
        """See `RequestPlaneServer.address`."""
        return self._address

    @property
    def addresses(self) -> dict[str, str]:
        """See `RequestPlaneServer.addresses`."""
        return {self.plane: self._address}

    @property
    def in_flight_count(self) -> int:
        """See `RequestPlaneServer.in_flight_count`."""
        return self._admission.running_count + self._admission.waiting_count

    @property
    def connection_count(self) -> int:
        """Count of open connections, those in their handshake included."""
        return len(self._connections)

    @property
    def payload_bytes(self) -> int:
        """Bytes of large payloads in memory: still arriving, unread, or of running requests."""
        return self._buffers.budget.held_bytes

    # ------------------------------------------------------------------- life

    @abstractmethod
    async def start(self) -> None:
        """See `RequestPlaneServer.start`. Calls `_use_running_loop` first."""

    def _use_running_loop(self) -> None:
        """Run connections and handlers on the running event loop."""
        self._loop = self._admission.loop = asyncio.get_running_loop()

    async def aclose(self) -> None:
        """See `RequestPlaneServer.aclose`. Idempotent."""
        self._draining = True
        await self._stop_accepting()
        for connection in tuple(self._connections):
            connection.close()
        await asyncio.sleep(
            0
        )  # handlers that were started in this turn of the loop have their tasks after it
        tasks = [
            request.task
            for request in self._admission
            if request.task is not None
            and request.connection.closed  # not those of the process's other planes
        ]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_ACLOSE_S)
        await self._release()

    @abstractmethod
    async def _stop_accepting(self) -> None:
        """Accept no more callers. Idempotent."""

    async def _release(self) -> None:  # noqa: B027 - most planes have nothing to do
        """Release what the connections shared, after they are closed. Idempotent."""

    def stats(self, subject: str) -> EndpointStats | None:
        """See `RequestPlaneServer.stats`."""
        endpoint = self._endpoints.get(subject)
        return None if endpoint is None else endpoint.counts.snapshot(endpoint.active_count)

    async def announce(self, describe: Describe) -> None:  # noqa: B027 - most planes have nothing to do
        """See `RequestPlaneServer.announce`: most planes have no such tools."""

    def register(self, subject: str, handler: Handler, *, request_stream: bool = False) -> None:
        """See `RequestPlaneServer.register`."""
        if subject in self._endpoints:
            raise ValueError(f"{subject} is served already")
        self._endpoints[subject] = RegisteredEndpoint(
            subject,
            handler,
            request_stream=request_stream,
            cancel_grace_s=self._settings.cancel_grace_s,
        )

    async def unregister(self, subject: str, *, grace_s: float) -> None:
        """See `RequestPlaneServer.unregister`."""
        endpoint = self._endpoints.get(subject)
        if endpoint is None:
            return
        endpoint.draining = True
        await self._finish_requests([endpoint], grace_s)
        if self._endpoints.get(subject) is endpoint:
            del self._endpoints[subject]

    async def drain(self, grace_s: float) -> None:
        """See `RequestPlaneServer.drain`."""
        deadline = self._loop.time() + grace_s
        self._draining = True
        for connection in self._connections:
            connection.go_away()
        await self._finish_requests(list(self._endpoints.values()), grace_s)
        # Callers hang up once they have their answers. The unread rest of an answer would end with this
        # process, so a caller that still reads is waited for until the deadline.
        farewell = self._loop.time() + _FAREWELL_S
        for connection in self._connections:
            connection.send_farewell_ping()
        while self._connections:
            is_read = all(connection.has_read_all for connection in self._connections)
            left_s = (farewell if is_read else max(deadline, farewell)) - self._loop.time()
            if left_s <= 0:
                return
            self._all_closed = self._loop.create_future()
            await asyncio.wait([self._all_closed], timeout=min(left_s, _FAREWELL_LOOK_S))

    async def _finish_requests(self, endpoints: list[RegisteredEndpoint], grace_s: float) -> None:
        """Refuse the endpoints' requests that wait for a handler: another worker may have room. Wait at most
        `grace_s` for those that run, then end the rest."""
        self._admission.refuse_waiting(endpoints, Draining("the worker is shutting down"))
        idle = [endpoint.when_idle(self._loop) for endpoint in endpoints if endpoint.active_count]
        if not idle:
            return
        _, unfinished = await asyncio.wait(idle, timeout=grace_s)
        if unfinished:
            error = Draining("the worker shut down before the request was finished")
            for request in tuple(self._admission):
                if request.endpoint in endpoints:
                    request.abort(error)
                    request.cancel()

    @property
    def _authenticated_count(self) -> int:
        return len(self._connections) - len(self._in_handshake)

    def _too_many_connections(self) -> Overloaded:
        """Log the refusal, and return the error for the caller."""
        setting_count = self._settings.max_connections_count
        if self._max_authenticated_count < setting_count:
            limit = self._connection_limit_name
        else:
            limit = f"DYN_TCP_MAX_CONNECTIONS={setting_count}"
        self._complaints.log(_FULL, self._max_authenticated_count, limit)
        return Overloaded(f"the worker has as many connections as it takes ({limit})")

    @property
    def _connection_limit_name(self) -> str:
        """The limit of connections that is lower than the setting's."""
        return "the limit of open files, RLIMIT_NOFILE"

    def _new_connection(self) -> ServerConnection:
        settings = self._settings
        return ServerConnection(
            self,
            ServerHandshake(self._secret, settings.channel_buffer_count, self._instance_id),
            self._loop,
            self._buffers,
            max_message_bytes=settings.max_message_bytes,
            keepalive_interval_s=settings.keepalive_interval_s,
            handshake_timeout_s=settings.connect_timeout_s,
        )

    # ------------------------------------------------------------------- for connections (ConnectionHost)

    @property
    def admission(self) -> AdmissionControl:
        """Decides which requests run."""
        return self._admission

    @property
    def complaints(self) -> RateLimitedLog:
        """The rate-limited log of refused callers and requests."""
        return self._complaints

    def on_made(self, connection: ServerConnection) -> None:
        """List a new connection, or refuse it or the oldest one in its handshake."""
        self._connections.add(connection)
        self._in_handshake[connection] = None
        if self._authenticated_count >= self._max_authenticated_count:
            connection.refuse(self._too_many_connections())
        elif len(self._in_handshake) > self._max_handshake_count:
            self._complaints.log(_MANY_IN_HANDSHAKE, self._max_handshake_count)
            error = Overloaded("the worker has as many connections in their handshake as it takes")
            next(iter(self._in_handshake)).refuse(error)

    def on_handshake_done(self, connection: ServerConnection) -> None:
        """Note that the caller is authenticated."""
        self._in_handshake.pop(connection, None)
        if self._authenticated_count > self._max_authenticated_count:  # other callers came meanwhile
            connection.fail(self._too_many_connections())
        elif self._draining:
            connection.go_away()

    def on_closed(self, connection: ServerConnection) -> None:
        """Forget a connection that has ended."""
        self._connections.discard(connection)
        self._in_handshake.pop(connection, None)
        if not self._connections and self._all_closed is not None and not self._all_closed.done():
            self._all_closed.set_result(None)

    def note_refused(self, subject: str, error: PlaneError) -> None:
        """Count a request that is answered with an error at once, if its endpoint is served here."""
        endpoint = self._endpoints.get(subject)
        if endpoint is not None:
            endpoint.counts.add_refused(error.code, f"{type(error).__name__}: {error}")

    def endpoint(self, subject: str) -> RegisteredEndpoint:
        """Return the endpoint of an incoming request. Raises Draining or EndpointNotFound."""
        endpoint = self._endpoints.get(subject)
        if self._draining or (endpoint is not None and endpoint.draining):
            raise Draining("the worker is shutting down")
        if endpoint is None:
            raise EndpointNotFound(f"{subject} is not served here")
        return endpoint
