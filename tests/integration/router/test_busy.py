"""Workers over a threshold are left alone; while all are, requests wait, a bounded number and time."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from dynamo_redis.planes.context import Context
from dynamo_redis.router.asking import ask_states
from dynamo_redis.router.kv_router import KvRouter
from dynamo_redis.runtime import DistributedRuntime
from tests.routed_deployment import Deployment, until, until_served

PROMPT = list(range(2, 162))  # 160 tokens, ten blocks
THRESHOLD: dict[str, Any] = {"active_prefill_tokens_threshold": 100, "router_queue_wait_s": 60}


def post(frontend: httpx.AsyncClient, model: str = "demo") -> asyncio.Task[httpx.Response]:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 4}
    return asyncio.create_task(frontend.post("/v1/completions", json=body))


async def test_requests_wait_for_a_worker_and_are_served(deployment: Deployment) -> None:
    worker = await deployment.worker()
    frontend = await deployment.frontend(**THRESHOLD, router_queue_count=2)
    await until_served(frontend)
    worker.engine.gate.clear()
    answers = [post(frontend)]
    await until(lambda: worker.engine.request_count == 1)
    answers += [post(frontend), post(frontend)]
    looking = await deployment.open_runtime()
    await until_waiting(looking, 2)

    refused = await post(frontend)
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "overloaded"
    assert worker.engine.request_count == 1

    worker.engine.gate.set()
    assert [(await answer).status_code for answer in answers] == [200, 200, 200]
    assert worker.engine.request_count == 3


async def until_waiting(looking: DistributedRuntime, count: int) -> None:
    async with asyncio.timeout(20):
        while [answer.state and answer.state["waiting_count"] for answer in await ask_states(looking)] != [
            count
        ]:
            await asyncio.sleep(0.01)


async def until_all_know_of(looking: DistributedRuntime, prefill_tokens: int) -> None:
    async with asyncio.timeout(20):
        while True:
            states = [answer.state for answer in await ask_states(looking)]
            if all(state and state["workers"][0]["prefill_tokens"] == prefill_tokens for state in states):
                return
            await asyncio.sleep(0.01)


async def test_waiting_ends_with_the_requests_deadline(deployment: Deployment) -> None:
    worker = await deployment.worker()
    patient = await deployment.frontend(**THRESHOLD)
    hasty = await deployment.frontend(**THRESHOLD, request_timeout_s=0.3)
    await until_served(patient, hasty)
    worker.engine.gate.clear()
    first = post(patient)
    await until_all_know_of(await deployment.open_runtime(), 160)
    second = await post(hasty)
    assert second.status_code == 504
    assert int(second.headers["retry-after"]) >= 1
    assert second.json()["error"]["code"] == "deadline_exceeded"
    assert "busy" in second.json()["error"]["message"]
    worker.engine.gate.set()
    assert (await first).status_code == 200
    assert worker.engine.request_count == 1


async def test_idle_worker_is_chosen_before_a_busy_one_with_hits(deployment: Deployment) -> None:
    for _ in range(2):
        await deployment.worker()
    router, _ = await deployment.router(**THRESHOLD)
    await until(lambda: len(router.instance_ids()) == 2)
    first = await ask(router)
    [item async for item in first]
    holder = first.choice.worker
    await until(lambda: router.indexer and router.indexer.index.block_counts().get(holder) == 10)
    # Another router gives it much to read.
    router.chooser._book.add("other", "r", holder, prefill_tokens=101, blocks=0, deadline=1e12)
    call = await ask(router)
    assert call.choice.worker != holder
    await call.aclose()


async def test_worker_is_busy_by_its_own_report(deployment: Deployment) -> None:
    worker = await deployment.worker(speedup_ratio=0.1, total_kv_blocks=20)
    router, _ = await deployment.router(active_decode_blocks_threshold=0.4, router_queue_count=0)
    other, _ = await deployment.router(router_replica_sync=False, use_kv_events=False)
    metrics = router._metrics
    assert metrics is not None
    call = await ask(other, max_tokens=100)  # this router hears of it from the worker alone
    await anext(call)
    choice = call.choice.worker

    def said_blocks() -> int:
        known = metrics.used_blocks(choice)
        return 0 if known is None else known[0]

    await until(lambda: said_blocks() >= 10)
    assert router._workers.without_busy([choice], router.chooser._book, router._busy) == []
    await call.aclose()
    await until(lambda: said_blocks() == 0)
    assert router._workers.without_busy([choice], router.chooser._book, router._busy) == [choice]
    assert worker.engine.request_count == 1


async def ask(router: KvRouter, *, max_tokens: int = 4) -> Any:
    request = {
        "model": "demo",
        "token_ids": PROMPT,
        "stop_conditions": {"max_tokens": max_tokens, "ignore_eos": True},
        "sampling_options": {},
        "eos_token_ids": [],
    }
    return await router.generate(request, False, Context())


async def test_waiting_request_goes_to_a_later_worker(deployment: Deployment) -> None:
    """Also where another model has workers at the same endpoint."""
    busy, _ = await deployment.worker(), await deployment.worker(model_name="other")
    frontend = await deployment.frontend(**THRESHOLD)
    await until_served(frontend, instances=2)
    busy.engine.gate.clear()
    held = post(frontend)
    await until(lambda: busy.engine.request_count == 1)
    waits = post(frontend)
    await until_waiting(await deployment.open_runtime(), 1)
    later = await deployment.worker()
    assert (await waits).status_code == 200
    assert later.engine.request_count == 1
    busy.engine.gate.set()
    assert (await held).status_code == 200


async def test_waiting_request_goes_to_no_other_model(deployment: Deployment) -> None:
    """Its model was the only one at the endpoint when it came."""
    busy = await deployment.worker()
    frontend = await deployment.frontend(**THRESHOLD)
    await until_served(frontend)
    busy.engine.gate.clear()
    held = post(frontend)
    await until(lambda: busy.engine.request_count == 1)
    waits = post(frontend)
    await until_waiting(await deployment.open_runtime(), 1)
    other = await deployment.worker(model_name="other")
    async with asyncio.timeout(20):
        while (await post(frontend, "other")).status_code != 200:
            await asyncio.sleep(0.01)
    assert other.engine.request_count == 1
    busy.engine.gate.set()
    assert [(await answer).status_code for answer in (held, waits)] == [200, 200]
    assert (busy.engine.request_count, other.engine.request_count) == (2, 1)
