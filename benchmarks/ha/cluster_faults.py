"""H3 and H4: a cluster of three masters with replicas that loses a master, and whose slots move, under load.

The load is that of H1 and H2 (`load`): chats through a frontend with kv routing and two workers, owners that
register keys, and a watch of all keys. `cluster-node-timeout` is 1,000 ms.

H3  The master of the registry's slot is killed (kill -9). Its replica is asked each 5 ms for its role. The
    figure is the time from its first answer that it is a master to the first write that is acknowledged after
    the kill.
H4  Each slot that has keys of the deployment moves to another master, the registry's slot again and again,
    as `redis-cli --cluster reshard` moves them, until all chats are over. A writer puts numbers under one
    key meanwhile, and tells each that was acknowledged. Events are lost if the watch did not show such a
    number.
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

from benchmarks.ha.load import (
    CALM_S,
    CHATS,
    CHATS_PER_S,
    KILL_AFTER_S,
    OWNERS,
    PREFIX,
    READY_S,
    Keys,
    first_write,
    registry,
)
from benchmarks.harness.chats import CountedChats, first_model
from benchmarks.harness.processes import up
from benchmarks.harness.report import Measured
from dynamo_redis.errors import StoreError
from dynamo_redis.store.base import Put
from dynamo_redis.store.cluster_server import ClusterNode, EmbeddedCluster
from dynamo_redis.store.keys import RegistryKeys
from dynamo_redis.store.redis.cluster.slots import slot_of_key
from dynamo_redis.store.registry.redis_registry import RedisRegistry

NUMBERS_KEY: Final = "numbers"
NUMBER_EVERY_S: Final = 0.01
_TAKEOVER_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Load:
    """A deployment under load on a cluster."""

    cluster: EmbeddedCluster
    chats: CountedChats
    owners: list[RedisRegistry]


@asynccontextmanager
async def _deployment(label: str) -> AsyncIterator[Load]:
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        cluster = await stack.enter_async_context(EmbeddedCluster(Path(directory)))
        options = ("--redis-url", cluster.url, "--redis-prefix", PREFIX, "--speedup-ratio", "0")
        url = stack.enter_context(up(*options))
        chats = CountedChats(url, await asyncio.to_thread(first_model, url, READY_S), label)
        stack.callback(chats.close)
        owners = [await stack.enter_async_context(registry(cluster.url)) for _ in range(OWNERS)]
        yield Load(cluster, chats, owners)


# ---------------------------------------------------------------------- H3


def master_kills(rounds: int) -> dict[str, Measured]:
    """Measure H3: the worst of all rounds."""
    worst_s = 0.0
    for seed in range(1, rounds + 1):
        took_over_s, writable_s, failed_count, missed = uvloop.run(_kill(random.Random(seed)))
        worst_s = max(worst_s, writable_s)
        print(
            f"H3 round {seed}: the replica took over after {took_over_s:.2f} s, writable {writable_s:.3f} s"
            f" later; {failed_count} of {CHATS} chats failed; keys missing, extra, phantom: {missed}",
            flush=True,
        )
    return {"H3": Measured(float(f"{worst_s:.3g}"), None, None, rounds)}


async def _kill(rng: random.Random) -> tuple[float, float, int, tuple[int, int, int]]:
    async with _deployment("H3") as load:
        keys = Keys(load.owners)
        await keys.register_first()
        flow = asyncio.create_task(load.chats.flow(CHATS, CHATS_PER_S))
        registering = asyncio.create_task(keys.register_on())
        await asyncio.sleep(rng.uniform(*KILL_AFTER_S))
        await keys.note_others()
        master = await load.cluster.owner_of(RegistryKeys(PREFIX).meta)
        replica = await load.cluster.replica_of(master)
        await master.server.kill()
        killed_at = time.monotonic()
        writing = asyncio.create_task(first_write(load.owners[0]))
        took_over_at = await _takeover(replica)
        written_at = await writing
        failed_count = await flow
        keys.stop()
        await registering
        missed = await keys.compare()
        await keys.aclose()
        return took_over_at - killed_at, max(0.0, written_at - took_over_at), failed_count, missed


async def _takeover(replica: ClusterNode) -> float:
    """Return the time at which a replica first says that it is a master."""
    async with asyncio.timeout(_TAKEOVER_S):
        while True:
            with suppress(StoreError):
                if await replica.is_master():
                    return time.monotonic()
            await asyncio.sleep(0.005)


# ---------------------------------------------------------------------- H4


def slot_moves(rounds: int) -> dict[str, Measured]:
    """Measure H4: the worst of all rounds."""
    failed_counts, lost_counts = [], []
    for seed in range(1, rounds + 1):
        moved_count, failed_count, numbers_count, lost_count = uvloop.run(_moves(random.Random(seed)))
        failed_counts.append(failed_count)
        lost_counts.append(lost_count)
        print(
            f"H4 round {seed}: {moved_count} moves of slots; {failed_count} of {CHATS} chats failed;"
            f" {lost_count} of {numbers_count} watch events lost",
            flush=True,
        )
    worst = [float(max(failed_counts)), float(max(lost_counts))]
    return {"H4": Measured(worst, None, None, rounds)}


async def _moves(rng: random.Random) -> tuple[int, int, int, int]:
    async with _deployment("H4") as load:
        numbers = Numbers(load.owners[0], load.owners[1])
        flow = asyncio.create_task(load.chats.flow(CHATS, CHATS_PER_S))
        moved_count = 0
        cluster = load.cluster
        registry_slot = await cluster.slot_of(RegistryKeys(PREFIX).meta)
        while not flow.done():
            slots = await _used_slots(cluster)
            for slot in (registry_slot, *rng.sample(sorted(slots), len(slots))):
                owner = await cluster.owner(slot)
                masters = [node for node in cluster.nodes if node.master is None and node is not owner]
                await cluster.move_slot(slot, rng.choice(masters))
                moved_count += 1
                if flow.done():
                    break
        failed_count = await flow
        lost_count = await numbers.aclose()
        return moved_count, failed_count, numbers.count, lost_count


async def _used_slots(cluster: EmbeddedCluster) -> set[int]:
    """Return the slots of all keys of the deployment."""
    found: set[int] = set()
    for node in cluster.running():
        if node.master is None:
            keys = await node.execute("KEYS", f"{{{PREFIX}*")
            found.update(map(slot_of_key, keys))
    return found


class Numbers:
    """Numbers that are put under one key one after the other, and a watch that must show each."""

    def __init__(self, writer: RedisRegistry, reader: RedisRegistry) -> None:
        self.count = 0
        """Numbers whose write was acknowledged."""
        self._shown: set[int] = set()
        self._written: set[int] = set()
        self._is_writing = True
        self._watch = reader.watch(NUMBERS_KEY)
        self._following = asyncio.create_task(self._follow())
        self._writing = asyncio.create_task(self._write(writer))

    async def _follow(self) -> None:
        async for batch in self._watch:
            self._shown.update(int(event.record.value) for event in batch.events if isinstance(event, Put))

    async def _write(self, writer: RedisRegistry) -> None:
        number = 0
        while self._is_writing:
            with suppress(StoreError):
                await writer.put(NUMBERS_KEY, b"%d" % number)
                self._written.add(number)
                self.count += 1
            number += 1
            await asyncio.sleep(NUMBER_EVERY_S)

    async def aclose(self) -> int:
        """End; return how many numbers the watch has not shown after `CALM_S`."""
        self._is_writing = False
        await self._writing
        deadline = time.monotonic() + CALM_S
        while not self._written <= self._shown and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        await self._watch.aclose()
        await self._following
        return len(self._written - self._shown)
