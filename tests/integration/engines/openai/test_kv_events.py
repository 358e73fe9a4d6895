"""The KV events of a worker over real Redis: equal to the true contents of its engine's caches."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any, Protocol

import pytest

from dynamo_redis.engines.mock.engine import MockEngine
from dynamo_redis.errors import InvalidRequest, NoInstances
from dynamo_redis.events import load_publisher
from dynamo_redis.names import INSTANCES
from dynamo_redis.runtime import DistributedRuntime
from dynamo_redis.store.event_base import BEGINNING, StreamName
from dynamo_redis.store.server import EmbeddedServer
from dynamo_redis.wire.event import EventBatch
from dynamo_redis.wire.kv_event import CLEARED, DEVICE, STORED, read_kv_events

ENDPOINT = "dynamo.backend.generate"
KV_EVENTS = StreamName("dynamo", "backend", "kv_events")
SMALL = {"block_size": 4, "total_kv_blocks": 24, "max_num_seqs": 4, "max_num_batched_tokens": 64}
WITHIN_S = 20


class MockWorker(Protocol):
    runtime: DistributedRuntime
    engine: MockEngine

    async def stop(self) -> None: ...


class Deployment(Protocol):
    """The `deployment` fixture."""

    def runtime(self) -> AbstractAsyncContextManager[DistributedRuntime]: ...
    def worker(self, **engine: Any) -> AbstractAsyncContextManager[MockWorker]: ...


Deploy = Callable[..., Deployment]


class Belief:
    """The blocks of each rank as a reader of batches sees them, and the batches that it has applied."""

    def __init__(self) -> None:
        self.held: dict[int, set[int]] = {}
        self.next_sequences: dict[tuple[int, int], int] = {}  # by epoch and rank

    def apply(self, content: bytes, *, expect_next: bool = True) -> None:
        batch = EventBatch.from_bytes(content)
        _, epoch, dp_rank = batch.publisher
        if expect_next:
            assert batch.first_sequence == self.next_sequences.get((epoch, dp_rank), 0)
            self.next_sequences[epoch, dp_rank] = batch.next_sequence
        held = self.held.setdefault(dp_rank, set())
        for event in read_kv_events(batch.events):
            assert event.tier == DEVICE
            if event.kind == CLEARED:
                held.clear()
            elif event.kind == STORED:
                held.update(event.hashes)
            else:
                held.difference_update(event.hashes)

    def have(self) -> list[list[int]]:
        return [[*publisher, sequence] for publisher, sequence in self.next_sequences.items()]


def _truth(engine: MockEngine) -> dict[int, set[int]]:
    return {rank.dp_rank: rank.cache.stored() for rank in engine.ranks}


def _request(prompt: list[int], max_tokens: int = 3, **more: Any) -> dict[str, Any]:
    stop = {"max_tokens": max_tokens, "ignore_eos": True}
    return {"model": "demo", "token_ids": prompt, "stop_conditions": stop, "sampling_options": {}, **more}


async def _ask(runtime: DistributedRuntime, endpoint: str, request: Any = None) -> list[Any]:
    async with await runtime.endpoint(f"dynamo.backend.{endpoint}").client() as client:
        return [item async for item in await client.round_robin(request, annotated=False)]


async def _work(runtime: DistributedRuntime, count: int = 12, **more: Any) -> None:
    """Return requests that share prefixes and need more blocks than the small cache has."""
    async with await runtime.endpoint(ENDPOINT).client() as client:

        async def one(number: int) -> None:
            prompt = [*range(8), number % 3, *range(number, number + 13)]
            async for _ in await client.round_robin(_request(prompt, **more), annotated=False):
                pass

        await asyncio.gather(*(one(number) for number in range(count)))


@asynccontextmanager
async def _reading(runtime: DistributedRuntime) -> AsyncIterator[Callable[[Belief], Any]]:
    tail = runtime.events.tail(KV_EVENTS, after=BEGINNING)

    async def read_into(belief: Belief) -> None:
        for entry in await tail.read(count=100, block_s=0.2):
            belief.apply(entry.content)

    try:
        yield read_into
    finally:
        await tail.aclose()


async def test_stream_has_exactly_the_blocks_of_each_rank(deployment: Deployment) -> None:
    belief = Belief()
    async with (
        deployment.worker(**SMALL, data_parallel_size=2) as worker,
        deployment.runtime() as runtime,
        _reading(runtime) as read_into,
    ):
        await _work(runtime, dp_rank=0)
        await _work(runtime, 3, dp_rank=1)
        truth = _truth(worker.engine)
        assert truth[0] != truth[1]
        assert all(truth.values())
        async with asyncio.timeout(WITHIN_S):
            while belief.held != truth:
                await read_into(belief)
        (answer,) = await _ask(runtime, "clear_kv_blocks")
        assert answer == {"status": "success", "cleared": sum(map(len, truth.values()))}
        async with asyncio.timeout(WITHIN_S):
            while any(belief.held.values()):
                await read_into(belief)
        assert len(belief.next_sequences) == 2
        assert len({epoch for epoch, _ in belief.next_sequences}) == 1


async def test_reader_gets_missed_events_or_the_whole_state(deployment: Deployment) -> None:
    async def ask(belief: Belief) -> list[str]:
        kinds: list[str] = []
        for item in await _ask(runtime, "kv_dump", {"have": belief.have()}):
            if "batch" in item:
                belief.apply(item["batch"], expect_next=kinds[-1] == "range")
                continue
            kinds.append(item["kind"])
            if item["kind"] == "dump":
                belief.held[item["dp_rank"]] = set()
                belief.next_sequences[item["epoch"], item["dp_rank"]] = item["next_sequence"]
        return kinds

    async with (
        deployment.worker(**SMALL, data_parallel_size=2) as worker,
        deployment.runtime() as runtime,
    ):
        belief = Belief()
        assert await ask(belief) == ["dump", "dump"]
        assert belief.held == {0: set(), 1: set()}
        for more, kinds in (({}, ["range", "range"]), ({"dp_rank": 0}, ["range", "range"])):
            await _work(runtime, **more)
            assert await ask(belief) == kinds
            assert belief.held == _truth(worker.engine)
        newcomer = Belief()
        assert await ask(newcomer) == ["dump", "dump"]
        assert newcomer.held == belief.held
        assert newcomer.next_sequences == belief.next_sequences
        with pytest.raises(InvalidRequest, match="next_sequence"):
            await _ask(runtime, "kv_dump", {"have": [[1, 2]]})


async def test_answer_has_the_cached_tokens_of_its_rank(deployment: Deployment) -> None:
    prompt = list(range(40))
    async with deployment.worker(data_parallel_size=2), deployment.runtime() as runtime:

        async def cached(**more: Any) -> int:
            items = await _ask(runtime, "generate", _request(prompt, **more))
            return int(items[0]["cached_tokens"])

        assert [await cached(dp_rank=rank) for rank in (0, 0, 1, 1)] == [0, 32, 0, 32]
        assert await cached() == 32
        for wrong in (2, -1, "0", True):
            with pytest.raises(InvalidRequest, match="dp_rank"):
                await cached(dp_rank=wrong)


async def test_request_without_a_rank_goes_to_the_least_loaded(deployment: Deployment) -> None:
    async with (
        deployment.worker(data_parallel_size=3, speedup_ratio=1, decode_step_s=0.02) as worker,
        deployment.runtime() as runtime,
        await runtime.endpoint(ENDPOINT).client() as client,
    ):
        calls = [
            await client.round_robin(_request([number], max_tokens=1000), annotated=False)
            for number in range(6)
        ]
        for call in calls:
            await anext(aiter(call))
        assert [rank.request_count for rank in worker.engine.ranks] == [2, 2, 2]
        for call in calls:
            await call.aclose()


async def test_load_is_repeated_for_late_listeners(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_publisher, "REPEAT_S", 0.2)
    event: dict[str, Any] = {}
    async with deployment.worker(**SMALL) as worker, deployment.runtime() as runtime:
        await _work(runtime, 5)
        for topic in ("kv_metrics", "forward_pass_metrics"):
            async with aclosing(
                await runtime.events.subscribe(StreamName("dynamo", "backend", topic))
            ) as listener:
                async with asyncio.timeout(WITHIN_S):
                    while True:  # the first may be of the time in which it worked
                        message = await listener.next(WITHIN_S)
                        assert message is not None
                        batch = EventBatch.from_bytes(message)
                        assert (batch.topic, batch.publisher.instance_id) == (
                            topic,
                            worker.runtime.instance_id,
                        )
                        (event,) = batch.events
                        if "worker_stats" not in event or not event["worker_stats"]["request_active_slots"]:
                            break
            if topic == "kv_metrics":
                assert event["worker_stats"] == {
                    "data_parallel_rank": 0,
                    "request_active_slots": 0,
                    "request_total_slots": SMALL["max_num_seqs"],
                    "num_requests_waiting": 0,
                }
                assert event["kv_stats"]["kv_active_blocks"] == 0
                assert event["kv_stats"]["kv_total_blocks"] == SMALL["total_kv_blocks"]
                assert 0 < event["kv_stats"]["gpu_prefix_cache_hit_rate"] < 1
            else:
                assert event["counter_id"] > 0
                assert event["queued_requests"] == {"num_prefill_requests": 0, "sum_prefill_tokens": 0}
        (load,) = await _ask(runtime, "load_metrics")
        assert load["kv_stats"]["kv_total_blocks"] == SMALL["total_kv_blocks"]
        assert load["forward_pass"] == event


async def test_busy_ranks_show_in_their_load(deployment: Deployment) -> None:
    async with (
        deployment.worker(**SMALL, speedup_ratio=1, decode_step_s=0.02) as worker,
        deployment.runtime() as runtime,
        await runtime.endpoint(ENDPOINT).client() as client,
        aclosing(await runtime.events.subscribe(StreamName("dynamo", "backend", "kv_metrics"))) as listener,
    ):
        call = await client.round_robin(_request(list(range(20)), max_tokens=10_000), annotated=False)
        async with asyncio.timeout(WITHIN_S):
            while True:
                message = await listener.next(WITHIN_S)
                assert message is not None
                (event,) = EventBatch.from_bytes(message).events
                if event["worker_stats"]["request_active_slots"] == 1:
                    break
        assert event["kv_stats"]["kv_active_blocks"] >= 5
        assert event["kv_stats"]["gpu_cache_usage_perc"] >= 5 / 24
        assert worker.engine.running_count == 1
        await call.aclose()


async def test_restarted_worker_is_another_publisher(deployment: Deployment) -> None:
    epochs: set[int] = set()
    for _ in range(2):
        async with deployment.worker() as worker, deployment.runtime() as runtime:
            (header,) = await _ask(runtime, "kv_dump", {"have": []})
            epochs.add(header["epoch"])
            await worker.stop()
    assert len(epochs) == 2


async def test_worker_that_registers_again_stays_the_publisher(
    deploy: Deploy, own_redis_server: EmbeddedServer
) -> None:
    """Redis loses its data; the worker, its cache and its sequence numbers stay."""
    deployment = deploy(own_redis_server.url, "wiped")
    async with deployment.worker(**SMALL) as worker, deployment.runtime() as runtime:
        await _work(runtime)
        before = await _ask(runtime, "kv_dump", {"have": []})
        belief = Belief()
        async with _reading(runtime) as read_into, asyncio.timeout(WITHIN_S):
            while belief.have() != [[before[0][name] for name in ("epoch", "dp_rank", "next_sequence")]]:
                await read_into(belief)
        instance_id = worker.runtime.instance_id
        await own_redis_server.kill()
        own_redis_server.erase()
        await own_redis_server.start()
        key = f"{INSTANCES}dynamo/backend/generate/{instance_id:x}"
        async with asyncio.timeout(WITHIN_S), runtime.registry.watch(key) as watch:
            while await runtime.registry.get(key) is None:
                await anext(watch)
        after = await _ask(runtime, "kv_dump", {"have": []})
        assert after[0] == before[0]
        await _work(runtime, 1)

        async with _reading(runtime) as read_into, asyncio.timeout(WITHIN_S):
            while belief.held != _truth(worker.engine):
                await read_into(belief)


async def test_without_an_event_plane_no_event_is_sent(
    deploy: Deploy, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    deployment = deploy(dynamo_redis_url, dynamo_redis_prefix, event_plane="none")
    async with (
        deployment.worker() as worker,
        deployment.runtime() as runtime,
        aclosing(await runtime.events.subscribe(StreamName("dynamo", "backend", "kv_metrics"))) as listener,
    ):
        await _work(runtime, 3)
        assert worker.engine.cache.stored()
        assert await listener.next(0.3) is None
        assert await runtime.events.info(KV_EVENTS) is None
        with pytest.raises(NoInstances):
            await _ask(runtime, "kv_dump", {"have": []})
        assert (await _ask(runtime, "clear_kv_blocks"))[0]["cleared"] > 0


async def test_pub_sub_keeps_no_event_in_redis(
    deploy: Deploy, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    deployment = deploy(dynamo_redis_url, dynamo_redis_prefix, event_plane="pubsub")
    async with (
        deployment.runtime() as runtime,
        aclosing(await runtime.events.subscribe(KV_EVENTS)) as listener,
        deployment.worker(**SMALL) as worker,
    ):
        await _work(runtime)
        belief = Belief()
        async with asyncio.timeout(WITHIN_S):
            while belief.held.get(0) != worker.engine.cache.stored():
                message = await listener.next(WITHIN_S)
                assert message is not None
                belief.apply(message)
        assert await runtime.events.info(KV_EVENTS) is None


async def test_true_cache_can_be_read_when_allowed(deployment: Deployment) -> None:
    async with deployment.worker(serve_cache=True, data_parallel_size=2) as worker:
        async with deployment.runtime() as runtime:
            for dp_rank in (0, 1):
                await _work(runtime, 3 * dp_rank + 1, dp_rank=dp_rank)
            found: dict[int, set[int]] = {}
            dp_rank = -1
            for item in await _ask(runtime, "kv_cache"):
                dp_rank = item.get("dp_rank", dp_rank)
                found.setdefault(dp_rank, set()).update(array("Q", item.get("hashes", b"")))
        assert found == _truth(worker.engine)
    async with deployment.worker(), deployment.runtime() as runtime:
        with pytest.raises(NoInstances):
            await _ask(runtime, "kv_cache")
