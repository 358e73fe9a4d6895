"""KV events of a component that are spread over several streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from dynamo_redis.events.shards import kv_event_streams
from dynamo_redis.store.event_base import BEGINNING, StreamInfo
from tests.kv_deployment import COMPONENT, NAMESPACE, Deployment, deployment, flush, wait_until

SHARDS_COUNT = 3


@pytest.fixture
async def deployed(dynamo_redis_url: str, dynamo_redis_prefix: str) -> AsyncIterator[Deployment]:
    """Two workers of four ranks each, which have sent events."""
    async with deployment(dynamo_redis_url, dynamo_redis_prefix, event_shards_count=SHARDS_COUNT) as made:
        for _ in range(2):
            await made.worker(rank_count=4)
        yield made


async def shard_infos(deployed: Deployment) -> list[StreamInfo]:
    runtime = deployed.workers[0].runtime
    streams = kv_event_streams(NAMESPACE, COMPONENT, runtime.settings.events)
    infos = [await runtime.events.info(stream) for stream in streams]
    return [info for info in infos if info is not None]


async def test_a_router_reads_the_events_of_all_shards(deployed: Deployment) -> None:
    router = await deployed.router()
    deployed.chat(30)
    await deployed.wait_until_equal()
    infos = await shard_infos(deployed)
    assert len(infos) == SHARDS_COUNT
    assert sum(info.event_count > 0 for info in infos) > 1, "eight ranks use several shards"
    assert [group.name for info in infos for group in info.groups] == [router.router_id] * SHARDS_COUNT
    await wait_until(lambda: router.state().lag_count == 0, "the lag of all shards is known")


async def test_a_snapshot_has_a_position_for_each_shard(deployed: Deployment) -> None:
    router = await deployed.router()
    deployed.chat(30)
    await deployed.wait_until_equal()
    async with asyncio.timeout(30):  # entries that are not acknowledged yet are not trimmed
        while any(group.lag_count for info in await shard_infos(deployed) for group in info.groups):
            await asyncio.sleep(0.01)
    stored = await router.save_snapshot()
    infos = await shard_infos(deployed)
    used = [info.event_count > 0 or info.trim_floor != BEGINNING for info in infos]
    assert [position != BEGINNING for position in stored.positions] == used
    assert all(info.entry_count <= 1 for info in infos), "each shard is trimmed"
    deployed.chat(10)
    await deployed.wait_until_equal()
    applied_count = router.state().events_count
    await deployed.end_router(router)
    dumped = [worker.dump_count for worker in deployed.workers]
    restarted = await deployed.router()
    await deployed.wait_until_equal()
    assert [worker.dump_count for worker in deployed.workers] == dumped, "no worker dumped anything"
    assert restarted.state().events_count < applied_count


async def test_a_lost_shard_heals(deployed: Deployment) -> None:
    router = await deployed.router()
    deployed.chat(10)
    await deployed.wait_until_equal()
    used = next(info for info in await shard_infos(deployed) if info.event_count)
    await deployed.workers[0].runtime.events.delete(used.name)
    deployed.chat(10)
    await deployed.wait_until_equal()
    await wait_until(lambda: router.state().cut_off_count == 1, "only that shard begins anew")


async def test_a_worker_of_another_number_of_shards_is_refused(
    deployed: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    router = await deployed.router()
    other = await deployed.worker(event_shards_count=1)
    other.chat(5)
    await flush([other])
    await wait_until(lambda: "set DYN_EVENT_SHARDS alike" in caplog.text, "the log says so")
    assert other.instance_id not in {worker.instance_id for worker in router.index.workers()}
