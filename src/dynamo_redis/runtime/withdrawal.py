"""Taking registered keys back: all at once, and without waiting for a silent Redis more than once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from dynamo_redis.errors import StoreError
from dynamo_redis.store.base import Registration

log = logging.getLogger(__name__)


async def withdraw(registrations: Iterable[Registration]) -> None:
    """Unregister keys, in this order. Never raises for a dead Redis.

    The first that Redis does not answer within `DYN_REDIS_TIMEOUT_S` ends the waiting for all of them: the
    registry deletes them once it is reached again, and otherwise they end with this process's lease. The same
    happens to those that are left when this is cancelled.
    """
    keys = list(registrations)
    if not keys:
        return
    tasks = [asyncio.create_task(key.unregister(), name=f"withdraw {key.key}") for key in keys]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, StoreError):
            log.warning("could not take %d keys out of the registry, the lease will: %s", len(keys), outcome)
            return
