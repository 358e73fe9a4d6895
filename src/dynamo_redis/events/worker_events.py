"""A worker's side of KV events: a publisher for each rank, and the endpoint `kv_dump`."""

from __future__ import annotations

import asyncio
import secrets
from typing import Final, Self

from dynamo_redis.config import EventSettings
from dynamo_redis.events.kv_dump import KvDump
from dynamo_redis.events.kv_publisher import KvPublisher
from dynamo_redis.events.metrics import publisher_families
from dynamo_redis.events.publisher import EventPublisher
from dynamo_redis.events.shards import kv_event_streams, shard_of
from dynamo_redis.names import EndpointName
from dynamo_redis.runtime.runtime import DistributedRuntime
from dynamo_redis.runtime.serving import ServedEndpoint
from dynamo_redis.wire.event import PublisherId
from dynamo_redis.wire.topics import KV_DUMP

TRIPS_PER_S: Final = 5000.0
"""Round trips a second of all publishers together, as far as one process can know: each takes its share."""
LEAST_TRIPS_PER_S: Final = 5.0
"""The least share, also beyond a thousand publishers: an event waits a fifth of a second at most."""


class WorkerEvents:
    """The KV events of this process's instance, in one component.

    Each data-parallel rank has a publisher. All have one epoch, drawn here, and keep it when the instance is
    registered again. `kv_dump` is served beside the component's other endpoints from `start` on; so call
    `start` before the instance is registered. It owns the publishers' tasks and the endpoint.

    Events go to the stream while it has readers. A router that comes makes its group first and then asks
    `kv_dump`, which wakes the publishers.
    """

    def __init__(
        self,
        runtime: DistributedRuntime,
        namespace: str,
        component: str,
        *,
        block_size: int,
        settings: EventSettings | None = None,
    ) -> None:
        self.epoch = secrets.randbits(63)
        self._runtime = runtime
        self._endpoint = EndpointName(namespace, component, KV_DUMP)
        self._block_size = block_size
        self._settings = settings or runtime.settings.events
        self._ranks: dict[PublisherId, KvPublisher] = {}
        self._publishers: dict[int, EventPublisher] = {}
        self._started: set[int] = set()
        self._starting = asyncio.Lock()
        self._served: ServedEndpoint | None = None
        self._shards = kv_event_streams(namespace, component, self._settings)
        self._end_metrics = runtime.add_metrics(lambda: publisher_families(self._shards[0], self._publishers))

    def rank(self, dp_rank: int) -> KvPublisher:
        """Return the publisher of a rank, made at the first call. Reports before `start` wait."""
        publisher_id = PublisherId(self._runtime.instance_id, self.epoch, dp_rank)
        known = self._ranks.get(publisher_id)
        if known is not None:
            return known
        publisher = EventPublisher(
            self._runtime.events,
            self._shards[shard_of(publisher_id, len(self._shards))],
            publisher_id,
            self._settings,
            durable=self._settings.event_plane == "stream",
            only_while_read=self._settings.event_plane == "stream",
            trips_per_s=self._trips_per_s,
        )
        rank = KvPublisher(publisher, block_size=self._block_size, dp_rank=dp_rank)
        self._publishers[dp_rank] = publisher
        self._ranks[publisher_id] = rank
        return rank

    def _trips_per_s(self) -> float:
        """Return a rank's share of the round trips of all publishers."""
        process_count = max(1, self._runtime.registry.process_count)  # 0 after the registry was lost
        return max(TRIPS_PER_S / process_count, LEAST_TRIPS_PER_S)

    async def start(self) -> Self:
        """Begin to send the events of the ranks made so far, and serve `kv_dump`. Idempotent; call it again
        for ranks that were made later. Raises StoreError, ConfigError."""

        def wake_publishers() -> None:
            for publisher in self._publishers.values():
                publisher.wake()

        async with self._starting:
            for dp_rank, publisher in self._publishers.items():
                if dp_rank not in self._started:
                    self._started.add(dp_rank)
                    await publisher.start()
            if self._served is None:
                dump = KvDump(
                    self._ranks,
                    event_plane=self._settings.event_plane,
                    shards_count=len(self._shards),
                    on_asked=wake_publishers,
                )
                # A router has no use for the rest of an answer when the worker is about to leave.
                self._served = await self._runtime.endpoint(str(self._endpoint)).start_serving(
                    dump.generate, graceful_shutdown=False
                )
        return self

    async def aclose(self) -> None:
        """Close the endpoint, send the events that wait (for a second at most), and end. Idempotent."""
        self._end_metrics()
        if self._served is not None:
            await self._served.unregister()
        await asyncio.gather(*(publisher.aclose() for publisher in self._publishers.values()))
