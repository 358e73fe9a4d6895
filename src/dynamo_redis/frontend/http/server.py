"""The frontend process: binds the port, serves until the runtime's shutdown, drains."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import tempfile
from collections.abc import Awaitable, Callable, Collection, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from dynamo_redis.config import FrontendSettings, RouterSettings, user_model_cache
from dynamo_redis.errors import ConfigError
from dynamo_redis.frontend.apis import APIS, Api
from dynamo_redis.frontend.app import make_app
from dynamo_redis.frontend.cache_clearing import clear_kv_blocks
from dynamo_redis.frontend.dashboard.dashboard import Dashboard
from dynamo_redis.frontend.forms.base import ErrorForm
from dynamo_redis.frontend.http.acceptor import Acceptor
from dynamo_redis.frontend.http.door import Door
from dynamo_redis.frontend.http.limits import HttpLimits
from dynamo_redis.frontend.http.port import bind, url_of
from dynamo_redis.frontend.http.protocol import HttpProtocol
from dynamo_redis.frontend.http.siblings import apart_from_siblings, sibling_socket, with_all_metrics
from dynamo_redis.frontend.http.tls import HttpTls
from dynamo_redis.frontend.models import LiveModels
from dynamo_redis.frontend.observation import observed
from dynamo_redis.frontend.prompts import Preparation
from dynamo_redis.frontend.record import keep_listed
from dynamo_redis.frontend.routing import client_opener, router_of
from dynamo_redis.names import EndpointName
from dynamo_redis.runtime.runtime import DistributedRuntime

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
"""Seconds that an idle connection stays open: longer than clients' pools and proxies keep theirs."""

LAST_WRITE_S = 1.0
"""Longest time in which the requests that a shutdown ends tell their clients so, and then again in which they
end once their connections are dropped."""

LOAD_S = 20.0
"""Longest time in which one of several processes loads the models that are served, before it accepts
connections."""


async def serve_frontend(
    runtime: DistributedRuntime,
    settings: FrontendSettings,
    router_settings: RouterSettings | None = None,
    *,
    on_ready: Callable[[str], None] | None = None,
    on_grpc_ready: Callable[[int], None] | None = None,
    listener: socket.socket | None = None,
    siblings: Path | None = None,
) -> None:
    """Serve HTTP until the runtime shuts down; then finish requests under way, within the runtime's grace.

    `on_ready` is called with the server's URL once it accepts connections; models may not be loaded yet.
    Before that, `on_grpc_ready` is called with the port of the KServe server, if there is one. `listener` is
    a bound socket, which is closed here. Without one the port of the settings is bound first. `siblings` is
    the directory of the sockets of all processes that listen on this port, if there are others.
    `router_settings` are used in the router mode `kv`; None: those of the environment. Raises ConfigError if
    the port cannot be bound, or if keys or certificates cannot be used.
    """

    def note_ready(url: str) -> None:
        runtime.note_serving()
        if on_ready is not None:
            on_ready(url)

    router_settings = router_settings or RouterSettings.load()
    grpc_apis = kserve_apis() if settings.kserve_grpc_server else ()
    door = Door(settings, {api.path: api.errors for api in APIS} | kserve_errors(settings))
    open_client = client_opener(runtime, settings, router_settings)
    listener = listener or bind(settings.http_host, settings.http_port)
    with contextlib.closing(listener), model_cache(settings.model_cache) as cache_dir:
        await runtime.start()
        preparation = Preparation(int(settings.max_body_bytes))
        models = LiveModels(
            runtime,
            open_client=open_client,
            cache_dir=cache_dir,
            lease_ttl_s=runtime.settings.store.lease_ttl_s,
            tokenizer=settings.tokenizer,
            router_settings=router_settings,
        )
        listing = asyncio.create_task(keep_listed(runtime, settings, listener), name="list frontend")
        try:
            async with models:
                dashboard = None
                if settings.dashboard:
                    dashboard = Dashboard(models, runtime.registry, runtime.wait_for_shutdown, siblings)
                app = own = make_app(
                    models,
                    preparation,
                    settings,
                    runtime.registry,
                    partial(_clear_caches, runtime, models),
                    runtime.metrics,
                    grpc_apis=grpc_apis,
                    dashboard=dashboard,
                )
                async with contextlib.AsyncExitStack() as stack:
                    if dashboard is not None:
                        await stack.enter_async_context(dashboard.running())
                        own = dashboard.with_reading(own)
                    sockets = [listener]
                    if siblings is not None:
                        sockets.append(stack.enter_context(sibling_socket(siblings)))
                        app = with_all_metrics(app, siblings)
                        await _load_first(runtime, models)
                    app = observed(door.wrap(app), logs=settings.access_log)
                    if siblings is not None:
                        app = apart_from_siblings(app, own)
                    if settings.kserve_grpc_server:
                        port = await stack.enter_async_context(_kserve_server(app, models, settings, runtime))
                        if on_grpc_ready is not None:
                            on_grpc_ready(port)
                    await run_server(
                        app,
                        sockets,
                        runtime.wait_for_shutdown,
                        settings,
                        drain_s=runtime.shutdown_deadline.requests_left_s,
                        tls=door.tls,
                        on_ready=note_ready,
                    )
        finally:
            listing.cancel()
            await asyncio.gather(listing, return_exceptions=True)
            await preparation.aclose()


def kserve_apis() -> tuple[Api, ...]:
    """Return the APIs of the KServe server."""
    from dynamo_redis.frontend.kserve.apis import INFER, STREAM_INFER  # needs the extra

    return INFER, STREAM_INFER


def kserve_errors(settings: FrontendSettings) -> dict[str, ErrorForm]:
    """Return the forms of errors of the KServe server's paths, if there is one."""
    if not settings.kserve_grpc_server:
        return {}
    from dynamo_redis.frontend.kserve.apis import ERROR_FORMS  # needs the extra

    return dict(ERROR_FORMS)


def _kserve_server(
    app: ASGIApp, models: LiveModels, settings: FrontendSettings, runtime: DistributedRuntime
) -> contextlib.AbstractAsyncContextManager[int]:
    from dynamo_redis.frontend.kserve.metadata import Metadata  # needs the extra
    from dynamo_redis.frontend.kserve.server import serving_kserve

    return serving_kserve(
        app,
        Metadata(models, runtime.registry),
        settings,
        runtime.wait_for_shutdown,
        runtime.shutdown_deadline.requests_left_s,
    )


async def _load_first(runtime: DistributedRuntime, models: LiveModels) -> None:
    """Wait until the models are loaded: the other processes of the port serve them meanwhile."""
    loading = asyncio.create_task(models.until_loaded())
    shutdown = asyncio.ensure_future(runtime.wait_for_shutdown())
    await asyncio.wait({loading, shutdown}, timeout=LOAD_S, return_when=asyncio.FIRST_COMPLETED)
    for waiting in (loading, shutdown):
        waiting.cancel()
    await asyncio.gather(loading, shutdown, return_exceptions=True)


async def _clear_caches(
    runtime: DistributedRuntime, models: LiveModels, endpoints: Collection[EndpointName]
) -> tuple[int, dict[str, Any]]:
    status, body = await clear_kv_blocks(runtime, endpoints)
    for router in map(router_of, models.clients()):
        if router is not None:
            for worker in body["cleared_workers"]:
                router.forget_predictions(worker["instance_id"])
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


# --------------------------------------------------------------------------- uvicorn


async def run_server(
    app: ASGIApp,
    sockets: Sequence[socket.socket],
    wait_for_shutdown: Callable[[], Awaitable[None]],
    settings: FrontendSettings,
    *,
    drain_s: float,
    on_ready: Callable[[str], None] | None = None,
    tls: HttpTls | None = None,
) -> None:
    """Serve an application on bound sockets until `wait_for_shutdown()` returns, then drain.

    `on_ready` gets the URL of the first one. It has this TLS, if any; further ones are in the clear.
    Draining takes at most `drain_s`; requests that are still under way then end with an error. Cancelling
    this coroutine ends everything at once.
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
        ),
        settings,
        drain_s,
        tls,
    )
    serving = asyncio.create_task(server.serve(sockets=list(sockets)))
    shutdown = asyncio.ensure_future(wait_for_shutdown())
    try:
        await asyncio.wait({serving, server.accepting}, return_when=asyncio.FIRST_COMPLETED)
        if on_ready is not None and not serving.done():
            on_ready(url_of(sockets[0], "http" if tls is None else "https"))
        await asyncio.wait({serving, shutdown}, return_when=asyncio.FIRST_COMPLETED)
        server.stop()
        await serving
    finally:
        for task in (serving, shutdown):
            task.cancel()
        await asyncio.gather(serving, shutdown, return_exceptions=True)


class _Server(uvicorn.Server):
    """uvicorn inside a running event loop. The runtime handles the signals."""

    def __init__(
        self, config: uvicorn.Config, settings: FrontendSettings, drain_s: float, tls: HttpTls | None
    ) -> None:
        super().__init__(config)
        self._drain_s = drain_s
        self._tls = tls
        request_s = settings.request_timeout_s or math.inf
        self._limits = HttpLimits(
            receive_timeout_s=min(settings.receive_timeout_s, request_s),
            send_timeout_s=min(settings.send_timeout_s, request_s),
            overload_status=settings.overload_status,
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

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain: accept no more connections, and end those that are open with their next answer."""
        self._limits.is_draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._drain_s):
                await super().shutdown(sockets)
        await self._cut_off()

    async def _cut_off(self) -> None:
        """End the requests that are still under way: each client gets an error, unless it does not read."""
        if left := set(self.server_state.tasks):
            log.warning(
                "the shutdown's time for requests is over: %d that have not ended are cut off "
                "(DYN_GRACEFUL_SHUTDOWN_S)",
                len(left),
            )
            for request in left:
                request.cancel()
            await asyncio.wait(left, timeout=LAST_WRITE_S)
        for connection in tuple(self.server_state.connections):
            if (transport := connection.transport) is not None:
                transport.abort()
        if left:
            await asyncio.wait(left, timeout=LAST_WRITE_S)

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
            Acceptor(
                listening,
                make_protocol,
                connections,
                waiting,
                self._max_connections_count,
                tls,
                self._limits.overload_status,
            )
            for listening, tls in zip(sockets, [self._tls, *[None] * len(sockets)], strict=False)
        ]
        self.started = True
        self.accepting.set_result(None)
