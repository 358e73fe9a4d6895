"""The serving side of the tcp plane: the listening socket."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from functools import partial
from typing import Final

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import AuthenticationFailed, ConfigError
from dynamo_redis.planes.address import choose_binding, format_address
from dynamo_redis.planes.frames.server import MAX_HANDSHAKE_COUNT, FrameServer, ServerCore
from dynamo_redis.planes.tcp.life_signs import LifeThread, answer_question
from dynamo_redis.planes.tcp.listener import (
    SocketListener,
    connection_limit,
    describe_file_limit,
    refuse_socket,
)
from dynamo_redis.planes.tcp.tls import make_tls
from dynamo_redis.planes.tcp.tls_gate import TlsGate

_ARRIVE_S: Final = 2.0

_log = logging.getLogger(__name__)


class TcpServer(FrameServer):
    """Implements `RequestPlaneServer` on a listening socket, also at the limit of open files."""

    def __init__(
        self,
        settings: PlaneSettings,
        *,
        secret: bytes | None,
        instance_id: int,
        core: ServerCore | None = None,
        redis_host: str | None = None,
        loop_stall_s: float = 0.0,
    ) -> None:
        """See `select.make_server`; `redis_host` is the host of its `redis_url`, None for a unix socket.

        Raises ConfigError for TLS files that cannot be used.
        """
        super().__init__(settings, secret=secret, instance_id=instance_id, core=core)
        self._tls = make_tls(settings, "server")
        self._gate: TlsGate | None = None
        self._redis_host = redis_host
        self._loop_stall_s = loop_stall_s
        self._listener: SocketListener | None = None
        self._life: LifeThread | None = None
        self._arriving: set[asyncio.Task[None]] = set()

    @property
    def plane(self) -> str:
        """`tcp`."""
        return "tcp"

    @property
    def connection_count(self) -> int:
        """See `FrameServer.connection_count`."""
        return super().connection_count + (self._gate.waiting_count if self._gate is not None else 0)

    async def start(self) -> None:
        """See `RequestPlaneServer.start`."""
        settings = self._settings
        self._use_running_loop()
        binding = await choose_binding(settings.tcp_host, settings.tcp_advertise_host, self._redis_host)
        if self._tls is not None:
            self._gate = TlsGate(
                self._loop,
                self._tls,
                self._new_connection,
                settings.connect_timeout_s,
                _refuse_without_tls,
                "set DYN_TCP_TLS there",
            )
        capacity_count = connection_limit(settings.max_connections_count + MAX_HANDSHAKE_COUNT)
        self._max_handshake_count = max(1, min(MAX_HANDSHAKE_COUNT, capacity_count // 4))
        self._max_authenticated_count = min(
            settings.max_connections_count, max(1, capacity_count - self._max_handshake_count)
        )
        if self._max_authenticated_count < settings.max_connections_count:
            _log.info("at most %d connections: %s", self._max_authenticated_count, describe_file_limit())
        try:
            self._listener = await SocketListener.open(
                self._loop, binding.listen_host, settings.tcp_port, self._on_socket
            )
        except OSError as exc:
            host, port = binding.listen_host, settings.tcp_port
            address = format_address(host, port)
            if exc.errno == errno.EADDRINUSE:
                problem = f"{address} is in use; choose another port, or 0 for a free one"
                raise ConfigError(f"DYN_TCP_RPC_PORT={port}: {problem}") from exc
            if exc.errno == errno.EACCES:
                problem = f"no permission to listen on {address}; choose a port above 1023"
                raise ConfigError(f"DYN_TCP_RPC_PORT={port}: {problem}") from exc
            problem = f"cannot listen on {address}: {exc.strerror or exc}"
            raise ConfigError(f"DYN_TCP_RPC_HOST={host}: {problem}") from exc
        self._life = LifeThread(
            self._loop,
            self._listener.sockets,
            partial(answer_question, secret=self._secret, instance_id=self._instance_id),
            self._on_socket,
            max_taken_count=self._max_handshake_count,
            loop_stall_s=self._loop_stall_s,
        )
        port = settings.tcp_advertise_port or self._listener.port
        self._address = format_address(binding.advertise_host, port) + (self._tls.mark if self._tls else "")

    async def _stop_accepting(self) -> None:
        if self._life is not None:
            self._life.close()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._gate is not None:
            await self._gate.aclose()
        if self._arriving:  # not cancelled: uvloop would close their transports without telling the protocols
            await asyncio.wait(self._arriving, timeout=_ARRIVE_S)

    def _on_socket(self, sock: socket.socket) -> None:
        """Set up or refuse an accepted connection."""

        async def set_up() -> None:
            try:
                await self._loop.connect_accepted_socket(self._new_connection, sock)
            except OSError:  # it was reset before it was set up
                sock.close()

        if self._gate is not None:
            if self.connection_count >= self._max_authenticated_count + self._max_handshake_count:
                self._gate.drop_oldest()
            self._gate.admit(sock)
        elif self._authenticated_count >= self._max_authenticated_count:
            refuse_socket(sock, self._too_many_connections())
        else:
            arrival = self._loop.create_task(set_up())
            self._arriving.add(arrival)
            arrival.add_done_callback(self._arriving.discard)


def _refuse_without_tls(sock: socket.socket) -> None:
    text = "the worker speaks TLS only: set DYN_TCP_TLS=on and DYN_TCP_TLS_CA on this side, too"
    refuse_socket(sock, AuthenticationFailed(text))
