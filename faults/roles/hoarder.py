"""Puts values as large as the registry takes them, and reads them back."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from dynamo_redis.store.keys import VALUE_MAX_BYTES
from dynamo_redis.store.registry.redis_registry import RedisRegistry
from faults.history import Outcome, recorded_value
from faults.roles.base import Process

KEYS: Final = ("large/0", "large/1")
PAUSE_S: Final = 2.0
"""Longest pause between two calls in seconds: all values together take half of a link of 1 MB/s."""


async def run(process: Process) -> None:
    """Put and get until told to rest, then stay."""
    registry = await process.open_registry()
    process.recorder.note("started", role="hoarder", lease=None)
    try:
        while not process.resting.is_set():
            key = process.rng.choice(KEYS)
            if process.rng.random() < 0.7:
                await _put(process, registry, key)
            else:
                await _get(process, registry, key)
            await asyncio.sleep(process.rng.uniform(0, PAUSE_S))
        await asyncio.Event().wait()
    finally:
        await registry.aclose()


async def _put(process: Process, registry: RedisRegistry, key: str) -> None:
    value = process.new_value()

    async def attempt() -> tuple[Outcome, Any]:
        large = f"{value}|".encode().ljust(VALUE_MAX_BYTES, b".")
        return "ok", {"revision": await registry.put(key, large)}

    await process.call("put", attempt, key=key, value=value)


async def _get(process: Process, registry: RedisRegistry, key: str) -> None:
    async def attempt() -> tuple[Outcome, Any]:
        record = await registry.get(key)
        if record is None:
            return "ok", {"value": None, "revision": None}
        return "ok", {"value": recorded_value(record.value), "revision": record.mod_revision}

    await process.call("get", attempt, key=key)
