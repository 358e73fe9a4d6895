"""Puts objects, all uploaders the same names, and sometimes removes one."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any, Final

from dynamo_redis.store.objects.redis_objects import RedisObjectStore
from faults.history import Outcome
from faults.roles.base import Process

BUCKET: Final = "faults"
NAMES: Final = ("o0", "o1")
SMALL_BYTES: Final = 1 << 16
LARGE_BYTES: Final = 5 << 19
"""2.5 chunks."""
PAUSE_S: Final = 0.2


async def run(process: Process) -> None:
    """Upload until told to rest, then stay."""
    objects = RedisObjectStore.from_settings(process.settings())
    process.recorder.note("started", role="uploader", lease=None)
    try:
        while not process.resting.is_set():
            name = process.rng.choice(NAMES)
            if process.rng.random() < 0.9:
                await _put(process, objects, name)
            else:
                await _remove(process, objects, name)
            await asyncio.sleep(process.rng.uniform(0, PAUSE_S))
        await asyncio.Event().wait()
    finally:
        await objects.aclose()


async def _put(process: Process, objects: RedisObjectStore, name: str) -> None:
    most = LARGE_BYTES if process.rng.random() < 0.3 else SMALL_BYTES
    content = process.rng.randbytes(process.rng.randint(0, most))

    async def attempt() -> tuple[Outcome, Any]:
        await objects.put(BUCKET, name, content)
        return "ok", {}

    digest = hashlib.sha256(content).hexdigest()
    await process.call("object_put", attempt, name=name, sha256=digest, size_bytes=len(content))


async def _remove(process: Process, objects: RedisObjectStore, name: str) -> None:
    async def attempt() -> tuple[Outcome, Any]:
        await objects.remove(BUCKET, name)
        return "ok", {}

    await process.call("object_remove", attempt, name=name)
