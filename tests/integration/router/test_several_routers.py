"""Routers beside each other, and routers as a service of their own."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

import pytest

from dynamo_redis.errors import InvalidRequest, PlaneError
from dynamo_redis.planes.context import Context
from dynamo_redis.router.index.prefix_index import KvIndex
from dynamo_redis.router.kv_router import KvRouter
from dynamo_redis.router.service import RouterService
from dynamo_redis.runtime import DistributedRuntime
from dynamo_redis.store.event_base import StreamName
from dynamo_redis.store.server import EmbeddedServer
from dynamo_redis.wire.topics import ACTIVE_SEQUENCES
from tests.routed_deployment import WORKERS, Deployment, until, until_served

PROMPT = list(range(2, 162))  # ten blocks
REQUEST: dict[str, Any] = {
    "model": "demo",
    "token_ids": PROMPT,
    "stop_conditions": {"max_tokens": 4, "ignore_eos": True},
    "sampling_options": {},
    "eos_token_ids": [],
}


def load_of(router: KvRouter) -> tuple[int, int, int]:
    """Prompt tokens, blocks and requests on all workers."""
    prefill_tokens, blocks, requests = 0, 0, 0
    for load in router.chooser.loads().values():
        prefill_tokens += load.prefill_tokens
        blocks += load.blocks
        requests += load.request_count
    return prefill_tokens, blocks, requests


def has_load(router: KvRouter, load: tuple[int, int, int]) -> bool:
    return load_of(router) == load


def knows_blocks(index: KvIndex) -> bool:
    return index.block_count >= 10


async def test_routers_know_each_others_requests_also_a_late_one(deployment: Deployment) -> None:
    worker = await deployment.worker()
    one, _ = await deployment.router()
    two, _ = await deployment.router()
    alone, _ = await deployment.router(router_replica_sync=False)
    worker.engine.gate.clear()
    call = await one.generate({**REQUEST, "stop_conditions": {"max_tokens": 3000}}, False, Context())
    assert load_of(one) == (160, 10, 1)
    await until(lambda: load_of(two) == (160, 10, 1))
    late, _ = await deployment.router()
    assert load_of(late) == (160, 10, 1)
    worker.engine.gate.set()
    await anext(call)
    for router in (one, two, late):
        await until(partial(has_load, router, (0, 10, 1)))
    await call.aclose()
    for router in (one, two, late):
        await until(partial(has_load, router, (0, 0, 0)))
    assert load_of(alone) == (0, 0, 0)


async def test_router_alone_sends_nothing_until_another_comes(deployment: Deployment) -> None:
    worker = await deployment.worker()
    one, runtime = await deployment.router()
    await deployment.router(router_replica_sync=False)
    stream = StreamName(one.endpoint.namespace, one.endpoint.component, ACTIVE_SEQUENCES)
    worker.engine.gate.clear()
    call = await one.generate(REQUEST, False, Context())
    assert await runtime.events.info(stream) is None
    two, _ = await deployment.router()
    assert load_of(two) == load_of(one) == (160, 10, 1), "it has been told before it serves"
    worker.engine.gate.set()
    await call.aclose()
    await until(partial(has_load, two, (0, 0, 0)))
    await two.aclose()
    assert one._sync is not None
    await until(lambda: one._sync is not None and one._sync._publisher.is_resting)


async def test_a_router_that_dies_takes_its_bookings_along(deployment: Deployment) -> None:
    worker = await deployment.worker()
    one, runtime = await deployment.router({"lease_ttl_s": 1.0})
    two, _ = await deployment.router()
    worker.engine.gate.clear()
    call = await one.generate(REQUEST, False, Context())
    await until(lambda: load_of(two) == (160, 10, 1))
    await runtime.registry.aclose()  # its lease ends, it frees nothing
    await until(lambda: load_of(two) == (0, 0, 0))
    assert load_of(one) == (160, 10, 1)
    late, _ = await deployment.router()  # which reads what the dead one has said
    assert load_of(late) == (0, 0, 0)
    await call.aclose()
    worker.engine.gate.set()


async def open_service(
    deployment: Deployment, **settings: Any
) -> tuple[KvRouter, DistributedRuntime, RouterService]:
    router, runtime = await deployment.router(**settings)
    service = RouterService(router)
    await service.serve(runtime)
    return router, runtime, service


async def test_frontends_use_a_router_service_and_do_without_it(deployment: Deployment) -> None:
    for _ in range(2):
        await deployment.worker()
    # A "free" that is still on its way would make the holder look busy.
    routers = [await open_service(deployment, router_replica_sync=False) for _ in range(2)]
    frontends = [
        await deployment.frontend(mode="kv", router_endpoint="dynamo.router.generate") for _ in range(2)
    ]
    await until_served(*frontends, instances=2)

    async def complete(number: int) -> int:
        body = {"model": "demo", "prompt": PROMPT, "max_tokens": 4}
        response = await frontends[number % 2].post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return int(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert await complete(0) == 0
    for router, _, _ in routers:
        assert router.indexer is not None
        await until(partial(knows_blocks, router.indexer.index))
    for number in range(4):
        assert await complete(number) > 0
    chosen = [router.state().counts.request_count for router, _, _ in routers]
    assert sum(chosen) == 5

    # One router is gone, then all are: what is under way may fail, what comes then does not.
    for _, runtime, _ in routers:
        assert runtime._server is not None
        await runtime._server.aclose()
        for number in range(4):
            assert await complete(number) >= 0
    assert sum(router.state().counts.request_count for router, _, _ in routers) < sum(chosen) + 8


async def test_service_only_chooses_on_request(deployment: Deployment) -> None:
    worker = await deployment.worker()
    router, _, _ = await open_service(deployment)
    caller = await deployment.open_runtime()
    async with await caller.endpoint("dynamo.router.best_worker_id").client() as client:
        await client.wait_for_instances(5)
        asked = {"token_ids": PROMPT}
        [answer] = [item async for item in await client.generate(asked, annotated=False)]
        assert answer["instance_id"] == worker.instance_id
        assert answer["overlap_blocks"] == 0
        assert load_of(router) == (0, 0, 0)

        # Held for as long as the answer is open; a caller that is gone lets go, too.
        held = await client.generate({**asked, "hold": True}, annotated=False)
        assert (await anext(held))["instance_id"] == worker.instance_id
        assert load_of(router) == (160, 10, 1)
        await held.aclose()
        await until(lambda: load_of(router) == (0, 0, 0))
        held = await client.generate({**asked, "hold": True}, False, Context())
        await anext(held)
        assert load_of(router) == (160, 10, 1)
        del held
        await until(lambda: load_of(router) == (0, 0, 0))
        with pytest.raises(InvalidRequest, match="token_ids"):
            await anext(await client.generate({}, annotated=False))


async def test_router_of_other_workers_refuses_with_the_reason(deployment: Deployment) -> None:
    await deployment.worker()
    await open_service(deployment)
    caller = await deployment.open_runtime()
    async with await caller.endpoint("dynamo.router.generate").client() as client:
        await client.wait_for_instances(5)
        request = {**REQUEST, "routing": {"endpoint": "dynamo.other.generate"}}
        with pytest.raises(InvalidRequest, match=str(WORKERS)):
            await anext(await client.generate(request, annotated=False))


async def test_a_worker_that_is_lost_is_not_taken_for_the_router(deployment: Deployment) -> None:
    worker = await deployment.worker()
    await open_service(deployment)
    caller = await deployment.open_runtime()
    async with await caller.endpoint("dynamo.router.generate").client() as client:
        await client.wait_for_instances(5)
        call = await client.generate({**REQUEST, "stop_conditions": {"max_tokens": 3000}}, False)
        await anext(call)
        assert worker.process.runtime._server is not None
        await worker.process.runtime._server.aclose()
        with pytest.raises(PlaneError):
            async for _ in call:
                pass
        assert len(client.instance_ids()) == 1  # the router is there as before


async def test_routers_choose_without_redis_and_sync_afterwards(
    own_redis_server: EmbeddedServer, deployment: Deployment
) -> None:
    there = {"redis_url": own_redis_server.url}
    worker = await deployment.worker(there)
    one, _ = await deployment.router(there)
    two, _ = await deployment.router(there)
    await own_redis_server.kill()
    for _ in range(3):
        call = await one.generate(REQUEST, False, Context())
        assert [item async for item in call][-1]["finish_reason"] == "length"
    worker.engine.gate.clear()
    call = await one.generate(REQUEST, False, Context())
    await own_redis_server.restart()
    await until(lambda: load_of(two) == (160, 10, 1))
    await call.aclose()
    await until(lambda: load_of(two) == (0, 0, 0))
    worker.engine.gate.set()


@pytest.mark.parametrize("among", [3, "abc", [[1]], [1.5], {"1": 2}])
async def test_service_refuses_wrong_instance_ids(deployment: Deployment, among: Any) -> None:
    await deployment.worker()
    await open_service(deployment)
    caller = await deployment.open_runtime()
    async with await caller.endpoint("dynamo.router.generate").client() as client:
        await client.wait_for_instances(5)
        with pytest.raises(InvalidRequest, match="list of instance ids"):
            await anext(await client.generate({**REQUEST, "routing": {"among": among}}, annotated=False))


async def test_worker_without_a_card_gets_no_request(deployment: Deployment) -> None:
    """It is about to say which model it serves, and may serve another one."""
    worker = await deployment.worker()
    router, _, _ = await open_service(deployment)
    served = [
        await deployment.frontend(mode="kv", router_endpoint="dynamo.router.generate"),
        await deployment.frontend(mode="round_robin"),
        await deployment.frontend(mode="kv"),
    ]
    await until_served(*served)
    asked_count = 0

    async def generate(_: Any) -> AsyncGenerator[dict[str, Any], None]:
        nonlocal asked_count
        asked_count += 1
        yield {"token_ids": [1], "finish_reason": "stop"}

    starting = await deployment.open_runtime()
    await starting.endpoint(str(WORKERS)).start_serving(generate)
    await until(lambda: len(router.instance_ids()) == 2)
    for frontend in served:
        for _ in range(8):
            body = {"model": "demo", "prompt": PROMPT, "max_tokens": 1}
            assert (await frontend.post("/v1/completions", json=body)).status_code == 200
    assert (worker.engine.request_count, asked_count) == (24, 0)
