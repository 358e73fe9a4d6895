"""The first connection of a process to Redis: now or never, or whenever there is one."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from dynamo_redis.backoff import Backoff
from dynamo_redis.errors import StoreUnavailable
from dynamo_redis.store.base import Registry

log = logging.getLogger(__name__)

SAID_AGAIN_S = 10.0


async def start_registry(registry: Registry, shutdown: asyncio.Event, *, waits: bool) -> None:
    """Start a registry; `waits`: try again, with pauses, until Redis answers or `shutdown` is set.

    Raises StoreUnavailable if there is no Redis, with `waits` only after `shutdown`; StoreRefused,
    SchemaMismatch and ConfigError at once, since no waiting mends what they tell.
    """
    backoff, loop = Backoff(first_s=0.2), asyncio.get_running_loop()
    said_at = float("-inf")
    while True:
        try:
            await registry.start()
        except StoreUnavailable as exc:
            if not waits or shutdown.is_set():
                raise
            if loop.time() - said_at >= SAID_AGAIN_S:
                said_at = loop.time()
                log.warning("%s (waiting for it: DYN_WAIT_FOR_REDIS)", exc)
            with suppress(TimeoutError):
                async with asyncio.timeout(backoff.next_s()):
                    await shutdown.wait()
        else:
            if said_at > 0:
                log.info("Redis answers now")
            return
