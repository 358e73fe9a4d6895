"""The first connection of a process to Redis, with or without waiting for a Redis that is not there yet."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from dynamo_redis.backoff import Backoff
from dynamo_redis.errors import StoreUnavailable
from dynamo_redis.store.base import Registry

log = logging.getLogger(__name__)

WAIT_LOG_INTERVAL_S = 10.0
"""Seconds between two warnings while Redis is waited for."""


async def start_registry(registry: Registry, shutdown: asyncio.Event, *, waits: bool) -> None:
    """Start a registry. With `waits`, try again, with pauses, until Redis answers or `shutdown` is set.

    Raises StoreUnavailable if Redis does not answer, with `waits` only after `shutdown`. Raises StoreRefused,
    SchemaMismatch and ConfigError at once, since waiting cannot remove their causes.
    """
    backoff, loop = Backoff(first_s=0.2), asyncio.get_running_loop()
    logged_at = float("-inf")
    while True:
        try:
            await registry.start()
        except StoreUnavailable as exc:
            if not waits or shutdown.is_set():
                raise
            if loop.time() - logged_at >= WAIT_LOG_INTERVAL_S:
                logged_at = loop.time()
                log.warning("%s (waiting for it: DYN_WAIT_FOR_REDIS)", exc)
            with suppress(TimeoutError):
                async with asyncio.timeout(backoff.next_s()):
                    await shutdown.wait()
        else:
            if logged_at > 0:
                log.info("Redis answers now")
            return
