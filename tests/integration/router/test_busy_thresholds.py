"""Busy thresholds of each model in every router mode: requests are shed while all its workers are busy."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dynamo_redis.names import busy_threshold_key
from dynamo_redis.router.service import RouterService
from tests.routed_deployment import Deployment, Worker, until, until_served

PROMPT_TOKENS = 160  # ten blocks
MODES = ["round_robin", "random", "p2c", "least_loaded", "kv"]
AT_ONCE: dict[str, Any] = {"router_queue_wait_s": 0}
_starts = itertools.count(2)
TOKENS = "active_prefill_tokens_threshold"
BLOCKS = "active_decode_blocks_threshold"


def post(frontend: httpx.AsyncClient, model: str = "demo", **options: Any) -> asyncio.Task[httpx.Response]:
    """Send a prompt that no worker has in its cache."""
    start = next(_starts)
    prompt = list(range(start, start + PROMPT_TOKENS))
    body = {"model": model, "prompt": prompt, "max_tokens": 4, **options}
    return asyncio.create_task(frontend.post("/v1/completions", json=body))


def assert_shed(answer: httpx.Response) -> None:
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "overloaded"
    assert int(answer.headers["retry-after"]) >= 1


async def total(frontend: httpx.AsyncClient, name: str, **labels: str) -> float:
    text = (await frontend.get("/metrics")).text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return sum(
        s.value for s in samples if s.name == f"dynamo_frontend_{name}" and labels.items() <= s.labels.items()
    )


async def set_thresholds(frontend: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await frontend.post("/busy_threshold", json={"model": "demo", **body})


async def hold(frontend: httpx.AsyncClient, worker: Worker) -> asyncio.Task[httpx.Response]:
    """Have a worker read a prompt that it does not come to the end of."""
    worker.engine.gate.clear()
    count = worker.engine.request_count
    asking = post(frontend)
    await until(lambda: worker.engine.request_count == count + 1)
    return asking


@pytest.mark.parametrize("mode", MODES)
async def test_request_is_shed_while_all_workers_are_busy(deployment: Deployment, mode: str) -> None:
    worker = await deployment.worker()
    frontend = await deployment.frontend(mode=mode, active_prefill_tokens_threshold=100, **AT_ONCE)
    await until_served(frontend)
    held = await hold(frontend, worker)
    assert await total(frontend, "worker_active_prefill_tokens") == PROMPT_TOKENS
    for _ in range(3):
        assert_shed(await post(frontend))
    assert await total(frontend, "model_rejection_total", model="demo", endpoint="completions") == 3
    assert worker.engine.request_count == 1
    worker.engine.gate.set()
    assert (await held).status_code == 200
    assert (await post(frontend)).status_code == 200
    assert await total(frontend, "worker_active_prefill_tokens") == 0


@pytest.mark.parametrize("mode", MODES)
async def test_busy_worker_is_left_alone_while_another_is_free(deployment: Deployment, mode: str) -> None:
    workers = [await deployment.worker(), await deployment.worker()]
    frontend = await deployment.frontend(mode=mode, active_prefill_tokens_threshold=100, **AT_ONCE)
    await until_served(frontend, instances=2)
    for worker in workers:
        worker.engine.gate.clear()
    held = post(frontend)
    await until(lambda: sum(worker.engine.request_count for worker in workers) == 1)
    busy, free = sorted(workers, key=lambda worker: -worker.engine.request_count)
    free.engine.gate.set()
    for _ in range(6):
        assert (await post(frontend)).status_code == 200
    assert (busy.engine.request_count, free.engine.request_count) == (1, 6)
    busy.engine.gate.set()
    assert (await held).status_code == 200


@pytest.mark.parametrize("mode", ["round_robin", "kv"])
async def test_thresholds_change_at_every_frontend(deployment: Deployment, mode: str) -> None:
    worker, other = await deployment.worker(), await deployment.worker(model_name="other")
    frontends = [await deployment.frontend(mode=mode, **AT_ONCE) for _ in range(2)]
    await until_served(*frontends, instances=2)
    one, two = frontends
    unset = {BLOCKS: None, TOKENS: None, f"{TOKENS}_frac": None}
    listed = (await one.get("/busy_threshold")).json()
    assert listed == {"thresholds": [{"model": model, **unset} for model in ("demo", "other")]}

    answer = await set_thresholds(one, active_prefill_tokens_threshold=100)
    assert (answer.status_code, answer.json()) == (200, {"model": "demo", **unset, TOKENS: 100})
    await set_thresholds(one, active_decode_blocks_threshold=0.99)
    wanted = {"model": "demo", **unset, TOKENS: 100, BLOCKS: 0.99}
    await until_told(two, wanted)
    assert (await set_thresholds(two, **unset)).json() == wanted

    held = await hold(one, worker)
    assert_shed(await post(one))
    assert (await post(one, "other")).status_code == 200
    assert other.engine.request_count == 1
    await until_shed(two)  # it hears of the request of the first one
    worker.engine.gate.set()
    assert (await held).status_code == 200

    looking = await deployment.open_runtime()
    assert await looking.registry.delete(busy_threshold_key("demo"))
    for frontend in frontends:
        await until_told(frontend, {"model": "demo", **unset})


async def until_told(frontend: httpx.AsyncClient, wanted: dict[str, Any]) -> None:
    async with asyncio.timeout(20):
        while (await set_thresholds(frontend)).json() != wanted:
            await asyncio.sleep(0.02)


async def until_shed(frontend: httpx.AsyncClient) -> None:
    """The client of a policy counts load from a moment after it has heard of the first threshold."""
    waiting: list[asyncio.Task[httpx.Response]] = []
    async with asyncio.timeout(20):
        while True:
            waiting.append(post(frontend))
            await asyncio.wait({waiting[-1]}, timeout=0.5)
            if waiting[-1].done() and waiting[-1].result().status_code == 503:
                break
    for task in waiting:
        task.cancel()


@pytest.mark.parametrize("mode", ["round_robin", "kv"])
async def test_worker_is_busy_by_its_own_report_in_each_mode(deployment: Deployment, mode: str) -> None:
    worker = await deployment.worker(speedup_ratio=0.05, total_kv_blocks=20)
    plain = await deployment.frontend(mode="round_robin")
    frontend = await deployment.frontend(mode=mode, **AT_ONCE)
    await until_served(plain, frontend)
    assert (await set_thresholds(frontend, active_decode_blocks_threshold=0.4)).status_code == 200
    asking = post(plain, max_tokens=2000, stream=True)  # the other frontend hears of it from the worker
    await until(lambda: worker.engine.request_count == 1)
    async with asyncio.timeout(20):
        while await total(frontend, "worker_active_decode_blocks") < 10:
            await asyncio.sleep(0.02)
    assert_shed(await post(frontend))
    asking.cancel()


async def test_router_service_gets_the_thresholds_of_the_model(deployment: Deployment) -> None:
    worker = await deployment.worker()
    router, runtime = await deployment.router(**AT_ONCE)
    served = await RouterService(router).serve(runtime)
    frontend = await deployment.frontend(router_endpoint="dynamo.router.generate")
    await until_served(frontend)
    assert (await post(frontend)).status_code == 200
    await set_thresholds(frontend, active_prefill_tokens_threshold=10)
    held = await hold(frontend, worker)
    assert_shed(await post(frontend))
    worker.engine.gate.set()
    assert (await held).status_code == 200
    for endpoint in served:
        await endpoint.unregister()


async def test_thresholds_that_cannot_be_are_refused(deployment: Deployment) -> None:
    await deployment.worker()
    frontend = await deployment.frontend()
    await until_served(frontend)
    refused: list[tuple[Any, str | None]] = [
        ({}, "model"),
        ({"model": 5}, "model"),
        ({"model": "demo", BLOCKS: 1.5}, BLOCKS),
        ({"model": "demo", BLOCKS: -0.1}, BLOCKS),
        ({"model": "demo", BLOCKS: True}, BLOCKS),
        ({"model": "demo", BLOCKS: "0.5"}, BLOCKS),
        ({"model": "demo", TOKENS: 0.5}, TOKENS),
        ({"model": "demo", TOKENS: -1}, TOKENS),
        ({"model": "demo", TOKENS: 1 << 60}, TOKENS),
        ({"model": "demo", f"{TOKENS}_frac": -1}, f"{TOKENS}_frac"),
        ({"model": "demo", "threshold": 0.5}, "threshold"),
        ([], None),
    ]
    for body, param in refused:
        answer = await frontend.post("/busy_threshold", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), body
    unknown = await frontend.post("/busy_threshold", json={"model": "nothing", TOKENS: 1})
    assert unknown.status_code == 404
    plain = await frontend.post("/busy_threshold", content='{"model": "demo"}')
    assert plain.status_code == 415
    assert (await frontend.get("/busy_threshold")).json()["thresholds"][0][TOKENS] is None


async def test_requests_over_the_frontends_bound_wait_or_are_shed(deployment: Deployment) -> None:
    worker = await deployment.worker()
    frontend = await deployment.frontend(
        mode="round_robin", max_http_in_flight_count=1, max_http_queued_count=1, http_queue_wait_s=60
    )
    await until_served(frontend)
    answers = [await hold(frontend, worker), post(frontend)]
    async with asyncio.timeout(20):
        while not await total(frontend, "admission_queued_requests"):
            await asyncio.sleep(0.01)
    assert_shed(await post(frontend))
    assert await total(frontend, "requests_refused_total", error_type="overload") == 1
    assert worker.engine.request_count == 1
    worker.engine.gate.set()
    assert [(await answer).status_code for answer in answers] == [200, 200]
    assert await total(frontend, "admission_queued_requests") == 0


async def test_client_that_leaves_gives_up_its_place_in_line(deployment: Deployment) -> None:
    worker = await deployment.worker()
    frontend = await deployment.frontend(
        mode="round_robin", max_http_in_flight_count=1, max_http_queued_count=1, http_queue_wait_s=3600
    )
    await until_served(frontend)
    held, left = await hold(frontend, worker), post(frontend)
    for count in (1, 0):
        async with asyncio.timeout(20):
            while await total(frontend, "admission_queued_requests") != count:
                await asyncio.sleep(0.01)
        left.cancel()
    assert await total(frontend, "requests_refused_total", error_type="cancelled") == 1
    assert await total(frontend, "disconnected_clients") == 1
    worker.engine.gate.set()
    assert (await held).status_code == (await post(frontend)).status_code == 200
    assert worker.engine.request_count == 2


@pytest.mark.parametrize(
    ("status", "openai_type", "anthropic_status", "anthropic_type"),
    [
        (503, "service_unavailable_error", 529, "overloaded_error"),
        (529, "overloaded_error", 529, "overloaded_error"),
        (429, "rate_limit_error", 429, "rate_limit_error"),
    ],
)
async def test_overload_has_the_status_of_the_settings(
    deployment: Deployment, status: int, openai_type: str, anthropic_status: int, anthropic_type: str
) -> None:
    """Overload also has the type that goes with the status, in the form of each API."""
    worker = await deployment.worker()
    frontend = await deployment.frontend(
        mode="kv", overload_status=status, active_prefill_tokens_threshold=100, **AT_ONCE
    )
    full = await deployment.frontend(
        mode="kv", overload_status=status, max_http_in_flight_count=1, http_queue_wait_s=0
    )
    await until_served(frontend, full)
    held = [await hold(frontend, worker)]
    shed = [await post(frontend), await post(frontend, stream=True)]
    held.append(post(full))
    await until(lambda: worker.engine.request_count == 2)
    shed.append(await post(full))
    chat = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
    shed.append(await full.post("/v1/responses", json={"model": "demo", "input": "Hi"}))
    shed.append(await full.post("/v1/chat/completions", json=chat))
    shed.append(await full.post("/tokenize", json=chat))
    code = "rate_limit_exceeded" if status == 429 else "overloaded"
    for answer in shed:
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["type"]) == (status, code, openai_type)
        assert int(answer.headers["retry-after"]) >= 1
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        answer = await full.post(path, json=chat)
        assert (answer.status_code, answer.json()["error"]["type"]) == (anthropic_status, anthropic_type)
        assert int(answer.headers["retry-after"]) >= 1
    worker.engine.gate.set()
    assert [(await answer).status_code for answer in held] == [200, 200]


async def test_frontend_keeps_a_request_waiting_for_a_bounded_time(deployment: Deployment) -> None:
    worker = await deployment.worker()
    frontend = await deployment.frontend(
        mode="round_robin", max_http_in_flight_count=1, http_queue_wait_s=0.05
    )
    await until_served(frontend)
    held = await hold(frontend, worker)
    refused = await post(frontend)
    assert_shed(refused)
    assert "DYN_HTTP_MAX_IN_FLIGHT" in refused.json()["error"]["message"]
    worker.engine.gate.set()
    assert (await held).status_code == 200
    assert (await post(frontend)).status_code == 200
