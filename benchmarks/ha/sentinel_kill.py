"""H1 and H2: the primary of a Redis Sentinel deployment is killed (kill -9) under load.

Each round has servers, sentinels and a deployment of its own (a frontend with kv routing and two workers, as
`up` starts them). Chats come at a fixed pace; four owners keep keys and register more of them, one after the
other; a writer puts a key, again and again; a watch follows all keys.

H1  A sentinel is asked each 5 ms which primary it names. The figure is the time from its first answer with
    the new one to the first write that is acknowledged after the kill.
H2  A chat fails by any status but 200, by a broken connection, or after 30 s. When all has calmed down, the
    registry is compared with what must be there: the keys of the deployment before the kill, and those whose
    registration was acknowledged. Phantom keys are those that the watch shows otherwise than the registry.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import uvloop

from benchmarks.harness.chats import CountedChats, first_model
from benchmarks.harness.processes import up
from benchmarks.harness.report import Measured
from dynamo_redis.config import StoreSettings
from dynamo_redis.errors import StoreError
from dynamo_redis.store.base import Put
from dynamo_redis.store.registry.redis_registry import RedisRegistry
from dynamo_redis.store.sentinel_server import SentinelDeployment

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


@dataclass(frozen=True, slots=True)
class Outcome:
    """The figures of one round."""

    writable_s: float
    detected_s: float
    failed_chats: int
    missing: int
    extra: int
    phantom: int


def sentinel_kills(rounds: int) -> dict[str, Measured]:
    """Measure H1 and H2: the worst of all rounds."""
    outcomes = []
    for seed in range(1, rounds + 1):
        outcomes.append(found := uvloop.run(_round(random.Random(seed))))
        print(
            f"H1 H2 round {seed}: new primary named after {found.detected_s:.2f} s, writable"
            f" {found.writable_s:.3f} s later; {found.failed_chats} of {CHATS} chats failed; keys missing"
            f" {found.missing}, extra {found.extra}, phantom {found.phantom}",
            flush=True,
        )
    writable_s = float(f"{max(one.writable_s for one in outcomes):.3g}")
    counts = [
        float(max(getattr(one, name) for one in outcomes))
        for name in ("failed_chats", "missing", "extra", "phantom")
    ]
    return {
        "H1": Measured(writable_s, None, None, rounds),
        "H2": Measured(counts, None, None, rounds),
    }


async def _round(rng: random.Random) -> Outcome:
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        servers = await stack.enter_async_context(SentinelDeployment(Path(directory) / "servers"))
        options = ("--redis-url", servers.url, "--redis-prefix", PREFIX, "--speedup-ratio", "0")
        url = stack.enter_context(up(*options))
        chats = CountedChats(url, await asyncio.to_thread(first_model, url, READY_S), "H2")
        stack.callback(chats.close)
        owners = [await stack.enter_async_context(_registry(servers.url)) for _ in range(OWNERS)]
        keys = Keys(owners)
        await keys.register_first()
        flow = asyncio.create_task(chats.flow(CHATS, CHATS_PER_S))
        registering = asyncio.create_task(keys.register_on())
        await asyncio.sleep(rng.uniform(*KILL_AFTER_S))
        await keys.note_others()
        old = await servers.primary()
        await old.kill()
        killed_at = time.monotonic()
        writing = asyncio.create_task(_first_write(owners[0]))
        _, detected_at = await servers.wait_for_primary(other_than=old, poll_s=0.005)
        written_at = await writing
        failed_chats = await flow
        keys.stop()
        await registering
        missing, extra, phantom = await keys.compare()
        await keys.aclose()
        return Outcome(
            max(0.0, written_at - detected_at), detected_at - killed_at, failed_chats, missing, extra, phantom
        )


@asynccontextmanager
async def _registry(url: str) -> AsyncIterator[RedisRegistry]:
    registry = RedisRegistry(StoreSettings.load(redis_url=url, prefix=PREFIX))
    await registry.start()
    try:
        yield registry
    finally:
        await registry.aclose()


async def _first_write(registry: RedisRegistry) -> float:
    """Write until a write is acknowledged; return the time of that."""
    while True:
        try:
            await registry.put(_WRITTEN, b"x")
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
                        print(f"H2: {name}: {', '.join(sorted(keys)[:5])}", flush=True)
                return len(missing), len(extra), len(phantom)
            await asyncio.sleep(0.1)

    async def aclose(self) -> None:
        """End the watch."""
        await self._watch.aclose()
        await self._following
