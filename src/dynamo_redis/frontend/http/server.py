"""The frontend process: binds the port, serves until the runtime's shutdown, drains."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import math
import socket
import tempfile
from collections.abc import Awaitable, Callable, Collection, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from dynamo_redis.config import FrontendSettings, RouterSettings, user_model_cache
from dynamo_redis.errors import ConfigError
from dynamo_redis.frontend.app import make_app
from dynamo_redis.frontend.cache_clearing import clear_kv_blocks
from dynamo_redis.frontend.http.acceptor import Acceptor
from dynamo_redis.frontend.http.limits import HttpLimits
from dynamo_redis.frontend.http.protocol import HttpProtocol
from dynamo_redis.frontend.models import LiveModels
from dynamo_redis.frontend.observation import observed
from dynamo_redis.frontend.prompts import Preparation
from dynamo_redis.frontend.record import keep_listed
from dynamo_redis.frontend.routing import client_opener
from dynamo_redis.names import EndpointName
from dynamo_redis.router.kv_router import KvRouter
from dynamo_redis.runtime.runtime import DistributedRuntime

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
"""Seconds that an idle connection stays open: longer than clients' pools and proxies keep theirs."""


async def serve_frontend(
    runtime: DistributedRuntime,
    settings: FrontendSettings,
    router_settings: RouterSettings | None = None,
    *,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve HTTP until the runtime shuts down; then finish requests under way, within the runtime's grace.

    `on_ready` is called with the server's URL once it accepts connections; models may not be loaded yet. The
    port is bound first; raises ConfigError if that fails. `router_settings` are used in the router mode `kv`;
    None: those of the environment.
    """

    def note_ready(url: str) -> None:
        runtime.note_serving()
        if on_ready is not None:
            on_ready(url)

    open_client = client_opener(runtime, settings, router_settings or RouterSettings.load())
    listener = bind(settings.http_host, settings.http_port)
    with contextlib.closing(listener), model_cache(settings.model_cache) as cache_dir:
        await runtime.start()
        preparation = Preparation(int(settings.max_body_bytes))
        models = LiveModels(
            runtime,
            open_client=open_client,
            cache_dir=cache_dir,
            lease_ttl_s=runtime.settings.store.lease_ttl_s,
            tokenizer=settings.tokenizer,
        )
        listing = asyncio.create_task(keep_listed(runtime, settings, listener), name="list frontend")
        try:
            async with models:
                app = make_app(
                    models,
                    preparation,
                    settings,
                    runtime.registry,
                    partial(_clear_caches, runtime, models),
                    runtime.metrics,
                )
                await run_server(
                    observed(app, logs=settings.access_log),
                    listener,
                    runtime.wait_for_shutdown,
                    settings,
                    drain_s=runtime.shutdown_deadline.requests_left_s,
                    on_ready=note_ready,
                )
        finally:
            listing.cancel()
            await asyncio.gather(listing, return_exceptions=True)
            await preparation.aclose()


async def _clear_caches(
    runtime: DistributedRuntime, models: LiveModels, endpoints: Collection[EndpointName]
) -> tuple[int, dict[str, Any]]:
    status, body = await clear_kv_blocks(runtime, endpoints)
    for client in {version.client for model in models.served() for version in model.loaded()}:
        if isinstance(client, KvRouter):
            for worker in body["cleared_workers"]:
                client.forget_predictions(worker["instance_id"])
    return status, body


@contextlib.contextmanager
def model_cache(wanted: Path | None) -> Iterator[Path]:
    """Yield a directory for model files: `wanted`, else the user's cache directory.

    If the user's cache directory cannot be written, it is a temporary directory, removed afterwards.
    Raises ConfigError if `wanted` cannot be written.
    """
    directory = wanted if wanted is not None else user_model_cache()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as exc:
        if wanted is not None:
            raise ConfigError(
                f"DYN_MODEL_CACHE={str(wanted)!r}: {exc.strerror}: choose a directory that can be written"
            ) from exc
        log.info("model files are kept in a temporary directory, since %s cannot be written", directory)
    else:
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="dynamo-redis-models-") as temporary:
        yield Path(temporary)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address, not listening yet. Raises ConfigError, which says what to do."""
    try:
        [(family, _, _, _, address), *_] = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as exc:
        raise ConfigError(
            f"DYN_HTTP_HOST={host!r}: {exc.strerror}: write an address of this machine"
        ) from exc
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as exc:
        listener.close()
        if exc.errno == errno.EADDRINUSE:
            failure = (
                f"port {port} is in use: stop the program that has it, "
                "or choose another with --http-port (DYN_HTTP_PORT); 0 takes a free one"
            )
        elif exc.errno == errno.EACCES:
            failure = f"port {port} needs a privilege: choose one above 1023 with --http-port (DYN_HTTP_PORT)"
        else:
            failure = f"cannot listen on {host}:{port}: {exc.strerror}: set --http-host (DYN_HTTP_HOST)"
        raise ConfigError(failure) from exc
    listener.setblocking(False)
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the URL that a browser on this machine opens."""
    host, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.is_unspecified:
        return f"http://localhost:{port}"
    return f"http://[{host}]:{port}" if address.version == 6 else f"http://{host}:{port}"


# --------------------------------------------------------------------------- uvicorn


async def run_server(
    app: ASGIApp,
    listener: socket.socket,
    wait_for_shutdown: Callable[[], Awaitable[None]],
    settings: FrontendSettings,
    *,
    drain_s: float,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve an application on a bound socket until `wait_for_shutdown()` returns, then drain.

    Draining takes at most `drain_s`; requests that are still under way then are cancelled. Cancelling this
    coroutine ends everything at once.
    """
    server = _Server(
        uvicorn.Config(
            app,
            http=HttpProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # no handler uses the client's address
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(drain_s)),
        ),
        settings,
    )
    server_log = logging.getLogger("uvicorn.error")
    server_log.addFilter(quiet := _QuietServerLog())
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    shutdown = asyncio.ensure_future(wait_for_shutdown())
    try:
        await asyncio.wait({serving, server.accepting}, return_when=asyncio.FIRST_COMPLETED)
        if on_ready is not None and not serving.done():
            on_ready(url_of(listener))
        await asyncio.wait({serving, shutdown}, return_when=asyncio.FIRST_COMPLETED)
        server.stop()
        await serving
    finally:
        for task in (serving, shutdown):
            task.cancel()
        await asyncio.gather(serving, shutdown, return_exceptions=True)
        server_log.removeFilter(quiet)


class _QuietServerLog(logging.Filter):
    """Lowers uvicorn's line on a drain that cancels no request from ERROR to DEBUG."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is logged."""
        if str(record.msg).startswith("Cancel %s running task(s)") and record.args == (0,):
            record.levelno, record.levelname = logging.DEBUG, logging.getLevelName(logging.DEBUG)
            return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)
        return True


class _Server(uvicorn.Server):
    """uvicorn inside a running event loop. The runtime handles the signals."""

    def __init__(self, config: uvicorn.Config, settings: FrontendSettings) -> None:
        super().__init__(config)
        request_s = settings.request_timeout_s or math.inf
        self._limits = HttpLimits(
            receive_timeout_s=min(settings.receive_timeout_s, request_s),
            send_timeout_s=min(settings.send_timeout_s, request_s),
        )
        self._max_connections_count = settings.max_http_connections_count
        self.accepting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """Begin to drain."""
        self.should_exit = True
        self._stopped.set()

    async def main_loop(self) -> None:
        """Update the Date header once a second until `stop`; uvicorn wakes up ten times a second."""
        while not self._stopped.is_set():
            await self.on_tick(0)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._stopped.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Install no handlers."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections, by an `Acceptor`."""
        assert sockets is not None
        make_protocol = partial(
            HttpProtocol,
            config=self.config,
            server_state=self.server_state,
            app_state={},
            limits=self._limits,
        )
        connections, waiting = self.server_state.connections, self._limits.waiting
        self.servers: list[Any] = [
            Acceptor(listening, make_protocol, connections, waiting, self._max_connections_count)
            for listening in sockets
        ]
        self.started = True
        self.accepting.set_result(None)
