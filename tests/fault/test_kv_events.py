"""Routers while events are repeated, lost, damaged and late: afterwards each index equals the caches."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

import pytest
from redis.asyncio import Redis

from dynamo_redis.events import publisher as event_publisher
from dynamo_redis.router.index import members, recovery
from dynamo_redis.store.event_base import NewEntry
from dynamo_redis.store.keys import StreamKeys
from dynamo_redis.store.server import EmbeddedServer
from dynamo_redis.wire.event import EventBatch
from faults.proxy import STALL, Conditions, Proxy
from tests import kv_deployment
from tests.kv_deployment import STREAM, Deployment, differences, flush, indexed_blocks, wait_until

NO_ANSWERS = Conditions(swallow_answers=True)

deployment = partial(kv_deployment.deployment, verify_s=1000.0)
"""No router asks its workers just because it has started: that would heal what a fault left unasked."""


@pytest.fixture(autouse=True)
def no_defects(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail on errors in the log, even if the index has healed."""
    yield
    ours = [record for record in caplog.get_records("call") if record.name.startswith("dynamo_redis")]
    assert not [record for record in ours if record.levelno >= logging.ERROR]


@pytest.fixture
async def deployed(dynamo_redis_url: str, dynamo_redis_prefix: str) -> AsyncIterator[Deployment]:
    async with deployment(dynamo_redis_url, dynamo_redis_prefix) as made:
        yield made


@pytest.fixture
async def redis(dynamo_redis_url: str) -> AsyncIterator[Redis]:
    """Another way to the same keys, for what no program of this package does."""
    async with Redis.from_url(dynamo_redis_url) as client:
        yield client


@pytest.fixture
def keys(dynamo_redis_prefix: str) -> StreamKeys:
    return StreamKeys(dynamo_redis_prefix, STREAM)


# --------------------------------------------------------------------------- the normal way


async def test_a_router_follows_from_the_beginning_of_the_stream(deployed: Deployment) -> None:
    for _ in range(2):
        await deployed.worker(rank_count=2)
    deployed.chat(30)
    await flush(deployed.workers)
    router = await deployed.router()
    assert not differences(router, deployed.truth()), "it serves before it has read what was there"
    deployed.chat(30)
    await deployed.wait_until_equal()
    assert router.state().gaps_count == 0


async def test_a_worker_at_rest_is_woken_by_a_router(
    deployed: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_publisher, "LOOK_S", 0.0)
    worker = await deployed.worker(rank_count=2)

    async def rests() -> None:
        worker.chat(10)
        await wait_until(lambda: all(sender.is_resting for sender in worker.senders), "it rests")
        worker.chat(10)
        assert await worker.runtime.events.info(STREAM) is None

    await rests()
    router = await deployed.router()
    for _ in range(3):
        worker.chat(10)
        await deployed.wait_until_equal()
    assert router.state().gaps_count == 0
    await deployed.end_router(router)
    await rests()
    await deployed.router()
    await deployed.wait_until_equal()


async def test_a_worker_that_leaves_takes_its_blocks_with_it(
    deployed: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(members, "UNLISTED_S", 1000.0)
    workers = [await deployed.worker() for _ in range(2)]
    deployed.chat(20)
    await deployed.router()
    await deployed.wait_until_equal()
    await deployed.end_worker(workers[0])
    await deployed.wait_until_equal()


async def test_a_worker_that_is_restarted_under_its_id_begins_empty(deployed: Deployment) -> None:
    worker = await deployed.worker(rank_count=2)
    await deployed.worker()
    deployed.chat(20)
    await deployed.router()
    await deployed.wait_until_equal()
    restarted = await deployed.restart_worker(worker)
    await deployed.wait_until_equal()  # before it has said anything
    restarted.chat(20)
    await deployed.wait_until_equal()


async def test_a_worker_that_is_replaced_without_leaving_begins_empty(deployed: Deployment) -> None:
    """As after a kill: the record of its next start is the first that is heard of it."""
    killed = await deployed.worker()
    deployed.chat(20)
    await deployed.router()
    await deployed.wait_until_equal()
    deployed.workers.remove(killed)
    try:
        await deployed.worker(instance_id=killed.instance_id)
        await deployed.wait_until_equal()
    finally:
        await killed.aclose()


# --------------------------------------------------------------------------- repeated, lost, damaged


async def test_lost_answers_repeat_batches_and_each_is_applied_once(
    dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    async with (
        Proxy(dynamo_redis_url) as proxy,
        deployment(dynamo_redis_url, dynamo_redis_prefix, command_timeout_s=0.3) as deployed,
    ):
        await deployed.worker(url=proxy.url)
        router = await deployed.router()
        for _ in range(2):
            proxy.conditions = NO_ANSWERS
            deployed.chat(10)
            await wait_until(lambda: proxy.has_swallowed, "an answer is swallowed")
            await asyncio.sleep(0.1)  # it arrives, and the answer does not
            proxy.heal()
            deployed.chat(10)
            await deployed.wait_until_equal()
        assert router.state().repeated_count > 0
        assert router.state().gaps_count == 0


async def test_a_full_queue_leaves_a_gap_that_the_worker_fills(
    dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    async with (
        Proxy(dynamo_redis_url) as proxy,
        deployment(
            dynamo_redis_url, dynamo_redis_prefix, command_timeout_s=0.3, event_queue_count=20
        ) as deployed,
    ):
        worker = await deployed.worker(url=proxy.url)
        router = await deployed.router()
        worker.chat(5)
        await deployed.wait_until_equal()
        asked_count = router.state().recovered_count
        proxy.conditions = STALL
        worker.chat(100)
        assert worker.senders[0].left_out_count > 0
        proxy.heal()
        await deployed.wait_until_equal()
        await wait_until(
            lambda: router.state().recovered_count > asked_count,
            "it asked, for the gap or before it was seen",
        )


@pytest.mark.parametrize(
    "content", [b"", b"\xc1 no batch", b"\x92\x02\x90"], ids=["empty", "garbage", "newer"]
)
async def test_workers_make_up_for_an_unreadable_entry(
    deployed: Deployment, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    worker = await deployed.worker()
    deployed.chat(10)
    router = await deployed.router()
    await deployed.wait_until_equal()
    streams = worker.runtime.events
    append = streams.append

    async def damage(stream: Any, entries: Any, **options: Any) -> None:
        """The stored entry differs from the one that was sent, and then the publisher falls silent."""
        await append(stream, [NewEntry(content, 1) for _ in entries], **options)

    monkeypatch.setattr(streams, "append", damage)
    worker.chat(3)
    await wait_until(lambda: router.state().unreadable_count, "the damaged entry is read")
    await deployed.wait_until_equal()
    monkeypatch.undo()
    worker.chat(3)
    await deployed.wait_until_equal()


async def test_events_that_are_none_are_made_up_for_by_a_dump(deployed: Deployment) -> None:
    worker = await deployed.worker()
    router = await deployed.router()
    worker.chat(5)
    await deployed.wait_until_equal()
    sender = worker.senders[0]
    batch = EventBatch(STREAM.topic, worker.ids[0], sender.next_sequence, 0, [["no", "KV", "event"]])
    await worker.runtime.events.append(STREAM, [NewEntry(batch.to_bytes(), 1)])
    await wait_until(lambda: router.state().gaps_count, "the batch is refused")
    worker.chat(5)
    await deployed.wait_until_equal()


async def test_a_stream_that_is_deleted_costs_nothing(
    deployed: Deployment, redis: Redis, keys: StreamKeys
) -> None:
    for _ in range(2):
        await deployed.worker()
    deployed.chat(20)
    routers = [await deployed.router() for _ in range(2)]
    await deployed.wait_until_equal()
    await redis.delete(*keys.all)
    deployed.chat(20)
    await flush(deployed.workers)
    await redis.delete(keys.events)  # once more, with entries that no router may have read
    await deployed.wait_until_equal()
    await wait_until(lambda: all(each.state().cut_off_count for each in routers), "they find it gone")
    deployed.chat(5)
    await deployed.wait_until_equal()


async def test_a_group_that_is_deleted_costs_nothing(
    deployed: Deployment, redis: Redis, keys: StreamKeys
) -> None:
    await deployed.worker()
    router, other = [await deployed.router() for _ in range(2)]
    deployed.chat(20)
    await deployed.wait_until_equal()
    await redis.xgroup_destroy(keys.events, router.router_id)
    deployed.chat(20)
    await deployed.wait_until_equal()
    assert (router.state().cut_off_count, other.state().cut_off_count) == (1, 0)


async def test_a_router_that_slept_past_the_trim_asks_the_workers(
    dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    async with (
        Proxy(dynamo_redis_url) as proxy,
        deployment(dynamo_redis_url, dynamo_redis_prefix, event_stream_events_count=1000) as deployed,
    ):
        for _ in range(2):
            await deployed.worker()
        router = await deployed.router(url=proxy.url)
        other = await deployed.router()
        deployed.chat(10)
        await deployed.wait_until_equal()
        proxy.conditions = STALL
        for _ in range(40):
            deployed.chat(20)
            await flush(deployed.workers)
        await deployed.wait_until_equal(other)
        assert differences(router, deployed.truth())
        proxy.heal()
        await deployed.wait_until_equal()
        assert router.state().cut_off_count > 0


# --------------------------------------------------------------------------- Redis dies and forgets


@pytest.fixture
async def on_own_server(
    own_redis_server: EmbeddedServer, dynamo_redis_prefix: str
) -> AsyncIterator[Deployment]:
    async with deployment(own_redis_server.url, dynamo_redis_prefix) as made:
        for _ in range(2):
            await made.worker()
        for _ in range(2):
            await made.router()
        made.chat(20)
        await made.wait_until_equal()
        yield made


async def test_a_wiped_redis_costs_nothing(
    on_own_server: Deployment, own_redis_server: EmbeddedServer
) -> None:
    async with Redis.from_url(own_redis_server.url) as redis:
        await redis.flushall()
    on_own_server.chat(20)
    await on_own_server.wait_until_equal()
    late = await on_own_server.router()
    await on_own_server.wait_until_equal(late)
    on_own_server.chat(5)
    await on_own_server.wait_until_equal()


@pytest.mark.parametrize("keep_data", [True, False])
async def test_a_redis_that_is_killed_and_restarted_costs_nothing(
    on_own_server: Deployment, own_redis_server: EmbeddedServer, keep_data: bool
) -> None:
    on_own_server.chat(20)  # some of it is being sent right now
    await asyncio.sleep(0.003)
    await own_redis_server.kill()
    on_own_server.chat(20)
    assert all(indexed_blocks(router) for router in on_own_server.indexers), (
        "the index is there while Redis is not"
    )
    if not keep_data:
        own_redis_server.erase()
    await own_redis_server.restart()
    await on_own_server.wait_until_equal()
    on_own_server.chat(5)
    await on_own_server.wait_until_equal()


async def test_events_lost_by_a_failover_are_asked_of_silent_workers(
    dynamo_redis_url: str, dynamo_redis_prefix: str, redis: Redis, keys: StreamKeys
) -> None:
    """A batch was acknowledged and is forgotten before a router has read it, and nothing follows it."""
    async with (
        Proxy(dynamo_redis_url) as proxy,
        deployment(dynamo_redis_url, dynamo_redis_prefix) as deployed,
    ):
        worker = await deployed.worker()
        worker.chat(10)
        await deployed.router(url=proxy.url)
        await deployed.wait_until_equal()
        before = {key: await redis.dump(key) for key in keys.all}
        proxy.conditions = STALL
        worker.chat(10)
        await flush([worker])
        for key, content in before.items():
            assert content is not None
            await redis.restore(key, 0, content, replace=True)
        proxy.cut()
        proxy.heal()
        await deployed.wait_until_equal()


# --------------------------------------------------------------------------- routers


@pytest.mark.parametrize("killed", [False, True], ids=["ended", "killed"])
async def test_a_router_that_is_restarted_knows_all(
    deployed: Deployment, dynamo_redis_url: str, redis: Redis, keys: StreamKeys, killed: bool
) -> None:
    async with Proxy(dynamo_redis_url) as proxy:
        for _ in range(3):
            await deployed.worker()
        deployed.chat(20)
        router = await deployed.router(url=proxy.url)
        proxy.refuse = killed  # what it would still do, as leaving its group, it cannot
        if killed:
            proxy.cut()
        await deployed.end_router(router)
        groups = {group["name"].decode() for group in await redis.xinfo_groups(keys.events)}
        assert (router.router_id in groups) == killed
        deployed.chat(20)
        await deployed.router()
        deployed.chat(5)
        await deployed.wait_until_equal()


async def test_hanging_worker_holds_nothing_until_it_answers(
    deployed: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "ANSWER_S", 0.2)
    silent, other = [await deployed.worker() for _ in range(2)]
    deployed.chat(20)
    router = await deployed.router()
    await deployed.wait_until_equal()
    silent.is_answering = False
    router.note_possible_loss()
    await wait_until(lambda: router.state().unanswered_count, "it does not answer")
    assert indexed_blocks(router) == other.truth()
    silent.chat(20)
    other.chat(20)
    await wait_until(lambda: indexed_blocks(router) == other.truth(), "the others are followed meanwhile")
    silent.is_answering = True
    await deployed.wait_until_equal()


async def test_all_routers_ask_a_worker_at_once_each_once(deployed: Deployment) -> None:
    worker = await deployed.worker()
    routers = [await deployed.router() for _ in range(4)]
    asked_before = worker.asked_count
    for _ in range(20):
        for router in routers:
            router.note_possible_loss()
    worker.chat(5)
    await deployed.wait_until_equal()
    assert worker.asked_count - asked_before <= 3 * len(routers)


# --------------------------------------------------------------------------- without a stream


async def test_pubsub_heals_messages_without_a_listener(
    dynamo_redis_url: str, dynamo_redis_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_publisher, "TOPIC_SILENCE_S", 1000.0)
    async with (
        Proxy(dynamo_redis_url) as proxy,
        deployment(dynamo_redis_url, dynamo_redis_prefix, event_plane="pubsub") as deployed,
    ):
        for _ in range(2):
            await deployed.worker(rank_count=2)
        deployed.chat(20)
        await flush(deployed.workers)
        await deployed.router(url=proxy.url)
        await deployed.wait_until_equal()  # from dumps alone
        deployed.chat(20)
        await deployed.wait_until_equal()
        proxy.refuse = True
        proxy.cut()
        deployed.chat(20)
        await flush(deployed.workers)
        proxy.heal()
        await deployed.wait_until_equal()  # although no further event comes
        deployed.chat(5)
        await deployed.wait_until_equal()


async def test_pubsub_finds_that_the_last_message_was_lost(
    dynamo_redis_url: str, dynamo_redis_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_publisher, "TOPIC_SILENCE_S", 0.2)
    async with deployment(dynamo_redis_url, dynamo_redis_prefix, event_plane="pubsub") as deployed:
        worker = await deployed.worker()
        await deployed.router()

        async def lose(*_: Any) -> None:
            pass

        with monkeypatch.context() as patch:
            patch.setattr(worker.runtime.events, "publish", lose)
            worker.chat(10)
            await flush([worker])
        await deployed.wait_until_equal()
