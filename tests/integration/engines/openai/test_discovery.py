"""`dynamo-redis worker openai` asks its engine where the KV events are: real HTTP, real ZeroMQ, a real
process."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from dynamo_redis.router.base import Worker
from dynamo_redis.router.index.indexer import Indexer
from dynamo_redis.wire.kv_event import DEVICE
from tests.integration.engines.conftest import ENDPOINT, Deployment
from tests.integration.engines.kv_event_server import KvEventServer, block_stored
from tests.integration.engines.openai.conftest import Services
from tests.integration.engines.openai.test_cli import worker
from tests.integration.engines.openai_engine import TestEngine

SIZES: dict[str, Any] = {"block_size": 4, "total_kv_blocks": 400}
WITHIN_S = 60


def vllm_sources(engine: TestEngine, **changes: Any) -> dict[str, Any]:
    """Return the answer of vLLM, with the endpoints that it binds, for the ranks of that engine."""
    return {
        "sources": [
            {
                "data_parallel_rank": rank,
                "endpoint": f"tcp://0.0.0.0:{server.port}",
                "replay_endpoint": f"tcp://*:{server.replay_port}",
                "topic": "",
            }
            | changes
            for rank, server in enumerate(engine.events)
        ]
    }


class Log:
    """The log of a process, read while it runs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        self.text = ""
        self._stderr = process.stderr
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while line := await self._stderr.readline():
            self.text += line.decode()

    async def aclose(self) -> None:
        self._reading.cancel()
        await asyncio.wait([self._reading])


async def until(condition: Callable[[], object], log: Log) -> None:
    try:
        async with asyncio.timeout(WITHIN_S):
            while not condition():
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(log.text) from None


@asynccontextmanager
async def serving(
    engine: TestEngine, redis_url: str, prefix: str, *options: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, Log]]:
    """Run the command until its model is served."""
    async with worker(engine.url, redis_url, prefix, *options) as process:
        log = Log(process)
        try:
            assert process.stdout is not None
            async with asyncio.timeout(WITHIN_S):
                line = await process.stdout.readline()
            assert line.startswith(b"ready demo"), log.text
            yield process, log
        finally:
            await log.aclose()


@asynccontextmanager
async def caller(deployment: Deployment) -> AsyncIterator[Any]:
    async with deployment.runtime() as runtime:
        client = await runtime.endpoint(ENDPOINT).client()
        await client.wait_for_instances()
        yield client


async def send(client: Any, first: int, dp_rank: int | None = None) -> None:
    request: dict[str, Any] = {
        "model": "demo",
        "token_ids": list(range(first, first + 20)),
        "stop_conditions": {"max_tokens": 4, "ignore_eos": True},
        "sampling_options": {},
        "eos_token_ids": [],
    }
    if dp_rank is not None:
        request["dp_rank"] = dp_rank
    async for _ in await client.round_robin(request):
        pass


def held(indexer: Indexer, instance_id: int, dp_rank: int = 0) -> set[int]:
    return indexer.index.blocks_of(Worker(instance_id, dp_rank)).get(DEVICE, set())


def follows(
    indexer: Indexer, instance_id: int, truth: Callable[[], set[int]], dp_rank: int = 0
) -> Callable[[], bool]:
    """Return the condition that the index has the blocks that the engine's cache holds, and some."""
    return lambda: bool(truth()) and held(indexer, instance_id, dp_rank) == truth()


async def test_ranks_of_vllm_are_found_without_flags(
    services: Services, deployment: Deployment, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    """Each rank has ports of its own, far from those of the others: no flag could say them."""
    engine = await services.engine(**SIZES, data_parallel_size=2)
    engine.described = {"/kv_event_sources": vllm_sources(engine)}
    async with (
        serving(engine, dynamo_redis_url, dynamo_redis_prefix) as (_, log),
        caller(deployment) as client,
    ):
        indexer = await services.index()
        (instance_id,) = client.instance_ids()
        await send(client, 100, 0)
        await send(client, 200, 1)
        for rank in engine.mock.ranks:
            await until(follows(indexer, instance_id, rank.cache.stored, rank.dp_rank), log)
        assert "publishes the KV events of 2 ranks" in log.text
        assert any(server.replay_requests for server in engine.events)


async def test_page_size_and_ports_of_sglang_are_found(
    services: Services, deployment: Deployment, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    engine = await services.engine(**SIZES, owner="sglang")
    engine.says_sizes = False
    config = json.dumps({"publisher": "zmq", "endpoint": f"tcp://*:{engine.events[0].port}"})
    # Older versions have the other path only.
    engine.described = {"/get_server_info": {"page_size": 4, "dp_size": 1, "kv_events_config": config}}
    async with (
        serving(engine, dynamo_redis_url, dynamo_redis_prefix) as (_, log),
        caller(deployment) as client,
    ):
        indexer = await services.index()
        (instance_id,) = client.instance_ids()
        await send(client, 100)
        await until(follows(indexer, instance_id, engine.mock.cache.stored), log)


async def test_restarted_engine_is_asked_again(
    services: Services, deployment: Deployment, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    """It publishes at other ports than before; and one that begins to publish is followed."""
    engine = await services.engine(**SIZES)
    engine.described = {"/kv_event_sources": []}
    async with (
        serving(engine, dynamo_redis_url, dynamo_redis_prefix) as (_, log),
        caller(deployment) as client,
    ):
        await until(lambda: "publishes no KV events" in log.text, log)
        indexer = await services.index()
        (instance_id,) = client.instance_ids()
        for first in (100, 200):
            async with restarted_elsewhere(engine) as another:
                await until(functools.partial(has_asked, another), log)
                await until(lambda: client.instance_ids() == [instance_id], log)
                await send(client, first)
                await until(follows(indexer, instance_id, another.mock.cache.stored), log)
                engine = another


def has_asked(engine: TestEngine) -> bool:
    return bool(engine.described_count)


@asynccontextmanager
async def restarted_elsewhere(engine: TestEngine) -> AsyncIterator[TestEngine]:
    """Kill the engine; start another at its HTTP port, with event sockets at other ports."""
    port = engine.http_port
    await engine.stop()
    another = TestEngine(**SIZES)
    try:
        await another.start(http_port=port)
        another.described = {"/kv_event_sources": vllm_sources(another)}
        yield another
    finally:
        await another.stop()


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({}, "--kv-events-endpoint"),
        ({"/kv_event_sources": b"<html>"}, "is refused: it is no JSON"),
        ({"/kv_event_sources": [{"data_parallel_rank": "0"}]}, "is no rank"),
        (
            {"/kv_event_sources": [{"data_parallel_rank": 0, "endpoint": "tcp://192.0.2.1:1"}]},
            "engine's host",
        ),
        ({"/kv_event_sources": b"[" + b"1," * (1 << 20) + b"1]"}, "more than 1048576 bytes"),
    ],
)
async def test_engines_without_an_answer_are_served_and_named_once(
    services: Services,
    deployment: Deployment,
    dynamo_redis_url: str,
    dynamo_redis_prefix: str,
    described: dict[str, Any],
    said: str,
) -> None:
    engine = await services.engine(**SIZES)
    engine.described = described
    async with (
        serving(engine, dynamo_redis_url, dynamo_redis_prefix) as (_, log),
        caller(deployment) as client,
    ):
        await until(lambda: said in log.text, log)
        await send(client, 100)
        engine.described_count = 0
        engine.fail_with = (503, {})
        await until(lambda: not client.instance_ids(), log)
        engine.fail_with = None  # asked again when it is back
        await until(lambda: engine.described_count and client.instance_ids(), log)
        assert log.text.count(said) == 1


async def test_flags_override_the_answer(
    services: Services, deployment: Deployment, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    """With a flag the engine is not asked; with discovery off it is not, either."""
    engine = await services.engine(**SIZES)
    engine.described = {"/kv_event_sources": vllm_sources(engine, endpoint="tcp://*:9")}
    endpoint = engine.events[0].endpoint
    async with (
        serving(engine, dynamo_redis_url, dynamo_redis_prefix, "--kv-events-endpoint", endpoint) as (_, log),
        caller(deployment) as client,
    ):
        indexer = await services.index()
        (instance_id,) = client.instance_ids()
        await send(client, 100)
        await until(follows(indexer, instance_id, engine.mock.cache.stored), log)
    async with serving(engine, dynamo_redis_url, dynamo_redis_prefix, "--kv-events-discovery", "off"):
        assert not engine.described_count


async def test_topic_of_the_answer_is_subscribed(
    services: Services, deployment: Deployment, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    engine = await services.engine(**SIZES)
    other = KvEventServer(topic="kv-events")
    try:
        engine.described = {
            "/kv_event_sources": vllm_sources(
                engine, endpoint=other.endpoint, replay_endpoint=None, topic="kv-events"
            )
        }
        async with (
            serving(engine, dynamo_redis_url, dynamo_redis_prefix) as (_, log),
            caller(deployment) as client,
        ):
            indexer = await services.index()
            (instance_id,) = client.instance_ids()

            def arrived() -> bool:  # a subscription takes effect after a while
                other.publish([block_stored([7], None, [1, 2, 3, 4])])
                return bool(held(indexer, instance_id))

            await until(arrived, log)
    finally:
        await other.aclose()
