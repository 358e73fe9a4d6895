"""The serving side of the tcp plane: the listening socket, the endpoints, and admission.

At most `DYN_TCP_MAX_IN_FLIGHT` handlers run; up to `DYN_TCP_MAX_QUEUED` requests wait in order of arrival;
past that a request is refused as Overloaded with a hint when to come again. At most
`DYN_TCP_MAX_CONNECTIONS` connections are open; past that a new one is refused. A connection must complete
its handshake within the connect time-out.
"""

from __future__ import annotations

import asyncio
import errno
from typing import Final

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import ConfigError, Draining, EndpointNotFound, Overloaded
from dynamo_redis.planes.address import choose_binding, format_address
from dynamo_redis.planes.base import Handler
from dynamo_redis.planes.tcp_request import Endpoint, Request
from dynamo_redis.planes.tcp_serving import ServerConnection
from dynamo_redis.wire.decoder import ReadBuffers
from dynamo_redis.wire.handshake import ServerHandshake

_BACKLOG: Final = 4096
_ACLOSE_S: Final = 2.0
_RETRY_AFTER_S: Final = (0.05, 10.0)
_RATE_WINDOW_S: Final = 1.0


class TcpServer:
    """Implements `RequestPlaneServer`. Use it on the event loop that starts it."""

    def __init__(
        self,
        settings: PlaneSettings,
        *,
        secret: bytes | None,
        instance_id: int,
        redis_host: str | None = None,
    ) -> None:
        """`redis_host` is where this process finds Redis (None for a unix socket): it decides which address
        is advertised when the settings do not say. `secret` is None where `DYN_PLANE_AUTH` is off."""
        self._settings = settings
        self._secret = secret
        self._instance_id = instance_id
        self._redis_host = redis_host
        self._buffers = ReadBuffers()
        self._listener: asyncio.Server | None = None
        self._address = ""
        self._endpoints: dict[str, Endpoint] = {}
        self._connections: set[ServerConnection] = set()
        self._running: set[Request] = set()
        self._queue: dict[Request, None] = {}
        self._draining = False
        self._starting = False
        self._finished_count = 0
        self._rate_since = 0.0
        self._rate_per_s = 0.0
        self._loop: asyncio.AbstractEventLoop

    def __repr__(self) -> str:
        return (
            f"<TcpServer {self._address or 'not started'}: {len(self._connections)} connections, "
            f"{len(self._running)} in flight, {len(self._queue)} queued>"
        )

    @property
    def plane(self) -> str:
        """`tcp`."""
        return "tcp"

    @property
    def address(self) -> str:
        """See `RequestPlaneServer.address`."""
        return self._address

    @property
    def in_flight_count(self) -> int:
        """See `RequestPlaneServer.in_flight_count`."""
        return len(self._running) + len(self._queue)

    @property
    def connection_count(self) -> int:
        """Open connections, those in their handshake included."""
        return len(self._connections)

    # ------------------------------------------------------------------- life

    async def start(self) -> None:
        """See `RequestPlaneServer.start`."""
        settings = self._settings
        self._loop = asyncio.get_running_loop()
        binding = await choose_binding(settings.tcp_host, settings.tcp_advertise_host, self._redis_host)
        try:
            self._listener = await self._loop.create_server(
                self._new_connection, binding.listen_host, settings.tcp_port, backlog=_BACKLOG
            )
        except OSError as exc:
            raise ConfigError(_explain(exc, binding.listen_host, settings.tcp_port)) from exc
        port = settings.tcp_advertise_port or self._listener.sockets[0].getsockname()[1]
        self._address = format_address(binding.advertise_host, port)

    def register(self, subject: str, handler: Handler, *, request_stream: bool = False) -> None:
        """See `RequestPlaneServer.register`."""
        if subject in self._endpoints:
            raise ValueError(f"{subject} is served already")
        self._endpoints[subject] = Endpoint(subject, handler, request_stream=request_stream)

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
        self._draining = True
        for connection in self._connections:
            connection.go_away()
        await self._finish_requests(list(self._endpoints.values()), grace_s)

    async def aclose(self) -> None:
        """See `RequestPlaneServer.aclose`. Idempotent."""
        self._draining = True
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for connection in tuple(self._connections):
            connection.close()
        await asyncio.sleep(0)  # handlers that were started in this turn of the loop have a task after it
        tasks = [request.task for request in self._running if request.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=_ACLOSE_S)

    async def _finish_requests(self, endpoints: list[Endpoint], grace_s: float) -> None:
        """Wait for the endpoints' requests, at most `grace_s`; then end those that are left."""
        idle = [endpoint.when_idle(self._loop) for endpoint in endpoints if endpoint.active_count]
        if not idle:
            return
        _, unfinished = await asyncio.wait(idle, timeout=grace_s)
        if unfinished:
            error = Draining("the worker shut down before the request was finished")
            for request in [*self._queue, *self._running]:
                if request.endpoint in endpoints:
                    request.abort(error)

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

    # ------------------------------------------------------------------- what connections ask (Service)

    def on_made(self, connection: ServerConnection) -> None:
        """A connection has come."""
        self._connections.add(connection)
        if len(self._connections) > self._settings.max_connections_count:
            connection.refuse(Overloaded("the worker has as many connections as it takes"))

    def on_shaken(self, connection: ServerConnection) -> None:
        """The caller has proved itself."""
        if self._draining:
            connection.go_away()

    def on_closed(self, connection: ServerConnection) -> None:
        """The connection has ended."""
        self._connections.discard(connection)

    def endpoint(self, subject: str) -> Endpoint:
        """The endpoint of an incoming request. Raises Draining or EndpointNotFound."""
        endpoint = self._endpoints.get(subject)
        if self._draining or (endpoint is not None and endpoint.draining):
            raise Draining("the worker is shutting down")
        if endpoint is None:
            raise EndpointNotFound(f"{subject} is not served here")
        return endpoint

    def admit(self, request: Request) -> None:
        """Start or queue a request. Raises Overloaded."""
        if len(self._running) < self._settings.max_in_flight_count:
            request.endpoint.active_count += 1
            self._start(request)
        elif len(self._queue) < self._settings.max_queued_count:
            request.endpoint.active_count += 1
            self._queue[request] = None
        else:
            raise Overloaded(retry_after_s=self._retry_after_s())

    def dequeue(self, request: Request) -> None:
        """A request has ended before its handler was started."""
        if request in self._queue:
            del self._queue[request]
            request.endpoint.release()

    def finished(self, request: Request) -> None:
        """A request's handler is over: the next in the queue may start."""
        self._running.discard(request)
        self._finished_count += 1
        request.endpoint.release()
        if self._queue and not self._starting:
            self._start_queued()

    def _start_queued(self) -> None:
        self._starting = True  # a handler that ends while it starts must not come back here
        try:
            while self._queue and len(self._running) < self._settings.max_in_flight_count:
                following = next(iter(self._queue))
                del self._queue[following]
                self._start(following)
        finally:
            self._starting = False

    def _start(self, request: Request) -> None:
        self._running.add(request)
        request.launch(self._loop)

    def _retry_after_s(self) -> float:
        """When the queue should have moved on: its length over the rate at which requests finish."""
        now = self._loop.time()
        elapsed_s = now - self._rate_since
        if elapsed_s >= _RATE_WINDOW_S:
            self._rate_per_s = self._finished_count / elapsed_s
            self._rate_since, self._finished_count = now, 0
        least_s, most_s = _RETRY_AFTER_S
        waiting = len(self._queue) + 1
        return min(max(waiting / self._rate_per_s, least_s), most_s) if self._rate_per_s else _RATE_WINDOW_S


def _explain(exc: OSError, host: str, port: int) -> str:
    """One line that names the setting."""
    address = format_address(host, port)
    if exc.errno == errno.EADDRINUSE:
        return f"DYN_TCP_RPC_PORT={port}: {address} is in use; choose another port, or 0 for a free one"
    if exc.errno == errno.EACCES:
        return f"DYN_TCP_RPC_PORT={port}: no permission to listen on {address}; choose a port above 1023"
    return f"DYN_TCP_RPC_HOST={host}: cannot listen on {address}: {exc.strerror or exc}"
