"""Our side of suite `events`: the publisher and the group reader of workers and routers."""

from __future__ import annotations

import asyncio

from benchmarks.events.rivals.peers import Peer
from benchmarks.events.workload import BATCH_COUNT, READ_COUNT, STREAM, event_bytes
from dynamo_redis.config import EventSettings, StoreSettings
from dynamo_redis.events.publisher import EventPublisher
from dynamo_redis.store.connect import open_events
from dynamo_redis.store.event_base import EventGroup, StreamName
from dynamo_redis.wire.event import EventBatch, PublisherId

_STREAM = StreamName("bench", "backend", STREAM)
_QUEUE_COUNT = 20_000
_TURN_COUNT = 256
"""Events published in one turn of the loop. The publisher sends between turns, as JetStream's client does
with each event."""
_PAUSE_S = 0.001
_BIN_16_BYTES = 3
"""Bytes that msgpack puts before an event that is only bytes."""


class RedisPeer:
    """One client of the event plane."""

    def __init__(self, url: str) -> None:
        settings = StoreSettings.load(redis_url=url, prefix="bench-events", command_timeout_s=30.0)
        self._streams = open_events(settings, EventSettings.load())
        self._group: EventGroup | None = None

    async def publish(self, count: int, batch_count: int) -> None:
        settings = EventSettings.load(event_batch_count=batch_count)
        publisher = EventPublisher(self._streams, _STREAM, PublisherId(1, 1, 0), settings)
        await publisher.start()
        for number in range(count):
            publisher.publish(event_bytes(number)[_BIN_16_BYTES:])
            if number % _TURN_COUNT == 0:
                await asyncio.sleep(0)
                while publisher.queued_count >= _QUEUE_COUNT:
                    await asyncio.sleep(_PAUSE_S)
        while not await publisher.flush(1.0):
            pass
        if publisher.left_out_count:
            raise RuntimeError(f"{publisher.left_out_count} events were left out")
        await publisher.aclose()

    async def prepare(self) -> None:
        self._group = self._streams.group(_STREAM, "reader")
        await self._group.create()

    async def consume(self, count: int, batch_count: int) -> None:
        assert self._group is not None
        at_once = READ_COUNT * BATCH_COUNT // batch_count if batch_count < BATCH_COUNT else READ_COUNT
        left, next_sequence = count, 0
        while left:
            entries = await self._group.read(count=at_once, block_s=1.0)
            for entry in entries:
                batch = EventBatch.from_bytes(entry.content)
                if batch.first_sequence != next_sequence:
                    raise RuntimeError("events are missing, or came twice")
                next_sequence = batch.next_sequence
                left -= len(batch.events)
            await self._group.acknowledge([entry.entry_id for entry in entries])
        await self._group.read(count=1, block_s=0.0)  # sends the last acknowledgements

    async def purge(self) -> None:
        if self._group is not None:
            await self._group.aclose()
            self._group = None
        await self._streams.delete(_STREAM)

    async def aclose(self) -> None:
        await self._streams.aclose()


async def connect(url: str) -> Peer:
    return RedisPeer(url)
