"""`dynamo_redis.llm`: the events and load of a custom engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest

from dynamo_redis.errors import ConfigError
from dynamo_redis.events.block_hashes import chain, local_hashes
from dynamo_redis.llm import KvEventPublisher, WorkerMetricsPublisher, compute_block_hash_for_seq
from dynamo_redis.names import EndpointName
from dynamo_redis.runtime import DistributedRuntime
from dynamo_redis.store.event_base import BEGINNING, StreamName
from dynamo_redis.wire.event import EventBatch
from dynamo_redis.wire.kv_event import CLEARED, STORED, KvEvent, read_kv_events
from tests.integration.engines.kv_event_server import KvEventServer, block_stored

OpenRuntime = Callable[..., Awaitable[DistributedRuntime]]

BLOCK = 4
KV_EVENTS = StreamName("demo", "llm", "kv_events")
PROMPT = list(range(11))
NAMES = chain(local_hashes(PROMPT, BLOCK))


async def _events(runtime: DistributedRuntime, count: int) -> list[tuple[int, KvEvent]]:
    """Return the first `count` events of the stream, each with its rank."""
    tail = runtime.events.tail(KV_EVENTS, after=BEGINNING)
    found: list[tuple[int, KvEvent]] = []
    async with asyncio.timeout(20):
        while len(found) < count:
            for entry in await tail.read(count=10, block_s=1):
                batch = EventBatch.from_bytes(entry.content)
                for event in batch.events:
                    found += [(batch.publisher.dp_rank, known) for known in read_kv_events([event])]
    await tail.aclose()
    return found


async def test_events_come_from_any_thread_in_order(open_runtime: OpenRuntime) -> None:
    runtime = await open_runtime()
    endpoint = runtime.endpoint("demo.llm.generate")
    publisher = KvEventPublisher(endpoint, runtime.instance_id, kv_block_size=BLOCK)

    def engine_thread() -> None:
        publisher.publish_stored(PROMPT, [4, 4, 3], [1, 2, 3])  # the third block is not full
        publisher.publish_removed([2])
        publisher.publish_cleared()

    async with asyncio.timeout(20):
        while runtime.served(EndpointName("demo", "llm", "kv_dump")) is None:
            await asyncio.sleep(0.005)
    asyncio.get_running_loop().set_debug(True)  # it raises for what is not done on the loop's thread
    await asyncio.to_thread(engine_thread)
    asyncio.get_running_loop().set_debug(False)
    events = await _events(runtime, 3)
    assert [(rank, event.kind, list(event.hashes)) for rank, event in events] == [
        (0, STORED, NAMES),
        (0, 1, NAMES[1:]),
        (0, CLEARED, []),
    ]


async def test_ranks_of_a_process_share_their_endpoints(open_runtime: OpenRuntime) -> None:
    runtime = await open_runtime()
    component = runtime.namespace("demo").component("llm")
    ranks = [KvEventPublisher(component, kv_block_size=BLOCK, dp_rank=rank) for rank in range(2)]
    for rank in ranks:
        rank.publish_stored(PROMPT[:8], [4, 4], [b"a", b"b"])
    ranks[0].shutdown()
    ranks[0].publish_stored(PROMPT[:4], [4], [b"c"])
    caller = await open_runtime()
    async with await caller.endpoint("demo.llm.kv_dump").client() as client:
        await client.wait_for_instances(20)
        items = [item async for item in await client.generate({"have": []}, annotated=False)]
    assert [item.get("dp_rank", "blocks") for item in items] == [0, 1, "blocks"]
    (event,) = read_kv_events(EventBatch.from_bytes(items[2]["batch"]).events)
    assert list(event.hashes) == NAMES
    with pytest.raises(ConfigError, match="kv_block_size=8"):
        KvEventPublisher(component, kv_block_size=8, dp_rank=1)


async def test_blocks_with_more_than_tokens_are_left_out(open_runtime: OpenRuntime) -> None:
    runtime = await open_runtime()
    publisher = KvEventPublisher(runtime.endpoint("demo.llm.generate"), kv_block_size=BLOCK)
    image = {"mm_objects": [{"mm_hash": 1, "offsets": [[4, 8]]}]}
    publisher.publish_stored(PROMPT[:8], [4, 4], [1, 2], is_eagle=True)
    publisher.publish_stored(PROMPT[:8], [4, 4], [1, 2], block_mm_infos=[image, None])
    one = {"token_ids": PROMPT[:8], "num_block_tokens": [4, 4], "block_hashes": [1, 2]}
    publisher.publish_batch(
        [
            {"type": "stored", **one, "block_mm_infos": [None, image]},
            {"type": "removed", "block_hashes": [2, 1]},
        ]
    )
    events = await _events(runtime, 2)
    assert [(event.kind, list(event.hashes)) for _, event in events] == [(STORED, NAMES[:1]), (1, NAMES[:1])]
    with pytest.raises(ValueError, match="'stored' or 'removed'"):
        publisher.publish_batch([{"type": "moved"}])


async def test_salted_blocks_have_names_of_their_own(open_runtime: OpenRuntime) -> None:
    runtime = await open_runtime()
    publisher = KvEventPublisher(runtime.endpoint("demo.llm.generate"), kv_block_size=BLOCK)
    publisher.publish_stored(PROMPT[:4], [4], [1], cache_salt="tenant")
    ((_, event),) = await _events(runtime, 1)
    assert list(event.hashes) == compute_block_hash_for_seq(PROMPT[:4], BLOCK, cache_namespace="tenant")


async def test_wrong_arguments_are_refused_at_once(open_runtime: OpenRuntime) -> None:
    runtime = await open_runtime()
    endpoint = runtime.endpoint("demo.llm.generate")
    with pytest.raises(ConfigError, match="worker_id=1 "):
        KvEventPublisher(endpoint, 1, kv_block_size=BLOCK)
    with pytest.raises(ConfigError, match="kv_block_size=0"):
        KvEventPublisher(endpoint)
    with pytest.raises(RuntimeError, match="create_endpoint"):
        WorkerMetricsPublisher().publish(kv_used_blocks=3)


async def test_publishers_without_an_event_plane_send_no_event(open_runtime: OpenRuntime) -> None:
    runtime = await open_runtime(event_plane="none")
    endpoint = runtime.endpoint("demo.llm.generate")
    publisher = KvEventPublisher(endpoint, kv_block_size=BLOCK)
    publisher.publish_stored(PROMPT[:4], [4], [1])
    publisher.publish_removed([1])
    publisher.shutdown()
    load = WorkerMetricsPublisher()
    await load.create_endpoint(endpoint)
    load.publish(kv_used_blocks=3)
    assert runtime.served(EndpointName("demo", "llm", "kv_dump")) is None
    assert await runtime.events.list() == []


async def test_load_has_the_known_values_only(open_runtime: OpenRuntime) -> None:
    runtime = await open_runtime()
    load = WorkerMetricsPublisher()
    await load.create_endpoint(runtime.endpoint("demo.llm.generate"))
    async with aclosing(await runtime.events.subscribe(StreamName("demo", "llm", "kv_metrics"))) as listener:
        load.publish(1, active_decode_blocks=5, num_requests_waiting=2)
        message = await listener.next(20)
    assert message is not None
    batch = EventBatch.from_bytes(message)
    assert batch.publisher.dp_rank == 1
    event: dict[str, Any] = {
        "worker_stats": {"data_parallel_rank": 1, "num_requests_waiting": 2},
        "kv_stats": {"kv_active_blocks": 5},
    }
    assert batch.events == [event]


async def test_engines_socket_is_relayed(open_runtime: OpenRuntime, caplog: pytest.LogCaptureFixture) -> None:
    runtime = await open_runtime()
    endpoint = runtime.endpoint("demo.llm.generate")
    server = KvEventServer(topic="kv")
    try:
        with pytest.raises(ConfigError, match="ZMQ endpoint"):
            KvEventPublisher(endpoint, kv_block_size=BLOCK, zmq_endpoint="nowhere")
        with pytest.raises(ConfigError, match="kv_state_endpoint"):
            KvEventPublisher(endpoint, kv_block_size=BLOCK, kv_state_endpoint="other.llm.generate")
        publisher = KvEventPublisher(
            endpoint, kv_block_size=BLOCK, zmq_endpoint=server.endpoint, zmq_topic="kv", image_token_id=5
        )
        assert "KvEventPublisher: image_token_id: no effect here" in caplog.messages
        relaying = asyncio.create_task(_events(runtime, 1))
        while not relaying.done():  # a subscriber that joins late misses what was sent before
            server.publish([block_stored([7], None, PROMPT[:BLOCK])])
            await asyncio.sleep(0.05)
        dp_rank, event = relaying.result()[0]
        assert (dp_rank, event.kind, list(event.hashes)) == (0, STORED, NAMES[:1])
        publisher.shutdown()
        count = 2
        while CLEARED not in [event.kind for _, event in await _events(runtime, count)]:
            count += 1
    finally:
        await server.aclose()
