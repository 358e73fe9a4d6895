"""The gRPC server of the frontend: its port, its options, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
from starlette.types import ASGIApp

from dynamo_redis.config import FrontendSettings
from dynamo_redis.errors import ConfigError
from dynamo_redis.frontend.http.tls import HttpTls, http_tls
from dynamo_redis.frontend.kserve.metadata import Metadata
from dynamo_redis.frontend.kserve.service import InferenceService
from dynamo_redis.planes.reloaded import stamp_of

log = logging.getLogger(__name__)

KEEP_ALIVE_S: Final = 60.0
"""A client that has gone without a word is noticed by a ping after this time."""

PING_TIMEOUT_S: Final = 20.0

IDLE_CONNECTION_S: Final = 300.0
"""A connection without a call ends after this time."""

HANDSHAKE_S: Final = 10.0

SPARE_CALLS: Final = 100
"""Calls beyond those that generate: a probe gets its answer while streams hold all other places."""

LAST_SEND_S: Final = 1.0
"""Longest time at the shutdown for the ends of the last calls to reach their clients."""


@contextlib.asynccontextmanager
async def serving_kserve(
    app: ASGIApp,
    metadata: Metadata,
    settings: FrontendSettings,
    wait_for_shutdown: Callable[[], Awaitable[None]],
    drain_s: float,
) -> AsyncIterator[int]:
    """Serve until the shutdown; yield the port. At the end of the block calls under way have ended.

    They have `drain_s` from the shutdown. If the block ends by an error, they are cancelled.
    Raises ConfigError if the port cannot be had.
    """
    most_open = settings.max_http_connections_count
    service = InferenceService(app, metadata, settings.send_timeout_s, most_open=most_open)
    server = grpc.aio.server(
        handlers=[service.handlers()],
        maximum_concurrent_rpcs=most_open + SPARE_CALLS,
        options=[
            ("grpc.so_reuseport", int(settings.frontend_processes_count > 1)),
            ("grpc.max_receive_message_length", int(settings.max_body_bytes)),
            ("grpc.max_send_message_length", -1),
            ("grpc.compression_enabled_algorithms_bitset", 1),  # none: a few bytes could be many
            ("grpc.keepalive_time_ms", int(KEEP_ALIVE_S * 1000)),
            ("grpc.max_connection_idle_ms", int(IDLE_CONNECTION_S * 1000)),
            ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_S * 1000)),
            ("grpc.http2.bdp_probe", 0),  # a message that no handler has asked for stays within 64 KiB
            ("grpc.keepalive_timeout_ms", int(PING_TIMEOUT_S * 1000)),
        ],
    )
    address = f"{_bracketed(settings.http_host)}:{settings.grpc_port}"
    tls = http_tls(settings)  # raises ConfigError for files that cannot be used
    try:
        if tls is None:
            port = server.add_insecure_port(address)
        else:
            assert settings.tls_cert_path is not None
            assert settings.tls_key_path is not None
            credentials = reloaded_credentials(settings.tls_cert_path, settings.tls_key_path)
            port = server.add_secure_port(address, credentials)
    except RuntimeError as exc:
        raise ConfigError(
            f"cannot listen for gRPC on {address}: stop the program that has this port, or choose another "
            "with --grpc-port (DYN_GRPC_PORT); 0 takes a free one"
        ) from exc
    await server.start()
    log.info("KServe over gRPC on %s:%d", _bracketed(settings.http_host), port)

    async def drain() -> None:
        await wait_for_shutdown()
        service.drain()
        stopping = asyncio.create_task(server.stop(drain_s))
        idle = asyncio.create_task(service.until_idle())
        try:
            await asyncio.wait({stopping, idle}, return_when=asyncio.FIRST_COMPLETED)
            await server.stop(min(drain_s, LAST_SEND_S))
        finally:
            idle.cancel()
            await stopping

    draining = asyncio.create_task(drain(), name="drain gRPC")
    try:
        yield port
        await draining
    finally:
        draining.cancel()
        await server.stop(None)


def reloaded_credentials(cert: Path, key: Path) -> grpc.ServerCredentials:
    """Return the credentials in these files, which are read again when they have changed.

    grpcio asks before each handshake, in a thread of its own. Files that cannot be used change nothing.
    """
    loop = asyncio.get_running_loop()
    seen = stamp_of((cert, key))

    def read() -> Any:
        return grpc.ssl_server_certificate_configuration([(key.read_bytes(), cert.read_bytes())])

    def changed() -> Any:
        nonlocal seen
        found = stamp_of((cert, key))
        if found == seen:
            return None
        seen = found
        try:
            HttpTls(cert, key)
            return read()
        except (ConfigError, OSError) as exc:
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                loop.call_soon_threadsafe(log.error, "%s; the gRPC port keeps the certificates it had", exc)
            return None

    return grpc.dynamic_ssl_server_credentials(read(), changed)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
