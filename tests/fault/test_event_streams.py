"""Publishers and readers of event streams with lost answers, broken connections and lost data."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import anyio
import pytest

from dynamo_redis.config import EventSettings
from dynamo_redis.errors import StoreUnavailable, StreamLost, StreamTrimmed
from dynamo_redis.events.publisher import EventPublisher
from dynamo_redis.store.event_base import BEGINNING, EventGroup, StreamName
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.server import EmbeddedServer
from dynamo_redis.store.streams.redis_streams import RedisEventStreams
from dynamo_redis.wire.event import EventBatch, PublisherId
from faults.proxy import Conditions, Proxy

STREAM = StreamName("dynamo", "backend", "kv_events")
PUBLISHER = PublisherId(1, 2, 0)
NO_ANSWERS = Conditions(swallow_answers=True)
WAIT_S = 30.0


class Reader:
    """Follows a group as a router does: each event once, in order; a missing event is a gap."""

    def __init__(self, group: EventGroup) -> None:
        self.applied: list[Any] = []
        self.next_sequence = 0
        self.duplicate_count = 0
        self.missed: list[int] = []
        self.begun_count = 0
        self._group = group

    async def has_applied(self, sequence: int) -> None:
        """Wait until that event has been applied."""
        await until(lambda: self.next_sequence > sequence)

    async def run(self) -> None:
        while True:
            try:
                entries = await self._group.read(count=64, block_s=0.2)
            except StoreUnavailable:
                continue
            except (StreamLost, StreamTrimmed):
                with suppress(StoreUnavailable):
                    await self._group.create()
                    await self._group.seek(BEGINNING)
                    self.begun_count += 1
                continue
            for entry in entries:
                self._apply(EventBatch.from_bytes(entry.content))
            with suppress(StoreUnavailable):
                await self._group.acknowledge([entry.entry_id for entry in entries])

    def _apply(self, batch: EventBatch) -> None:
        self.missed += range(self.next_sequence, batch.first_sequence)
        self.next_sequence = max(self.next_sequence, batch.first_sequence)
        new = batch.events[self.next_sequence - batch.first_sequence :]
        self.duplicate_count += len(batch.events) - len(new)
        self.applied += new
        self.next_sequence = max(self.next_sequence, batch.next_sequence)


@pytest.fixture
async def proxy(own_redis_server: EmbeddedServer) -> AsyncIterator[Proxy]:
    async with Proxy(own_redis_server.url) as proxy:
        yield proxy


@pytest.fixture
async def publisher(proxy: Proxy) -> AsyncIterator[EventPublisher]:
    """A publisher behind the proxy, with a short queue."""
    settings = EventSettings(event_queue_count=400, event_batch_count=10, event_linger_s=0.0)
    streams = RedisEventStreams(RedisClient(proxy.url, timeout_s=1.0), "dynamo", settings)
    made = EventPublisher(streams, STREAM, PUBLISHER, settings)
    await made.start()
    yield made
    await made.aclose()
    await streams.aclose()


@pytest.fixture
async def reader(own_redis_server: EmbeddedServer) -> AsyncIterator[Reader]:
    """A reader with a connection of its own, which reads until the test ends."""
    client = RedisClient(own_redis_server.url, timeout_s=1.0)
    streams = RedisEventStreams(client, "dynamo", EventSettings())
    group = streams.group(STREAM, "router")
    await group.create()
    made = Reader(group)
    task = asyncio.create_task(made.run())
    yield made
    task.cancel()
    await asyncio.wait([task])
    await group.aclose()
    await streams.aclose()


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(WAIT_S):
        while not condition():
            await anyio.sleep(0.005)


async def test_a_reader_is_exact_whatever_is_lost_on_the_way(
    proxy: Proxy, publisher: EventPublisher, reader: Reader
) -> None:
    first = 0
    # The lost answer may be that of another exchange than an append: repeat until it was an append's.
    while first < 1500 or not reader.duplicate_count:
        assert first < 50_000
        for number in range(first, first + 200):
            publisher.publish(number)
        await reader.has_applied(first + 199)
        assert await publisher.flush(WAIT_S)  # its connection is open
        proxy.conditions = NO_ANSWERS  # entries sent now are stored, and sent again
        for number in range(first + 200, first + 500):
            publisher.publish(number)
        await until(lambda: proxy.has_swallowed)
        proxy.heal()
        first += 500
        await reader.has_applied(first - 1)
    end = first + 1500
    proxy.conditions = NO_ANSWERS
    for number in range(first, end):  # more than the queue holds
        publisher.publish(number)
    proxy.heal()
    await until(lambda: reader.next_sequence == end)
    assert publisher.left_out_count == len(reader.missed) > 0
    missed = set(reader.missed)
    assert reader.applied == [number for number in range(end) if number not in missed]


async def test_a_reader_whose_connection_breaks_misses_nothing(
    own_redis_server: EmbeddedServer, proxy: Proxy
) -> None:
    direct = RedisEventStreams(RedisClient(own_redis_server.url, timeout_s=3.0), "dynamo", EventSettings())
    through = RedisEventStreams(RedisClient(proxy.url, timeout_s=1.0), "dynamo", EventSettings())
    settings = EventSettings(event_linger_s=0.0, event_batch_count=10)
    publisher = EventPublisher(direct, STREAM, PUBLISHER, settings)
    group = through.group(STREAM, "router")
    await group.create()
    reader = Reader(group)
    task = asyncio.create_task(reader.run())
    await publisher.start()
    for number in range(1000):
        publisher.publish(number)
        if number % 250 == 50:
            proxy.conditions = NO_ANSWERS  # entries are handed out and never arrive
        if number % 250 == 150:
            proxy.heal()
        if number % 10 == 0:
            await anyio.sleep(0.001)
    proxy.heal()
    await until(lambda: len(reader.applied) == 1000)
    assert reader.applied == list(range(1000))
    assert not reader.missed
    assert not reader.begun_count
    task.cancel()
    await asyncio.wait([task])
    await publisher.aclose()
    await group.aclose()
    for streams in (direct, through):
        await streams.aclose()


async def test_a_server_that_forgets_everything_ends_nobody(
    own_redis_server: EmbeddedServer, publisher: EventPublisher, reader: Reader
) -> None:
    publisher.publish("before")
    await until(lambda: reader.applied == ["before"])
    admin = RedisClient(own_redis_server.url, timeout_s=3.0)
    await admin.execute("FLUSHALL")
    await admin.aclose()
    await until(lambda: reader.begun_count)
    publisher.publish("after")
    await until(lambda: reader.applied == ["before", "after"])
