"""An indexer in its deployment: how it starts, what it says of itself, and the router's record."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynamo_redis.config import RouterSettings
from dynamo_redis.errors import SchemaMismatch, StoreUnavailable
from dynamo_redis.events.router_record import RouterRecord, list_routers, register_router
from dynamo_redis.names import kv_router_key
from dynamo_redis.router.index import indexer, recovery
from dynamo_redis.store.event_base import EntryId
from dynamo_redis.store.streams.readers import RedisEventGroup
from tests.kv_deployment import (
    COMPONENT,
    NAMESPACE,
    Deployment,
    deployment,
    flush,
    indexed_blocks,
    wait_until,
)


@pytest.fixture
async def deployed(dynamo_redis_url: str, dynamo_redis_prefix: str) -> AsyncIterator[Deployment]:
    async with deployment(dynamo_redis_url, dynamo_redis_prefix) as made:
        yield made


async def test_router_starts_without_readable_events_and_heals(
    deployed: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexer, "START_S", 0.1)

    async def fail(_: RedisEventGroup) -> EntryId:
        raise StoreUnavailable("Redis is away")

    await deployed.worker()
    deployed.chat(10)
    with monkeypatch.context() as patch:
        patch.setattr(RedisEventGroup, "create", fail)
        router = await deployed.router()
        state = router.state()
        assert (state.connected, state.caught_up, state.lag_count) == (False, False, None)
        assert state.disconnected_s > 0
        assert router.find([1, 2, 3]) == {}
    await deployed.wait_until_equal()
    await wait_until(lambda: router.state().caught_up, "it has caught up")


async def test_silent_worker_delays_no_other_ask(
    deployed: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "ANSWER_S", 0.1)
    monkeypatch.setattr(recovery, "ASK_ALL_PAUSE_S", 0.0)
    monkeypatch.setattr(recovery, "ASKS_AT_ONCE_COUNT", 1)
    monkeypatch.setattr(recovery, "RETRIES_AT_ONCE_COUNT", 1)
    silent, other = [await deployed.worker() for _ in range(2)]
    router = await deployed.router()
    deployed.chat(10)
    await deployed.wait_until_equal()
    silent.is_answering = False
    router.note_possible_loss()
    await wait_until(lambda: router.state().unanswered_count >= 2, "it is asked again and again")
    monkeypatch.setattr(recovery, "ANSWER_S", 1000.0)  # the next ask of the silent one lasts
    silent_count = silent.asked_count
    await wait_until(lambda: silent.asked_count > silent_count, "it is being asked")
    asked_count = other.asked_count
    router.note_possible_loss()
    await wait_until(lambda: other.asked_count > asked_count, "the other is asked meanwhile")
    await wait_until(lambda: indexed_blocks(router) == other.truth(), "the other has answered")


async def test_index_lacks_a_silent_worker(deployed: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "ANSWER_S", 0.1)
    monkeypatch.setattr(recovery, "ASK_ALL_PAUSE_S", 0.0)
    worker, _ = [await deployed.worker() for _ in range(2)]
    deployed.chat(10)
    router = await deployed.router()
    assert router.is_whole()  # at once: a router that serves has asked all workers
    worker.is_answering = False
    router.note_possible_loss()
    await wait_until(lambda: not router.is_whole(), "the blocks of a silent worker were dropped")
    worker.is_answering = True
    await wait_until(router.is_whole, "it has answered")
    await deployed.wait_until_equal()


async def test_worker_of_another_event_plane_holds_nothing(
    deployed: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    await deployed.worker(event_plane="pubsub")
    worker = await deployed.worker()
    deployed.chat(10)
    router = await deployed.router()
    await wait_until(lambda: "set DYN_EVENT_PLANE alike" in caplog.text, "it says so")
    assert "gives no usable answer, asking again: InvalidRecord: " in caplog.text
    assert indexed_blocks(router) == worker.truth()


async def test_a_state_is_plain_values(deployed: Deployment) -> None:
    await deployed.worker()
    deployed.chat(10)
    await flush(deployed.workers)
    router = await deployed.router()
    await router.save_snapshot()
    deployed.chat(5)
    await deployed.wait_until_equal()
    await wait_until(lambda: router.state().lag_count == 0, "how far it is has been looked at")
    state: dict[str, Any] = json.loads(json.dumps(router.state().to_json()))
    assert state["mode"] == "stream"
    assert state["block_count"] == sum(map(len, deployed.truth().values()))
    assert state["snapshot"]["size_bytes"] > 0
    assert state["snapshot"]["position"] < state["position"]
    assert state["lag_s"] == 0.0


# --------------------------------------------------------------------------- records


async def test_a_router_is_listed_for_as_long_as_it_lives(deployed: Deployment) -> None:
    runtime, observer = await deployed.runtime(), await deployed.runtime()
    try:
        settings = RouterSettings.load(router_temperature=0.5)
        await register_router(runtime, NAMESPACE, COMPONENT, "router/1", settings)
        await observer.registry.put(kv_router_key(NAMESPACE, COMPONENT, "broken"), b"{}")
        ((record,), _) = await list_routers(observer.registry)
        assert (record.router_id, record.instance_id) == ("router/1", runtime.instance_id)
        assert record.consumer_group == "router/1"
        assert record.settings["router_temperature"] == 0.5
    finally:
        await runtime.aclose()
    (left, invalid) = await list_routers(observer.registry)
    assert (left, [exc.key for exc in invalid]) == ([], [kv_router_key(NAMESPACE, COMPONENT, "broken")])
    await observer.aclose()


async def test_a_router_that_follows_no_stream_has_no_group(deployed: Deployment) -> None:
    runtime = await deployed.runtime()
    await register_router(runtime, NAMESPACE, COMPONENT, "r", RouterSettings.load(use_kv_events=False))
    ((record,), _) = await list_routers(runtime.registry)
    assert record.consumer_group is None
    await runtime.aclose()


def test_later_fields_are_kept_and_other_versions_refused() -> None:
    record = RouterRecord(namespace="n", component="c", router_id="r", instance_id=7)
    later = json.loads(record.to_bytes()) | {"colour": "red"}
    again = json.loads(RouterRecord.from_bytes(json.dumps(later).encode()).to_bytes())
    assert again == later
    with pytest.raises(SchemaMismatch):
        RouterRecord.from_bytes(json.dumps(later | {"version": 2}).encode())
    with pytest.raises(ValueError, match="not a router's record"):
        RouterRecord.from_bytes(b"[]")
