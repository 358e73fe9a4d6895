"""granian in this process: it speaks HTTP with the callers, on a thread of its own.

Answers are bounded a stream: a reader that has stopped holds up its own answer, and no other one. granian has
no limit for connections that never send a request, and none for the end of its connections at a shutdown.
Their sockets are in this process, so both are done here (`accepted`).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from granian.constants import Interfaces, SSLProtocols
from granian.http import HTTP1Settings, HTTP2Settings
from granian.log import LogLevels
from granian.net import SocketHolder  # type: ignore[attr-defined]
from granian.server.embed import Server

from dynamo_redis.config import PlaneSettings
from dynamo_redis.planes.http.app import HttpApp

SILENT_S: Final = 60.0
"""A connection without any request is ended after this many seconds."""

SWEEP_S: Final = 10.0
"""Seconds between two looks at the connections."""

HEAD_S: Final = 75.0
"""Longest time from an answer of HTTP/1 to the end of the next head. Proxies keep idle ones for less."""

MAX_HEAD_BYTES: Final = 64 << 10
BACKLOG_COUNT: Final = 4096

_LOOK_S: Final = 1.0
_END_S: Final = 3.0
_THREADS_END_S: Final = 0.5
_THREADS_LOOK_S: Final = 0.002
_WIDE_WINDOW_BYTES: Final = 1 << 20
_WIDE_CONNECTION_BYTES: Final = 1 << 24
_PLAIN_WINDOW_BYTES: Final = 65_535
_OWN_FILES: Final = Path("/proc/self/fd")
_OWN_THREADS: Final = Path("/proc/self/task")
_QUIET: Final[dict[str, Any]] = {"incremental": True, "handlers": {}, "loggers": {}}
"""Has granian set the level of its own logger, and leave the process's logging alone otherwise."""

_FULL: Final = (
    "%d connections are open, as many as DYN_TCP_MAX_CONNECTIONS=%d allows: further ones wait; raise this "
    "limit, or start more workers"
)

_log = logging.getLogger(__name__)


class _Embedded(Server):
    """Serves on a socket that listens already; granian's own would share its port with other processes."""

    def __init__(self, app: HttpApp, holder: SocketHolder, **options: Any) -> None:
        super().__init__(app, interface=Interfaces.ASGINL, **options)
        self._holder = holder

    def _init_shared_socket(self) -> None:
        self._shd = self._holder  # type: ignore[assignment]


class HttpEngine:
    """Serves the application on a listening socket, which it owns from then on."""

    def __init__(self, app: HttpApp, settings: PlaneSettings, sock: socket.socket) -> None:
        """`sock` listens."""
        self._app = app
        self._port: int = sock.getsockname()[1]
        self._listener = os.fstat(sock.fileno()).st_ino
        self._fd = sock.detach()
        self._silent: dict[str, float] = {}  # the time when the connection was first seen
        self._max_count = settings.max_connections_count
        holder = SocketHolder(self._fd, False, BACKLOG_COUNT)  # type: ignore[call-arg]
        self._server = _Embedded(app, holder, **_options(settings))
        self._other_threads = _native_threads()
        self._serving = asyncio.create_task(self._server.serve(), name="http plane")
        self._sweeping = asyncio.create_task(self._sweep(), name="connections of the http plane")

    async def wait_failed(self) -> None:
        """Wait until it serves no more."""
        while self._is_alive():
            await asyncio.wait([self._serving], timeout=_LOOK_S)

    def _is_alive(self) -> bool:
        """Tell if the socket still listens: granian's thread closes it when it ends."""
        try:
            is_open = os.fstat(self._fd).st_ino == self._listener
        except OSError:
            is_open = False
        return is_open and not self._serving.done()

    def stop(self) -> None:
        """Accept no more connections, and end those that are open once their requests are answered.
        Idempotent."""
        self._server.stop()  # type: ignore[no-untyped-call]

    async def wait_ended(self, timeout_s: float) -> None:
        """Wait until all connections have ended, at most for so long."""
        await asyncio.wait([self._serving], timeout=timeout_s)

    async def aclose(self) -> None:
        """Stop, and end the connections that are still open. Idempotent."""
        self.stop()
        self._sweeping.cancel()
        await asyncio.wait([self._sweeping])
        if not self._serving.done():
            with suppress(OSError):  # not in the loop's executor: handlers may have taken all its threads
                self._end_connections()
            await self.wait_ended(_END_S)
            self._serving.cancel()
        await self._wait_threads_ended()

    async def _wait_threads_ended(self) -> None:
        """Wait until granian's threads have ended, for a moment at most: it tells of its end before that. A
        thread of granian's that is left when Python ends aborts the process."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + _THREADS_END_S
        while _native_threads() - self._other_threads and loop.time() < give_up_at:  # noqa: ASYNC110
            await asyncio.sleep(_THREADS_LOOK_S)

    def _end_connections(self, addresses: set[str] | None = None) -> set[str]:
        """End the connections from these addresses, or all. Return the addresses of all."""
        found = set()
        for address, connection in accepted(self._port):
            with connection:
                found.add(address)
                if addresses is None or address in addresses:
                    with suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)
        return found

    async def _sweep(self) -> None:
        """End connections that have never sent a request, and requests whose connection has ended: granian
        does not tell that of a caller while messages of its request wait unread."""
        asked = self._app.asked
        while True:
            await asyncio.sleep(SWEEP_S)
            now, had_asked, under_way = time.monotonic(), set(asked), self._app.addresses()
            silent = {address: seen_at for address, seen_at in self._silent.items() if address not in asked}
            ended = {address for address, seen_at in silent.items() if now - seen_at >= SILENT_S}
            try:
                found = await asyncio.to_thread(self._end_connections, ended)
            except OSError as exc:  # no file is left for the look
                _log.warning("the connections of the http plane cannot be looked at: %s", exc)
                continue
            self._app.kill(under_way - found)
            asked -= had_asked - found
            self._silent = {address: silent.get(address, now) for address in found - ended - asked}
            if len(found) >= self._max_count:
                _log.warning(_FULL, len(found), self._max_count)


def _native_threads() -> set[int]:
    """Return the ids of this process's threads that Python has not started; empty where the system does not
    tell."""
    own = {thread.native_id for thread in threading.enumerate()}
    with suppress(OSError):
        return {int(path.name) for path in _OWN_THREADS.iterdir()} - own
    return set()


def accepted(port: int) -> Iterator[tuple[str, socket.socket]]:
    """Yield this process's accepted connections of a port: the caller's `host:port`, and a duplicate of the
    socket. Raises OSError if no file is left for one."""
    directory = _OWN_FILES if _OWN_FILES.exists() else Path("/dev/fd")
    for path in tuple(directory.iterdir()):
        try:
            fd = os.dup(int(path.name))
        except OSError as exc:
            if exc.errno != errno.EBADF:
                raise
            continue  # closed meanwhile
        try:
            found = socket.socket(fileno=fd)
        except OSError:  # no socket
            os.close(fd)
            continue
        try:
            is_ours = found.family in (socket.AF_INET, socket.AF_INET6) and found.getsockname()[1] == port
            peer = found.getpeername() if is_ours else None
        except OSError:  # the listener itself, or no longer connected
            peer = None
        if peer is None:
            found.close()
        else:
            yield f"{peer[0].partition('%')[0]}:{peer[1]}", found


def _options(settings: PlaneSettings) -> dict[str, Any]:
    is_wide = settings.http2_adaptive_window
    is_tls, is_mutual = settings.tcp_tls != "off", settings.tcp_tls == "mutual"
    return {
        "websockets": False,
        "backlog": BACKLOG_COUNT,
        "backpressure": settings.max_connections_count,
        "log_level": LogLevels.error,
        "log_dictconfig": _QUIET,
        "http1_settings": HTTP1Settings(
            header_read_timeout=int(HEAD_S * 1000),
            max_buffer_size=MAX_HEAD_BYTES,
        ),
        "http2_settings": HTTP2Settings(
            initial_stream_window_size=_WIDE_WINDOW_BYTES if is_wide else _PLAIN_WINDOW_BYTES,
            initial_connection_window_size=_WIDE_CONNECTION_BYTES if is_wide else _PLAIN_WINDOW_BYTES,
            keep_alive_interval=int(settings.http2_keep_alive_interval_s * 1000),
            keep_alive_timeout=math.ceil(settings.http2_keep_alive_timeout_s),
            max_concurrent_streams=settings.http2_max_concurrent_streams,
            max_frame_size=int(settings.http2_max_frame_bytes),
            max_headers_size=MAX_HEAD_BYTES,
        ),
        "ssl_cert": Path(str(settings.tcp_tls_cert)) if is_tls else None,
        "ssl_key": Path(str(settings.tcp_tls_key)) if is_tls else None,
        "ssl_ca": Path(str(settings.tcp_tls_ca)) if is_mutual else None,
        "ssl_client_verify": is_mutual,
        "ssl_protocol_min": SSLProtocols.tls13,
    }
