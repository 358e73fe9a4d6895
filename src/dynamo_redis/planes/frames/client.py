"""The calling side of a plane of frames: implements `RequestPlaneClient` with one pool for each instance."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable
from contextvars import copy_context
from typing import Any

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import ConnectionLost, InstanceRemoved
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.frames.carrier import Carrier
from dynamo_redis.planes.frames.pool import Pool
from dynamo_redis.planes.frames.response_stream import FrameResponseStream
from dynamo_redis.wire.decoder import ReadBuffers

_PoolKey = tuple[str, int, bytes | None]


class FrameClient:
    """Implements `RequestPlaneClient`. Use it on the event loop that first opens a request."""

    def __init__(
        self,
        settings: PlaneSettings,
        carrier: Carrier,
        on_quiet: Callable[[Target], None] | None = None,
    ) -> None:
        """Make a client without connections.

        Args:
            settings: the plane's settings.
            carrier: opens the connections; `aclose` closes it.
            on_quiet: see `select.make_client`.
        """
        self._settings = settings
        self._carrier = carrier
        self._window_count = settings.channel_buffer_count
        self._max_message_bytes = settings.max_message_bytes
        self._on_quiet = on_quiet or (lambda _: None)
        self._variables = copy_context()
        self._pools: dict[_PoolKey, Pool] = {}
        self._buffers = ReadBuffers(settings.max_payload_in_flight_bytes)
        self._closed = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self._pools)} instances>"

    @property
    def pending_count(self) -> int:
        """Count of pending requests, parked ones included."""
        return sum(pool.pending_count for pool in self._pools.values())

    @property
    def connection_count(self) -> int:
        """Count of open connections."""
        return sum(pool.connection_count for pool in self._pools.values())

    @property
    def payload_bytes(self) -> int:
        """Bytes of large payloads in memory: still arriving, or unread."""
        return self._buffers.budget.held_bytes

    def open(
        self,
        target: Target,
        request: Any,
        context: Context | None,
        *,
        messages: AsyncIterable[Any] | None = None,
    ) -> FrameResponseStream:
        """See `RequestPlaneClient.open`."""
        pool = self._pools.get((target.address, target.instance_id, target.secret)) or self._new_pool(target)
        stream = FrameResponseStream(
            pool.loop, self._window_count, self._max_message_bytes, target.subject, request, context, messages
        )
        if context is None or stream.attach(context):
            pool.submit(stream)
        return stream

    async def probe(self, target: Target, timeout_s: float) -> None:
        """See `RequestPlaneClient.probe`."""
        pool = self._pools.get((target.address, target.instance_id, target.secret)) or self._new_pool(target)
        await pool.ping(timeout_s)

    def forget(self, target: Target) -> None:
        """See `RequestPlaneClient.forget`."""
        pool = self._pools.get((target.address, target.instance_id, target.secret))
        if pool is not None:
            pool.end(InstanceRemoved("the instance left the registry"), target.subject)

    async def aclose(self) -> None:
        """See `RequestPlaneClient.aclose`. Idempotent."""
        self._closed = True
        for pool in tuple(self._pools.values()):
            await pool.aclose()
        await self._carrier.aclose()

    def _new_pool(self, target: Target) -> Pool:
        if self._closed:
            raise ConnectionLost("the client is closed")
        key = target.address, target.instance_id, target.secret
        pool = Pool(
            target,
            self._settings,
            self._carrier,
            asyncio.get_running_loop(),
            self._buffers,
            self._variables,
            lambda: self._pools.pop(key, None),
            self._on_quiet,
        )
        self._pools[key] = pool
        return pool
