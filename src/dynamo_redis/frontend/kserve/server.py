"""The gRPC server of the frontend: its port, its options, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

import grpc.aio
from starlette.types import ASGIApp

from dynamo_redis.config import FrontendSettings
from dynamo_redis.errors import ConfigError
from dynamo_redis.frontend.kserve.metadata import Metadata
from dynamo_redis.frontend.kserve.service import InferenceService

log = logging.getLogger(__name__)

KEEP_ALIVE_S: Final = 60.0
"""A client that has gone without a word is noticed by a ping after this time."""

PING_TIMEOUT_S: Final = 20.0

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
    service = InferenceService(app, metadata, settings.send_timeout_s)
    server = grpc.aio.server(
        handlers=[service.handlers()],
        maximum_concurrent_rpcs=settings.max_http_connections_count,
        options=[
            ("grpc.so_reuseport", int(settings.frontend_processes_count > 1)),
            ("grpc.max_receive_message_length", int(settings.max_body_bytes)),
            ("grpc.max_send_message_length", -1),
            ("grpc.compression_enabled_algorithms_bitset", 1),  # none: a few bytes could be many
            ("grpc.keepalive_time_ms", int(KEEP_ALIVE_S * 1000)),
            ("grpc.keepalive_timeout_ms", int(PING_TIMEOUT_S * 1000)),
        ],
    )
    address = f"{_bracketed(settings.http_host)}:{settings.grpc_port}"
    try:
        port = server.add_insecure_port(address)
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


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
