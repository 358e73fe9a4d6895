"""The values of a worker's load that are sent, and their pace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import anyio
import pytest

from dynamo_redis.events import load_publisher
from dynamo_redis.events.load_publisher import LoadPublisher
from dynamo_redis.store.event_base import StreamName
from dynamo_redis.store.streams.memory import MemoryEventStreams
from dynamo_redis.wire.event import EventBatch
from dynamo_redis.wire.topics import KV_METRICS

WAIT_S = 20.0
TOPIC = StreamName("dynamo", "backend", KV_METRICS)


class Counting(MemoryEventStreams):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[int] = []

    async def publish(self, topic: StreamName, message: bytes) -> int:
        self.told += [event["n"] for event in EventBatch.from_bytes(message).events]
        return await super().publish(topic, message)


@pytest.fixture
def streams() -> Counting:
    return Counting()


@pytest.fixture
async def publisher(streams: Counting, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LoadPublisher]:
    monkeypatch.setattr(load_publisher, "INTERVAL_S", 0.001)
    monkeypatch.setattr(load_publisher, "UNHEARD_S", 1000.0)
    made = LoadPublisher(streams, "dynamo", "backend", 7)
    made.start()
    yield made
    await made.aclose()


async def tell(streams: Counting, publisher: LoadPublisher, number: int) -> None:
    publisher.set_value(KV_METRICS, 0, {"n": number})
    with anyio.fail_after(WAIT_S):
        while streams.told[-1:] != [number]:
            await asyncio.sleep(0.001)


async def test_load_without_a_listener_is_sent_rarely(streams: Counting, publisher: LoadPublisher) -> None:
    await tell(streams, publisher, 0)
    for number in range(1, 20):
        publisher.set_value(KV_METRICS, 0, {"n": number})
        await asyncio.sleep(0.005)
    assert streams.told == [0]


async def test_each_change_of_load_reaches_a_listener(streams: Counting, publisher: LoadPublisher) -> None:
    subscription = await streams.subscribe(TOPIC)
    for number in range(5):
        await tell(streams, publisher, number)
    await subscription.aclose()
