"""Reads the objects that uploaders put."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any, Final

from dynamo_redis.errors import ObjectChanged, ObjectNotFound
from dynamo_redis.store.objects.redis_objects import RedisObjectStore
from faults.history import Outcome
from faults.roles.base import Process
from faults.roles.uploader import BUCKET, NAMES

READERS_COUNT: Final = 2


async def run(process: Process) -> None:
    """Read until told to rest, then stay."""
    objects = RedisObjectStore.from_settings(process.settings())
    process.recorder.note("started", role="reader", lease=None)

    async def read_on() -> None:
        while not process.resting.is_set():
            await _read(process, objects, process.rng.choice(NAMES))
            await process.pause()

    try:
        await asyncio.gather(*(read_on() for _ in range(READERS_COUNT)))
        await asyncio.Event().wait()
    finally:
        await objects.aclose()


async def _read(process: Process, objects: RedisObjectStore, name: str) -> None:
    async def attempt() -> tuple[Outcome, Any]:
        try:
            content = await objects.read(BUCKET, name)
        except ObjectNotFound:
            return "ok", {"sha256": None}
        except ObjectChanged:
            return "refused", {"error": "changed"}
        return "ok", {"sha256": hashlib.sha256(content).hexdigest()}

    await process.call("object_get", attempt, name=name)
