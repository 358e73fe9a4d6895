"""The serving side of the http plane: granian receives requests, and this process's own server runs them."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from typing import Final

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import ConfigError
from dynamo_redis.planes.address import choose_binding, format_address
from dynamo_redis.planes.frames.client import FrameClient
from dynamo_redis.planes.frames.server import FrameServer, ServerCore
from dynamo_redis.planes.http.app import MAX_IDLE_SESSIONS, HttpApp
from dynamo_redis.planes.http.engine import BACKLOG_COUNT, HttpEngine
from dynamo_redis.planes.http.local import LocalCarrier
from dynamo_redis.planes.tcp.tls import make_tls

DEFAULT_PORT: Final = 8888

_READ_S: Final = 2.0
"""Seconds that callers have at the end to read answers which have left their handlers."""
_LOOK_S: Final = 0.05
_AGAIN_S: Final = 1.0
_PROBE_AFTER_S: Final = 20

_log = logging.getLogger(__name__)


class HttpServer(FrameServer):
    """Implements `RequestPlaneServer`. It owns the task of the HTTP server."""

    def __init__(
        self,
        settings: PlaneSettings,
        *,
        secret: bytes | None,
        instance_id: int,
        core: ServerCore | None = None,
        redis_host: str | None = None,
    ) -> None:
        """See `select.make_server`; `redis_host` as in `TcpServer`."""
        super().__init__(settings, secret=secret, instance_id=instance_id, core=core)
        self._redis_host = redis_host
        self._max_authenticated_count = settings.max_connections_count + MAX_IDLE_SESSIONS
        self._tls = make_tls(settings, "server")
        self._client = FrameClient(settings, LocalCarrier(self._new_connection))
        self._app = HttpApp(
            settings,
            self._client,
            secret,
            instance_id,
            self._endpoints.__contains__,
            self._complaints,
        )
        self._engine: HttpEngine | None = None
        self._watching: asyncio.Task[None] | None = None

    @property
    def plane(self) -> str:
        """`http`."""
        return "http"

    async def start(self) -> None:
        """See `RequestPlaneServer.start`."""
        settings = self._settings
        self._use_running_loop()
        binding = await choose_binding(settings.http_rpc_host, settings.http_advertise_host, self._redis_host)
        sock = _listen(binding.listen_host, settings.http_rpc_port)
        port = sock.getsockname()[1]
        self._engine = HttpEngine(self._app, settings, sock)
        self._watching = self._loop.create_task(
            self._watch(binding.listen_host, port), name="watch over the http plane"
        )
        mark = "" if self._tls is None else self._tls.mark
        self._address = format_address(binding.advertise_host, settings.http_advertise_port or port) + mark

    async def _watch(self, host: str, port: int) -> None:
        """Serve again if the HTTP server has ended by itself."""
        while True:
            assert self._engine is not None
            await self._engine.wait_failed()
            _log.error("the HTTP server of the http plane has ended by itself; it is started again")
            await self._engine.aclose()
            while (sock := _listen_again(host, port)) is None:  # noqa: ASYNC110 - as rare as such an end
                await asyncio.sleep(_AGAIN_S)
            self._engine = HttpEngine(self._app, self._settings, sock)

    async def drain(self, grace_s: float) -> None:
        """See `RequestPlaneServer.drain`. Answers that have left the handler may still wait for their
        callers."""
        deadline = self._loop.time() + grace_s
        await super().drain(grace_s)
        while self._app.is_busy and self._loop.time() < deadline:  # noqa: ASYNC110 - as rare as a shutdown
            await asyncio.sleep(_LOOK_S)

    async def _stop_accepting(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        if self._engine is not None:
            self._engine.stop()

    async def _release(self) -> None:
        await self._client.aclose()
        if self._engine is not None:
            await self._engine.wait_ended(_READ_S)
            await self._engine.aclose()
        await self._app.aclose()


def _listen(host: str, port: int | None) -> socket.socket:
    """Listen on the port; without one on `DEFAULT_PORT`, or on a free one if that is in use. Raises
    ConfigError."""
    wanted = DEFAULT_PORT if port is None else port
    try:
        return _create_server(host, wanted)
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE and port is None:
            sock = _create_server(host, 0)
            _log.warning(
                "port %d is in use, port %d serves the http plane; DYN_HTTP_RPC_PORT names a fixed one",
                wanted,
                sock.getsockname()[1],
            )
            return sock
        if exc.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"DYN_HTTP_RPC_PORT={wanted}: {format_address(host, wanted)} is in use; choose another port, "
                "or 0 for a free one"
            ) from exc
        raise ConfigError(f"DYN_HTTP_RPC_HOST={host}: cannot listen: {exc.strerror or exc}") from exc


def _listen_again(host: str, port: int) -> socket.socket | None:
    try:
        return _create_server(host, port)
    except OSError as exc:
        _log.error("the http plane cannot listen on %s: %s", format_address(host, port), exc)
        return None


def _create_server(host: str, port: int) -> socket.socket:
    """Listen; the kernel notices callers whose host has vanished, also where nothing is sent."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.create_server((host, port), family=family, backlog=BACKLOG_COUNT)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # accepted sockets inherit these
    if hasattr(socket, "TCP_KEEPIDLE"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_AFTER_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_AFTER_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    return sock
