"""The serving side of the http plane: h2corn receives requests, and this process's own server runs them."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from typing import Final

from h2corn import Config, Server

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import ConfigError
from dynamo_redis.planes.address import choose_binding, format_address
from dynamo_redis.planes.frames.client import FrameClient
from dynamo_redis.planes.frames.server import FrameServer, ServerCore
from dynamo_redis.planes.http.app import HttpApp
from dynamo_redis.planes.http.local import LocalCarrier
from dynamo_redis.planes.http.reply import UNREAD_S
from dynamo_redis.planes.tcp.tls import make_tls

DEFAULT_PORT: Final = 8888

_READ_S: Final = 2.0
"""Seconds that callers have at the end to read answers which have left their handlers."""
_CLOSE_S: Final = 3.0
_LOOK_S: Final = 0.05
_KEEP_ALIVE_S: Final = 120.0
_HANDSHAKE_S: Final = 5.0
_PROBE_AFTER_S: Final = 20
_MAX_HEAD_BYTES: Final = 64 << 10
_WIDE_WINDOW_BYTES: Final = 1 << 20
_WIDE_CONNECTION_BYTES: Final = 1 << 24
_PLAIN_WINDOW_BYTES: Final = 65_535

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
        self._tls = make_tls(settings, "server")
        self._client = FrameClient(settings, LocalCarrier(self._new_connection))
        self._app: HttpApp | None = None
        self._http: Server | None = None
        self._serving: asyncio.Task[None] | None = None

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
        self._app = HttpApp(
            settings,
            self._client,
            self._secret,
            self._instance_id,
            self._endpoints.__contains__,
            self._complaints,
        )
        is_wide = settings.http2_adaptive_window
        is_tls, is_mutual = settings.tcp_tls != "off", settings.tcp_tls == "mutual"
        config = Config(
            bind=(f"fd://{sock.fileno()}",),
            certfile=settings.tcp_tls_cert if is_tls else None,
            keyfile=settings.tcp_tls_key if is_tls else None,
            ca_certs=settings.tcp_tls_ca if is_mutual else None,
            cert_reqs="required" if is_mutual else "none",
            lifespan="off",
            access_log=False,
            server_header="off",
            max_concurrent_streams=settings.http2_max_concurrent_streams,
            h2_max_inbound_frame_size=int(settings.http2_max_frame_bytes),
            h2_initial_stream_window_size=_WIDE_WINDOW_BYTES if is_wide else _PLAIN_WINDOW_BYTES,
            h2_initial_connection_window_size=_WIDE_CONNECTION_BYTES if is_wide else _PLAIN_WINDOW_BYTES,
            h2_max_header_list_size=_MAX_HEAD_BYTES,
            h2_max_header_block_size=_MAX_HEAD_BYTES,
            limit_request_head_size=_MAX_HEAD_BYTES,
            limit_connections=settings.max_connections_count,
            max_request_body_size=0,  # the application has its own limit, with a typed error
            timeout_graceful_shutdown=_READ_S,
            timeout_handshake=_HANDSHAKE_S,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_request_header=_HANDSHAKE_S,
            timeout_request_body_idle=0.0,  # the application has its own: a request stream may be idle
            h2_timeout_response_stall=UNREAD_S,
            h2_timeout_write=UNREAD_S,
        )
        self._http = Server(self._app, config)
        self._serving = self._loop.create_task(self._http.serve(), name="http plane")
        started = self._loop.create_task(self._http.wait_started())
        await asyncio.wait([self._serving, started], return_when=asyncio.FIRST_COMPLETED)
        sock.close()
        if self._serving.done():
            started.cancel()
            raise ConfigError(f"the http plane does not start: {self._serving.exception()}")
        mark = "" if self._tls is None else self._tls.mark
        self._address = format_address(binding.advertise_host, settings.http_advertise_port or port) + mark

    async def drain(self, grace_s: float) -> None:
        """See `RequestPlaneServer.drain`. Answers that have left the handler may still wait for their
        callers."""
        deadline = self._loop.time() + grace_s
        await super().drain(grace_s)
        while self._app is not None and self._app.is_busy and self._loop.time() < deadline:  # noqa: ASYNC110 - as rare as a shutdown
            await asyncio.sleep(_LOOK_S)

    async def _stop_accepting(self) -> None:
        if self._http is not None:
            self._http.shutdown()

    async def _release(self) -> None:
        await self._client.aclose()
        if self._serving is not None:
            await asyncio.wait([self._serving], timeout=_CLOSE_S)
            self._serving.cancel()
            self._serving = None


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


def _create_server(host: str, port: int) -> socket.socket:
    """Listen; the kernel notices callers whose host has vanished, also where nothing is sent."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.create_server((host, port), family=family, backlog=4096)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # accepted sockets inherit these
    if hasattr(socket, "TCP_KEEPIDLE"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_AFTER_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_AFTER_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    return sock
