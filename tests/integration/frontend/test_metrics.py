"""`/metrics` of a frontend: each request is counted once, whatever its end, and nothing is left at rest."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from dynamo_redis.errors import ConnectionLost, HandlerFailed
from dynamo_redis.models.llm_protocol import GenerateItem, GenerateRequest
from dynamo_redis.planes.context import Context
from tests.frontend_deployment import Deployment, NotingEngine, until_healthy

PROMPT = {"model": "demo", "prompt": "Tell me a long story.", "max_tokens": 40, "ignore_eos": True}
WITHIN_S = 30.0


class RandomEngine(NotingEngine):
    """A mock engine that fails, or is lost, at random."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.rng = random.Random(5)
        self.failures: float = 0.0

    async def generate(self, request: GenerateRequest, context: Context) -> AsyncGenerator[GenerateItem]:
        async for item in super().generate(request, context):
            if self.rng.random() < self.failures:
                raise self.rng.choice([ConnectionLost, HandlerFailed])("at random")
            yield item


class OnceLostEngine(NotingEngine):
    """Loses the first request of all these engines before its first item."""

    lost_count = 0

    async def generate(self, request: GenerateRequest, context: Context) -> AsyncGenerator[GenerateItem]:
        if not OnceLostEngine.lost_count:
            OnceLostEngine.lost_count += 1
            raise ConnectionLost("the engine is gone")
        async for item in super().generate(request, context):
            yield item


async def samples(url: str) -> list[Sample]:
    async with httpx.AsyncClient(timeout=WITHIN_S) as http:
        response = await http.get(f"{url}/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return [s for family in text_string_to_metric_families(response.text) for s in family.samples]


def total(found: list[Sample], name: str, **labels: str) -> float:
    return sum(
        s.value for s in found if s.name == f"dynamo_frontend_{name}" and labels.items() <= s.labels.items()
    )


async def complete(url: str, **options: Any) -> httpx.Response:
    async with httpx.AsyncClient(timeout=WITHIN_S) as http:
        return await http.post(f"{url}/v1/completions", json={**PROMPT, **options})


async def test_answers_are_counted_by_model(deployment: Deployment) -> None:
    await deployment.worker(migration_limit=2)
    url = await deployment.frontend()
    await until_healthy(url, 1)
    for _ in range(3):
        assert (await complete(url)).status_code == 200
    streamed = await complete(url, stream=True)
    assert streamed.text.count("data: ") == 42
    found = await samples(url)
    done = {"model": "demo", "endpoint": "completions", "status": "success", "error_type": ""}
    assert total(found, "requests_total", **done, request_type="unary") == 3
    assert total(found, "requests_total", **done, request_type="stream") == 1
    assert total(found, "output_tokens_total", model="demo") == 160
    assert total(found, "request_duration_seconds_count", model="demo") == 4
    assert total(found, "time_to_first_token_seconds_count", model="demo") == 4
    assert total(found, "inter_token_latency_seconds_count", model="demo") == 4 * 39
    assert total(found, "output_sequence_tokens_bucket", model="demo", le="64") == 4
    assert total(found, "output_sequence_tokens_bucket", model="demo", le="16") == 0
    assert total(found, "input_sequence_tokens_count", model="demo") == 4
    assert total(found, "cached_tokens_count", model="demo") == 4
    assert total(found, "inflight_requests") == total(found, "queued_requests") == 0
    assert total(found, "model_migration_limit", model="demo") == 2
    assert total(found, "model_instances", model="demo") == 1
    assert total(found, "model_context_length", model="demo") > 0
    assert total(found, "model_kv_cache_block_size", model="demo") == 16


async def test_refusals_are_counted_by_their_sort(deployment: Deployment) -> None:
    await deployment.worker()
    url = await deployment.frontend()
    await until_healthy(url, 1)
    assert (await complete(url, model="nothing")).status_code == 404
    assert (await complete(url, temperature=-1)).status_code == 400
    found = await samples(url)
    assert total(found, "requests_refused_total", endpoint="completions", error_type="not_found") == 1
    assert total(found, "requests_refused_total", endpoint="completions", error_type="validation") == 1
    assert total(found, "requests_total") == 0
    assert not [sample for sample in found if sample.labels.get("model") == "nothing"]


async def test_requests_under_way_are_shown(deployment: Deployment) -> None:
    await deployment.worker(speedup_ratio=0.05)
    url = await deployment.frontend()
    await until_healthy(url, 1)
    asking = asyncio.create_task(complete(url, max_tokens=2000))
    async with asyncio.timeout(WITHIN_S):
        while not total(await samples(url), "inflight_requests", model="demo"):
            await asyncio.sleep(0.02)
    asking.cancel()
    async with asyncio.timeout(WITHIN_S):
        while total(found := await samples(url), "inflight_requests", model="demo"):
            await asyncio.sleep(0.02)
    assert total(found, "requests_total", status="error", error_type="cancelled") == 1
    assert total(found, "disconnected_clients") == 1


async def test_nothing_is_left_at_rest(deployment: Deployment) -> None:
    """Requests that end in each way: whole, by a client that leaves, by a failure, by a lost worker."""
    for _ in range(3):
        engine = await deployment.worker(kind=RandomEngine, speedup_ratio=50)
        assert isinstance(engine, RandomEngine)
        engine.failures = 0.01
    url = await deployment.frontend(migration_limit=1)
    await until_healthy(url, 3)
    rng, sent_count = random.Random(11), 120

    async def ask() -> None:
        options = {"stream": rng.random() < 0.5, "n": rng.choice([1, 1, 3])}
        patience_s = rng.choice([0.001, 0.05, 0.2, WITHIN_S, WITHIN_S])
        try:
            async with asyncio.timeout(patience_s):
                await complete(url, **options)
        except TimeoutError:
            pass

    for _ in range(sent_count // 12):
        await asyncio.gather(*(ask() for _ in range(12)))
    async with asyncio.timeout(WITHIN_S):
        while total(found := await samples(url), "inflight_requests"):
            await asyncio.sleep(0.02)
    assert total(found, "queued_requests") == 0
    ended = total(found, "requests_total")
    assert 0 < ended <= sent_count  # some clients left before they had sent anything
    assert total(found, "request_duration_seconds_count") == ended
    assert total(found, "model_migration_total", migration_type="ongoing_request") > 0
    # A client may leave before its request is one to a model: that is a refused one.
    left = total(found, "requests_total", error_type="cancelled")
    left += total(found, "requests_refused_total", error_type="cancelled")
    assert left == total(found, "disconnected_clients")


async def test_requests_sent_again_are_counted(deployment: Deployment) -> None:
    for _ in range(2):
        await deployment.worker(kind=OnceLostEngine)
    OnceLostEngine.lost_count = 0
    url = await deployment.frontend(migration_limit=1)
    await until_healthy(url, 2)
    assert (await complete(url)).status_code == 200
    found = await samples(url)
    assert total(found, "model_migration_total", migration_type="new_request") == 1
    assert total(found, "model_migration_total", migration_type="ongoing_request") == 0
