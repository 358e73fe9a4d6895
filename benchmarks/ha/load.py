"""The load while a part of the store fails: owners that register keys, a writer, and a watch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

from dynamo_redis.config import StoreSettings
from dynamo_redis.errors import StoreError
from dynamo_redis.store.base import Put
from dynamo_redis.store.registry.redis_registry import RedisRegistry

PREFIX: Final = "bench-ha"
CHATS: Final = 300
CHATS_PER_S: Final = 40.0
OWNERS: Final = 4
KEYS_AN_OWNER: Final = 25
REGISTER_EVERY_S: Final = 0.02
KILL_AFTER_S: Final = (1.0, 2.0)
READY_S: Final = 60.0
CALM_S: Final = 30.0
_WRITTEN: Final = "writer"


@asynccontextmanager
async def registry(url: str) -> AsyncIterator[RedisRegistry]:
    """Yield a process of the deployment."""
    made = RedisRegistry(StoreSettings.load(redis_url=url, prefix=PREFIX))
    await made.start()
    try:
        yield made
    finally:
        await made.aclose()


async def first_write(writer: RedisRegistry) -> float:
    """Write until a write is acknowledged; return the time of that."""
    while True:
        try:
            await writer.put(_WRITTEN, b"x")
        except StoreError:
            await asyncio.sleep(0)
        else:
            return time.monotonic()


class Keys:
    """The keys that must be there, and a watch that shows those that are."""

    def __init__(self, owners: list[RedisRegistry]) -> None:
        self._owners = owners
        self._expected: set[str] = {_WRITTEN}
        self._registering = True
        self._shown: dict[str, bytes] = {}
        self._watch = owners[-1].watch("")
        self._following = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        async for batch in self._watch:
            for event in batch.events:
                if isinstance(event, Put):
                    self._shown[event.record.key] = event.record.value
                else:
                    self._shown.pop(event.key, None)

    async def register_first(self) -> None:
        """Register the keys that each owner has from the start."""
        for number in range(OWNERS * KEYS_AN_OWNER):
            await self._register(number)

    async def register_on(self) -> None:
        """Register further keys until `stop`."""
        number = OWNERS * KEYS_AN_OWNER
        while self._registering:
            with suppress(StoreError):  # then the key must not be there in the end
                await self._register(number)
            number += 1
            await asyncio.sleep(REGISTER_EVERY_S)

    def stop(self) -> None:
        """Let `register_on` end."""
        self._registering = False

    async def _register(self, number: int) -> None:
        key = f"owned/{number}"
        await self._owners[number % OWNERS].register(key, b"%d" % number)
        self._expected.add(key)

    async def note_others(self) -> None:
        """Note the keys of the deployment."""
        found = await self._owners[0].get_prefix("")
        self._expected.update(record.key for record in found.records if not record.key.startswith("owned/"))

    async def compare(self) -> tuple[int, int, int]:
        """Return how many keys are missing, extra and phantom: as soon as none is, or after `CALM_S`."""
        deadline = time.monotonic() + CALM_S
        while True:
            found = {record.key: record.value for record in (await self._owners[0].get_prefix("")).records}
            missing = self._expected - found.keys()
            extra = found.keys() - self._expected
            phantom = {key for key, _ in found.items() ^ self._shown.items()}
            if not (missing or extra or phantom) or time.monotonic() > deadline:
                for name, keys in (("missing", missing), ("extra", extra), ("phantom", phantom)):
                    if keys:
                        print(f"{name}: {', '.join(sorted(keys)[:5])}", flush=True)
                return len(missing), len(extra), len(phantom)
            await asyncio.sleep(0.1)

    async def aclose(self) -> None:
        """End the watch."""
        await self._watch.aclose()
        await self._following
