"""A deployment in one process for tests of KV events: workers with simulated caches, and routers' indexers.

Everything between is real: request plane, registry, event streams. The true content of a worker's cache is
known from the cache itself, by names that the publisher must translate, so that an index can be compared to
it.
"""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from dynamo_redis.config import RouterSettings
from dynamo_redis.engines.base import AllBlocksCleared, BlocksRemoved, BlocksStored
from dynamo_redis.engines.mock.kv_cache import BlockCache, BlockTable
from dynamo_redis.events.block_hashes import chain, local_hashes
from dynamo_redis.events.kv_dump import KvDump
from dynamo_redis.events.kv_publisher import KvPublisher
from dynamo_redis.events.publisher import EventPublisher
from dynamo_redis.events.shards import kv_event_streams, shard_of, shards_count
from dynamo_redis.router.base import Worker
from dynamo_redis.router.index import followers, members, recovery
from dynamo_redis.router.index import indexer as indexer_module
from dynamo_redis.router.index.indexer import Indexer
from dynamo_redis.runtime import DistributedRuntime, Settings
from dynamo_redis.store.base import LeaseId
from dynamo_redis.store.connect import open_events, open_locks, open_store
from dynamo_redis.store.event_base import StreamName
from dynamo_redis.store.registry.redis_registry import RedisRegistry
from dynamo_redis.store.streams import readers
from dynamo_redis.wire.event import PublisherId
from dynamo_redis.wire.kv_event import DEVICE
from dynamo_redis.wire.topics import KV_DUMP, KV_EVENTS

NAMESPACE, COMPONENT = "test", "backend"
STREAM = StreamName(NAMESPACE, COMPONENT, KV_EVENTS)
BLOCK_SIZE = 4
WAIT_S = 30.0

_SALT = 0x5DEECE66D
_PREFIXES = 6
_DEPTH = 8


class SimulatedRank:
    """One rank's cache under random prompts that share prefixes; its events go to a `KvPublisher`."""

    def __init__(self, publisher: KvPublisher, rng: random.Random, total_blocks: int = 64) -> None:
        self.publisher = publisher
        self._rng = rng
        self._cache = BlockCache(total_blocks, BLOCK_SIZE, self._publish)

    def chat(self) -> None:
        """Store the blocks of one prompt, and release them; old blocks are evicted."""
        rng = self._rng
        prefix, depth = rng.randrange(_PREFIXES), rng.randrange(1, _DEPTH + 1)
        tokens = array("I", [prefix * 1000 + place for place in range(depth * BLOCK_SIZE)])
        tokens.extend(rng.randrange(1 << 16) for _ in range(rng.randrange(4) * BLOCK_SIZE))
        names = [block ^ _SALT for block in chain(local_hashes(tokens, BLOCK_SIZE))]
        table, cache = BlockTable(), self._cache
        known = cache.match(names, len(names))
        cache.hold(table, names[:known])
        assert cache.reserve(table, len(names) - known)
        cache.store(table, names[known:], tokens[known * BLOCK_SIZE :])
        cache.release(table)

    def truth(self) -> set[int]:
        """Return the sequence hashes of the cached blocks."""
        return {name ^ _SALT for name in self._cache.stored()}

    def _publish(self, event: BlocksStored | BlocksRemoved | AllBlocksCleared) -> None:
        if isinstance(event, BlocksStored):
            self.publisher.stored(event.block_hashes, event.token_ids, event.parent_hash)
        elif isinstance(event, BlocksRemoved):
            self.publisher.removed(event.block_hashes)
        else:
            self.publisher.cleared()


class SimulatedWorker:
    """A worker of one process: its ranks, the publisher of their events, and the endpoint that dumps their
    blocks."""

    def __init__(self, runtime: DistributedRuntime, seed: int, rank_count: int) -> None:
        self.runtime = runtime
        self.instance_id = runtime.instance_id
        events = runtime.settings.events
        epoch = random.Random(f"epoch {seed} {time.monotonic_ns()}").getrandbits(62)
        self.ids = [PublisherId(self.instance_id, epoch, rank) for rank in range(rank_count)]
        durable = events.event_plane == "stream"
        shards = kv_event_streams(NAMESPACE, COMPONENT, events)
        self.senders = [
            EventPublisher(
                runtime.events,
                shards[shard_of(each, len(shards))],
                each,
                events,
                durable=durable,
                only_while_read=durable,
            )
            for each in self.ids
        ]
        self.ranks = [
            SimulatedRank(
                KvPublisher(sender, block_size=BLOCK_SIZE, dp_rank=rank, ring_count=256),
                random.Random(f"{seed} {rank}"),
            )
            for rank, sender in enumerate(self.senders)
        ]
        self.is_answering = True
        """False: the worker does not answer a request for its blocks, as if it hung."""
        self.asked_count = 0
        self.dump_count = 0
        """Count of the batches of its answers."""

    async def start(self) -> None:
        """Register, and begin to publish."""
        dump = KvDump(
            {each: rank.publisher for each, rank in zip(self.ids, self.ranks, strict=True)},
            event_plane=self.runtime.settings.events.event_plane,
            shards_count=shards_count(self.runtime.settings.events),
            on_asked=self._wake,
        )

        async def answer(request: Any) -> AsyncIterator[Any]:
            self.asked_count += 1
            while not self.is_answering:
                await asyncio.sleep(0.01)
            async for item in dump.generate(request):
                self.dump_count += "batch" in item
                yield item

        await self.runtime.endpoint(f"{NAMESPACE}.{COMPONENT}.{KV_DUMP}").start_serving(answer)
        for sender in self.senders:
            await sender.start()

    def _wake(self) -> None:
        for sender in self.senders:
            sender.wake()

    def chat(self, count: int = 1) -> None:
        """Store `count` prompts in each rank."""
        for rank in self.ranks:
            for _ in range(count):
                rank.chat()

    def truth(self) -> dict[Worker, set[int]]:
        """Return the blocks of its ranks."""
        return {
            Worker(self.instance_id, number): held
            for number, rank in enumerate(self.ranks)
            if (held := rank.truth())
        }

    async def aclose(self) -> None:
        """Unregister and close."""
        for sender in self.senders:
            await sender.aclose()
        await self.runtime.aclose()


class Deployment:
    """Workers and routers on one Redis; all that it opened end with it."""

    def __init__(self, url: str, prefix: str, **settings: Any) -> None:
        self.workers: list[SimulatedWorker] = []
        self.indexers: list[Indexer] = []
        self._url = url
        self._settings = {"prefix": prefix, "drain_s": 0.2, "lease_ttl_s": 2.0, "auth": "off", **settings}
        self._runtimes: dict[Indexer, DistributedRuntime] = {}
        self._started_count = 0

    async def runtime(
        self, *, url: str | None = None, instance_id: int | None = None, **others: Any
    ) -> DistributedRuntime:
        """Return the runtime of one more process."""
        settings = Settings.load(**{"redis_url": url or self._url, **self._settings, **others})
        if instance_id is None:
            runtime = DistributedRuntime(settings=settings)
        else:
            registry = RedisRegistry(settings.store, instance_id=LeaseId(instance_id))
            _, objects = open_store(settings.store)
            runtime = DistributedRuntime(
                settings=settings,
                registry=registry,
                objects=objects,
                locks=open_locks(settings.store),
                events=open_events(settings.store, settings.events),
            )
        await runtime.start()
        return runtime

    async def worker(
        self,
        *,
        url: str | None = None,
        instance_id: int | None = None,
        rank_count: int = 1,
        **settings: Any,
    ) -> SimulatedWorker:
        """Start one more worker."""
        self._started_count += 1
        runtime = await self.runtime(url=url, instance_id=instance_id, **settings)
        worker = SimulatedWorker(runtime, self._started_count, rank_count)
        self.workers.append(worker)
        await worker.start()
        return worker

    async def router(self, *, url: str | None = None, **settings: Any) -> Indexer:
        """Start one more router."""
        self._started_count += 1
        runtime = await self.runtime(url=url)
        indexer = Indexer(
            runtime,
            NAMESPACE,
            COMPONENT,
            RouterSettings.load(**settings),
            router_id=f"router-{self._started_count}",
        )
        self.indexers.append(indexer)
        self._runtimes[indexer] = runtime
        await indexer.start()
        return indexer

    async def end_router(self, indexer: Indexer) -> None:
        """End a router."""
        self.indexers.remove(indexer)
        await indexer.aclose()
        await self._runtimes.pop(indexer).aclose()

    async def end_worker(self, worker: SimulatedWorker) -> None:
        """End a worker."""
        self.workers.remove(worker)
        await worker.aclose()

    async def restart_worker(self, worker: SimulatedWorker) -> SimulatedWorker:
        """End a worker, and start it again under its id, with an empty cache."""
        await self.end_worker(worker)
        return await self.worker(instance_id=worker.instance_id, rank_count=len(worker.ranks))

    def chat(self, count: int = 1) -> None:
        """Store `count` prompts in each worker's ranks."""
        for worker in self.workers:
            worker.chat(count)

    def truth(self) -> dict[Worker, set[int]]:
        """Return the blocks of all caches."""
        return {rank: held for worker in self.workers for rank, held in worker.truth().items()}

    async def wait_until_equal(self, *indexers: Indexer) -> None:
        """Wait until every index equals the truth; fail with the difference."""
        deadline = time.monotonic() + WAIT_S
        for indexer in indexers or tuple(self.indexers):
            while (difference := differences(indexer, self.truth())) and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            assert not difference, f"{indexer.router_id}: {difference}; {indexer.state()}"

    async def aclose(self) -> None:
        """End all."""
        for indexer in tuple(self.indexers):
            await self.end_router(indexer)
        for worker in tuple(self.workers):
            await self.end_worker(worker)


def indexed_blocks(indexer: Indexer) -> dict[Worker, set[int]]:
    """Return the blocks that a router believes in."""
    index = indexer.index
    return {worker: blocks for worker in index.workers() if (blocks := index.blocks_of(worker)[DEVICE])}


def differences(indexer: Indexer, truth: dict[Worker, set[int]]) -> list[str]:
    """Return the errors of a router: for each worker, the counts of missing and wrong blocks."""
    believed = indexed_blocks(indexer)
    return [
        f"{worker}: {len(truth.get(worker, set()) - believed.get(worker, set()))} missing,"
        f" {len(believed.get(worker, set()) - truth.get(worker, set()))} wrong"
        for worker in truth.keys() | believed.keys()
        if truth.get(worker, set()) != believed.get(worker, set())
    ]


def shorten_pauses(patch: pytest.MonkeyPatch, *, verify_s: float = 0.1) -> None:
    """Shorten the pauses that tests would wait for; the order of events stays the same."""
    patch.setattr(followers, "BLOCK_S", 0.1)
    patch.setattr(readers, "CHECK_S", 0.1)
    patch.setattr(recovery, "ASK_ALL_PAUSE_S", 0.1)
    patch.setattr(members, "TICK_S", 0.2)
    patch.setattr(indexer_module, "VERIFY_S", verify_s)


@asynccontextmanager
async def deployment(
    url: str, prefix: str, *, verify_s: float = 0.1, **settings: Any
) -> AsyncIterator[Deployment]:
    """Yield a deployment without workers and routers yet. Its routers ask all workers `verify_s` after their
    start."""
    made = Deployment(url, prefix, **settings)
    with pytest.MonkeyPatch.context() as patch:
        shorten_pauses(patch, verify_s=verify_s)
        try:
            yield made
        finally:
            await made.aclose()


async def wait_until(condition: Any, what: str) -> None:
    """Poll until the condition holds; fail with its name."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        await asyncio.sleep(0.005)


async def flush(workers: Iterable[SimulatedWorker]) -> None:
    """Wait until everything published has been sent."""
    for worker in workers:
        for sender in worker.senders:
            assert await sender.flush(WAIT_S)
