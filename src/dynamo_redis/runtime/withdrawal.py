"""The removal of several registered keys at once, with at most one wait for a silent Redis."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from dynamo_redis.errors import StoreError
from dynamo_redis.store.base import Registration

log = logging.getLogger(__name__)


async def withdraw(registrations: Iterable[Registration]) -> None:
    """Unregister keys, in this order. Never raises if Redis does not answer.

    The first key that Redis does not confirm within `DYN_REDIS_TIMEOUT_S` ends the wait for all of them. The
    registry deletes the remaining keys as soon as it reaches Redis again; otherwise they end with this
    process's lease. A cancellation has the same effect on the remaining keys.
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
            log.warning(
                "could not take %d keys out of the registry, they end with the lease: %s", len(keys), outcome
            )
            return
