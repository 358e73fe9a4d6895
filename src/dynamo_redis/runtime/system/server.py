"""The HTTP server of `/health`, `/live` and `/metrics`, in a thread of its own.

So it answers while the event loop is busy, which is when one asks. It is for probes and Prometheus: one
request a connection, a few at a time.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, TypeVar

from dynamo_redis.config import SystemSettings
from dynamo_redis.errors import ConfigError
from dynamo_redis.exposition import CONTENT_TYPE, render
from dynamo_redis.planes.address import format_address
from dynamo_redis.runtime.system.health import ProcessState

MAX_REQUEST_COUNT: Final = 32
"""Requests at once; a further one ends the oldest."""

REQUEST_S: Final = 5.0
"""Longest wait for the next bytes of a request, or for a client that does not read."""

LOOP_S: Final = 1.0
"""Longest wait for the event loop."""

_POLL_S: Final = 0.1
_END_S: Final = 2.0
_PATHS: Final = "/health, /live, /metrics"

_log = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class LoopBusy(Exception):
    """The event loop did not answer in time."""

    def __init__(self, busy_s: float) -> None:
        super().__init__(f"the event loop has been busy for {busy_s:.1f} s")
        self.busy_s = busy_s


class EventLoop:
    """Asks an event loop from other threads."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._asked_count = 0
        self._silent_since = 0.0

    def call(self, function: Callable[[], Answer]) -> Answer:
        """Return the result of a call on the loop. Raises LoopBusy."""
        result: Future[Answer] = Future()

        def answer() -> None:
            with self._lock:
                self._asked_count -= 1
                self._silent_since = time.monotonic()
            try:
                result.set_result(function())
            except BaseException as exc:  # noqa: BLE001 - it is raised in the asking thread
                result.set_exception(exc)

        with self._lock:
            if not self._asked_count:
                self._silent_since = time.monotonic()
            if self._asked_count >= MAX_REQUEST_COUNT:  # a loop that hangs gets no more work
                raise LoopBusy(time.monotonic() - self._silent_since)
            self._asked_count += 1
        try:
            self._loop.call_soon_threadsafe(answer)
            return result.result(LOOP_S)
        except TimeoutError:
            raise LoopBusy(time.monotonic() - self._silent_since) from None


class SystemServer(ABC):
    """Serves until `aclose`. A subclass has the health and the metrics."""

    def __init__(self, settings: SystemSettings, loop_stall_s: float) -> None:
        """Listen, on the running event loop's behalf. `/live` fails once that loop has hung for
        `loop_stall_s`; 0: never. Raises ConfigError if it cannot listen."""
        self._loop_stall_s = loop_stall_s
        self._loop = EventLoop(asyncio.get_running_loop())
        try:
            self._http = _HttpServer(settings.system_host, settings.system_port, self)
        except OSError as exc:
            where = format_address(settings.system_host, settings.system_port)
            raise ConfigError(
                f"DYN_SYSTEM_HOST, DYN_SYSTEM_PORT: cannot listen on {where}: {exc.strerror or exc}; choose "
                "another address or port, 0 for a free port, or -1 for none"
            ) from exc
        self.address = format_address(settings.system_host, self._http.server_address[1])
        self._thread = threading.Thread(
            target=self._http.serve_forever, args=(_POLL_S,), name="system port", daemon=True
        )
        self._thread.start()
        _log.info("http://%s serves %s", self.address, _PATHS)

    def __repr__(self) -> str:
        return f"<SystemServer {self.address}>"

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """Return status, content type and body of a path. Called in the requests' threads."""
        try:
            if path == "/live":
                return self._live()
            if path == "/health":
                return _json(*self._loop.call(self.health))
            if path == "/metrics":
                return 200, CONTENT_TYPE, self.metrics()
        except LoopBusy as exc:
            return _json(503, {"status": "notready", "reasons": [str(exc)]})
        return _json(404, {"error": f"there is no {path[:100]} here: {_PATHS}"})

    @abstractmethod
    def health(self) -> tuple[int, dict[str, Any]]:
        """Return status and body of `/health`. Called on the event loop."""

    @abstractmethod
    def metrics(self) -> bytes:
        """Return the text of `/metrics`. Called in the requests' threads. Raises LoopBusy."""

    def _live(self) -> tuple[int, str, bytes]:
        try:
            self._loop.call(lambda: None)
        except LoopBusy as exc:
            is_stalled = bool(self._loop_stall_s) and exc.busy_s > self._loop_stall_s
            body = {"status": "stalled" if is_stalled else "live", "reasons": [str(exc)]}
            return _json(503 if is_stalled else 200, body)
        return _json(200, {"status": "live"})

    async def aclose(self) -> None:
        """Stop listening. Idempotent."""
        loop = asyncio.get_running_loop()
        stopped = loop.create_future()

        def stop() -> None:
            self._http.shutdown()
            with suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(stopped.cancel)

        # Not in the event loop's executor: all its threads may be taken by handlers.
        threading.Thread(target=stop, name="end of the system port", daemon=True).start()
        await asyncio.wait([stopped], timeout=_END_S)
        self._http.server_close()


class RuntimeServer(SystemServer):
    """The system port of one runtime."""

    def __init__(self, settings: SystemSettings, state: ProcessState, loop_stall_s: float) -> None:
        self._state = state
        super().__init__(settings, loop_stall_s)

    def health(self) -> tuple[int, dict[str, Any]]:
        """Return the health of the runtime's endpoints."""
        return self._state.health()

    def metrics(self) -> bytes:
        """Return the metrics of the runtime's endpoints."""
        return render(self._loop.call(self._state.metrics))


def _json(status: int, body: dict[str, Any]) -> tuple[int, str, bytes]:
    return status, "application/json", json.dumps(body).encode() + b"\n"


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, host: str, port: int, system: SystemServer) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.system = system
        self._lock = threading.Lock()
        self._open: dict[socket.socket, None] = {}  # the oldest first
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """Bind; unlike the base class, ask no name server for the host's name."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; where no file is left for it, do not try again at once."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(_POLL_S)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of its own, in place of the oldest one if they are too many."""
        with self._lock:
            self._open[request] = None
            oldest = next(iter(self._open)) if len(self._open) > MAX_REQUEST_COUNT else None
            if oldest is not None:
                del self._open[oldest]
                with suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that leave early."""
        _log.debug("a request to the system port failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _HttpServer
    timeout = REQUEST_S
    server_version = "dynamo_redis"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer a GET."""
        status, content_type, body = self.server.system.answer(self.path.partition("?")[0])
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 - the base class calls this name
    error_message_format = '{"error": "%(message)s"}\n'
    error_content_type = "application/json"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Log nothing: probes ask every few seconds."""
