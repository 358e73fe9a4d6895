"""The load of its engine that a worker publishes."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from dynamo_redis.engines.base import EngineCapacity, EngineLoad
from dynamo_redis.engines.load_reports import report_load
from dynamo_redis.events.load_publisher import LoadPublisher
from dynamo_redis.store.streams.memory import MemoryEventStreams
from dynamo_redis.wire.topics import KV_METRICS


class SayingEngine:
    """An engine with the load `said`."""

    capacity = EngineCapacity(total_kv_blocks=10, kv_block_size=16, max_num_seqs=8, max_num_batched_tokens=64)

    def __init__(self) -> None:
        self.said = [EngineLoad(0, 1, 0, 5, 10), EngineLoad(1, 0, 0, 0, 10)]

    def loads(self) -> list[EngineLoad]:
        return self.said


async def until_told(publisher: LoadPublisher, active_blocks: list[int | None]) -> None:
    def told() -> list[int | None]:
        return [event["kv_stats"].get("kv_active_blocks") for event in publisher.values(KV_METRICS)]

    async with asyncio.timeout(30):
        while told() != active_blocks:
            await asyncio.sleep(0.01)


async def test_load_of_a_rank_is_forgotten_with_its_engine() -> None:
    engine = SayingEngine()
    publisher = LoadPublisher(MemoryEventStreams(), "dynamo", "backend", 7)
    reporting = asyncio.create_task(report_load(cast("Any", engine), publisher))
    try:
        await until_told(publisher, [5, 0])
        engine.said = [EngineLoad(0, 1, 0, None, 10)]
        await until_told(publisher, [None])
    finally:
        reporting.cancel()
        await asyncio.wait([reporting])
