"""The leader/worker barrier on a real registry."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from dynamo_redis.errors import BarrierError
from dynamo_redis.names import BARRIERS
from dynamo_redis.runtime import DistributedRuntime
from dynamo_redis.runtime.barrier import LeaderBarrier, WorkerBarrier

OpenRuntime = Callable[..., Awaitable[DistributedRuntime]]
DATA = {"master": "10.0.0.1:29500", "ranks": [0, 1, 2]}


async def until_places(runtime: DistributedRuntime, count: int) -> None:
    """Wait until there are `count` keys of barriers, with the leader's."""
    async with asyncio.timeout(30):
        while len((await runtime.registry.get_prefix(BARRIERS)).records) < count:
            await asyncio.sleep(0.01)


async def test_barrier_hands_all_workers_the_leaders_data(open_runtime: OpenRuntime) -> None:
    leader = await open_runtime()
    workers = [await open_runtime() for _ in range(3)]
    barriers = [WorkerBarrier("group", f"worker/{rank}", 10) for rank in range(3)]
    waiting = [
        asyncio.create_task(barrier.sync(runtime.registry))
        for barrier, runtime in zip(barriers[:2], workers[:2], strict=True)
    ]
    leading = asyncio.create_task(LeaderBarrier("group", 3, 10).sync(leader.registry, DATA))
    await until_places(leader, 3)
    assert not any(task.done() for task in (*waiting, leading))
    assert await barriers[2].sync(workers[2].registry) == DATA
    assert await asyncio.gather(*waiting) == [DATA, DATA]
    assert await leading == ["worker/0", "worker/1", "worker/2"]


async def test_missing_worker_aborts_the_barrier(open_runtime: OpenRuntime) -> None:
    leader, worker = await open_runtime(), await open_runtime()
    waiting = asyncio.create_task(WorkerBarrier("group", "a", 10).sync(worker.registry))
    with pytest.raises(BarrierError, match="1 of 2 workers"):
        await LeaderBarrier("group", 2, 2.0).sync(leader.registry, DATA)
    with pytest.raises(BarrierError, match=r"aborted.*1 of 2"):
        await waiting


async def test_worker_that_gives_up_is_not_counted(open_runtime: OpenRuntime) -> None:
    leader, worker = await open_runtime(), await open_runtime()
    leading = asyncio.create_task(LeaderBarrier("group", 2, 3.0).sync(leader.registry, DATA))
    with pytest.raises(BarrierError, match="not complete within"):
        await WorkerBarrier("group", "a", 0.3).sync(worker.registry)
    with pytest.raises(BarrierError, match="0 of 2"):
        await leading


async def test_barrier_ids_are_exclusive(open_runtime: OpenRuntime) -> None:
    leader, one, other = await open_runtime(), await open_runtime(), await open_runtime()
    leading = asyncio.create_task(LeaderBarrier("group", 2, 5).sync(leader.registry, DATA))
    first = asyncio.create_task(WorkerBarrier("group", "same", 5).sync(one.registry))
    await until_places(leader, 2)
    with pytest.raises(BarrierError, match="'same' already"):
        await WorkerBarrier("group", "same", 0.5).sync(other.registry)
    with pytest.raises(BarrierError, match="leader already"):
        await LeaderBarrier("group", 2, 0.5).sync(other.registry, DATA)
    await WorkerBarrier("group", "another", 5).sync(other.registry)
    assert await first == DATA
    assert await leading == ["another", "same"]


async def test_leader_that_dies_ends_its_workers_waits(open_runtime: OpenRuntime) -> None:
    leader, worker = await open_runtime(), await open_runtime()
    leading = asyncio.create_task(LeaderBarrier("group", 2, 30).sync(leader.registry, DATA))
    waiting = asyncio.create_task(WorkerBarrier("group", "a", 10).sync(worker.registry))
    await until_places(leader, 2)
    leading.cancel()
    await asyncio.gather(leading, return_exceptions=True)
    with pytest.raises(BarrierError, match=r"aborted|gone"):
        await waiting


async def test_barrier_id_can_be_used_again(open_runtime: OpenRuntime) -> None:
    leader, worker = await open_runtime(), await open_runtime()
    for round_ in range(2):
        lead, join = LeaderBarrier("group", 1, 5), WorkerBarrier("group", "a", 5)
        workers, data = await asyncio.gather(lead.sync(leader.registry, round_), join.sync(worker.registry))
        assert workers == ["a"]
        assert data == round_
        await join.aclose()
        await lead.aclose()


async def test_another_version_ends_the_wait_with_the_reason(open_runtime: OpenRuntime) -> None:
    runtime = await open_runtime()
    await runtime.registry.put(f"{BARRIERS}group/data", b'{"version": 2, "round": "0a"}')
    with pytest.raises(BarrierError, match=r"has schema version 2, this release reads 1: upgrade .* of one"):
        await WorkerBarrier("group", "a", 30).sync(runtime.registry)
    await runtime.registry.delete(f"{BARRIERS}group/data")
    await runtime.registry.put(f"{BARRIERS}group/workers/a", b'{"version": 2, "round": "0a"}')
    with pytest.raises(BarrierError, match=r"has schema version 2"):
        await LeaderBarrier("group", 1, 30).sync(runtime.registry, DATA)
