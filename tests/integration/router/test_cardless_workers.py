"""Routers in front of workers that have no model card, or not yet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynamo_redis.errors import NoInstances
from dynamo_redis.llm import KvEventPublisher
from tests.routed_deployment import WORKERS, Deployment, until

PROMPT = list(range(20))
START_S = 15.0
"""Far above the seconds that a start may take, and far below for ever."""


async def serve_own_engine(deployment: Deployment, block_size: int) -> None:
    """A worker as a user writes one: a handler, and a publisher of its KV events."""
    runtime = await deployment.open_runtime()
    endpoint = runtime.endpoint(str(WORKERS))
    events = KvEventPublisher(endpoint, kv_block_size=block_size)

    async def generate(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        tokens = request["token_ids"]
        whole = len(tokens) // block_size
        names = [hash(tuple(tokens[: (i + 1) * block_size])) for i in range(whole)]
        events.publish_stored(tokens, [block_size] * whole, names)
        yield {"token_ids": [1], "finish_reason": "stop"}

    await endpoint.start_serving(generate)


async def test_router_learns_block_size_from_kv_events(deployment: Deployment) -> None:
    await serve_own_engine(deployment, 4)
    async with asyncio.timeout(START_S):
        router, _ = await deployment.router()
    await until(lambda: router.block_size == 4)
    assert [item async for item in await router.generate({"token_ids": PROMPT}, False)]
    assert router.indexer is not None
    index = router.indexer.index
    await until(lambda: sum(index.block_counts().values()) == 5)
    assert (await router.best_worker(PROMPT)).matched.device == 5


async def test_router_starts_before_its_first_worker(deployment: Deployment) -> None:
    async with asyncio.timeout(START_S):
        router, _ = await deployment.router()
    with pytest.raises(NoInstances):
        await router.generate({"token_ids": PROMPT}, False)
    await serve_own_engine(deployment, 8)
    await until(router.instance_ids)
    assert [item async for item in await router.generate({"token_ids": PROMPT}, False)]
    await until(lambda: router.block_size == 8)
    assert router.state().block_size == 8


async def test_router_starts_before_workers_without_events(deployment: Deployment) -> None:
    runtime = await deployment.open_runtime()

    async def generate(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        yield {"token_ids": request["token_ids"][:1], "finish_reason": "stop"}

    await runtime.endpoint(str(WORKERS)).start_serving(generate)
    for use_kv_events in (True, False):
        async with asyncio.timeout(START_S):
            router, _ = await deployment.router(use_kv_events=use_kv_events)
        answer = await router.generate({"token_ids": PROMPT}, False)
        assert [item["token_ids"] async for item in answer] == [[0]]
        assert router.block_size == 16


async def test_router_takes_later_cards_block_size(deployment: Deployment) -> None:
    router, _ = await deployment.router(use_kv_events=False)
    await deployment.worker(block_size=32)
    await until(lambda: router.block_size == 32)
    assert (await router.best_worker(list(range(64)))).cost == 4  # two blocks to read, and to hold


async def test_kv_events_of_another_block_size_are_warned_of(
    deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    await serve_own_engine(deployment, 4)
    await deployment.router(kv_cache_block_size=16)
    await until(lambda: any("has KV blocks of 4 tokens" in message for message in caplog.messages))
