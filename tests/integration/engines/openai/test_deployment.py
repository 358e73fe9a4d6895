"""Chats through a whole deployment to an engine: its cache, its end, its refusals."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from dynamo_redis.events.block_hashes import chain, local_hashes
from dynamo_redis.router.base import Worker
from dynamo_redis.router.index.indexer import Indexer
from dynamo_redis.runtime import DistributedRuntime, ejection
from dynamo_redis.wire.kv_event import DEVICE
from tests.integration.engines.conftest import ENDPOINT
from tests.integration.engines.openai.conftest import Services
from tests.integration.engines.openai_engine import restarted

Ready = Callable[[str], None]

LONG = "Tell me of the river, the lighthouse and the clockmaker's daughter. " * 8


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def body(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": text}], "max_tokens": 8} | more


async def chat(frontend: httpx.AsyncClient, text: str, **more: Any) -> dict[str, Any]:
    response = await frontend.post("/v1/chat/completions", json=body(text, **more))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@asynccontextmanager
async def streaming(frontend: httpx.AsyncClient, text: str) -> AsyncIterator[AsyncIterator[str]]:
    wanted = body(text, stream=True, max_tokens=5000, ignore_eos=True)
    async with frontend.stream("POST", "/v1/chat/completions", json=wanted) as response:
        assert response.status_code == 200
        yield response.aiter_lines()


def held(indexer: Indexer, worker: DistributedRuntime) -> set[int]:
    return indexer.index.blocks_of(Worker(worker.instance_id)).get(DEVICE, set())


async def test_chats_follow_their_prefix_and_the_index_is_exact(services: Services) -> None:
    engines = [await services.engine() for _ in range(2)]
    workers = [await services.worker(engine) for engine in engines]
    frontend = await services.frontend()
    indexer = await services.index()

    first = await chat(frontend, LONG)
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    await until(lambda: any(held(indexer, worker) for worker in workers))
    for number in range(3):
        again = await chat(frontend, f"{LONG} And then {number}?")
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 50
    assert sorted(len(engine.requests) for engine in engines) == [0, 4]

    chats = [chat(frontend, f"{number} {LONG * 2}", max_tokens=50) for number in range(16)]
    await asyncio.gather(*chats)  # concurrent, so that both workers get some; and enough for evictions
    await until(
        lambda: all(
            held(indexer, worker) == engine.mock.cache.stored()
            for engine, worker in zip(engines, workers, strict=True)
        )
    )
    assert all(engine.mock.cache.stored() for engine in engines)
    cleared = await frontend.post("/clear_kv_blocks", json={})
    assert cleared.status_code == 200
    await until(lambda: not any(held(indexer, worker) for worker in workers))
    assert not any(engine.mock.cache.stored() for engine in engines)


async def test_client_that_disconnects_ends_the_engines_request(services: Services) -> None:
    engine = await services.engine(speedup_ratio=1)
    await services.worker(engine)
    frontend = await services.frontend()
    async with streaming(frontend, "Hello!") as lines:
        seen = 0
        async for line in lines:
            seen += '"content":' in line
            if seen == 3:
                break
        assert engine.mock.running_count == 1
    await until(lambda: not engine.mock.running_count)


async def test_engine_is_killed_and_comes_back(services: Services) -> None:
    engines = [await services.engine() for _ in range(2)]
    workers = [await services.worker(engine) for engine in engines]
    frontend = await services.frontend()
    indexer = await services.index()
    await chat(frontend, LONG)
    await until(lambda: any(held(indexer, worker) for worker in workers))
    place = 0 if held(indexer, workers[0]) else 1

    await engines[place].stop()
    for number in range(3):  # the prefix is there, but its engine does not answer
        await chat(frontend, f"{LONG} {number}")
    assert len(engines[1 - place].requests) == 3
    endpoint = workers[place].endpoint(ENDPOINT)
    client = await endpoint.client()
    await until(lambda: client.instance_ids() == [workers[1 - place].instance_id])

    async with restarted(engines[place], block_size=4, total_kv_blocks=400) as another:
        await until(lambda: workers[place].instance_id in client.instance_ids())
        await asyncio.gather(*[chat(frontend, f"Something new, {number}") for number in range(16)])
        assert another.requests
        await until(lambda: held(indexer, workers[place]) == another.mock.cache.stored())


async def test_worker_learns_a_warm_engines_cache_from_chats(services: Services) -> None:
    """Without replay no event has the blocks of the prefix that all prompts share."""
    engine = await services.engine()
    first = await services.worker(engine)
    frontend = await services.frontend()
    indexer = await services.index()
    await chat(frontend, LONG)
    await until(lambda: held(indexer, first))
    first.shutdown()
    await until(lambda: not held(indexer, first))

    second = await services.worker(engine, replay=False)

    def known() -> bool:
        names = set(chain(local_hashes(engine.requests[-1]["prompt"], 4)))
        return names <= held(indexer, second)

    async with asyncio.timeout(30):
        number = 0
        while not (len(engine.requests) > 1 and known()):
            number += 1  # the subscription takes effect some time after it was made
            response = await frontend.post(
                "/v1/chat/completions",
                json=body(f"{LONG} Now write {number} lines about the {number}th boat."),
            )
            if response.status_code == 200:  # until then the frontend has not seen the second worker
                await asyncio.sleep(0.05)
    assert held(indexer, second) <= engine.mock.cache.stored()
    again = await chat(frontend, LONG)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 50


async def listed_context(frontend: httpx.AsyncClient) -> int:
    (model,) = (await frontend.get("/v1/models")).json()["data"]
    return int(model["max_model_len"])


async def test_card_is_updated_when_another_engine_comes_back(services: Services) -> None:
    engine = await services.engine(max_model_len=700)
    await services.worker(engine)
    frontend = await services.frontend()
    assert await listed_context(frontend) == 700
    await engine.stop()
    async with restarted(engine, name="another", max_model_len=300, block_size=4, total_kv_blocks=400):
        async with asyncio.timeout(60):
            while await listed_context(frontend) != 300:
                await asyncio.sleep(0.05)
        async with asyncio.timeout(60):
            while (await frontend.post("/v1/chat/completions", json=body("Hello!"))).status_code != 200:
                await asyncio.sleep(0.05)


async def test_usage_has_the_engines_counts(services: Services) -> None:
    engine = await services.engine()
    engine.counted = {"prompt_tokens": 1234, "completion_tokens": 56}
    await services.worker(engine)
    frontend = await services.frontend()
    usage = (await chat(frontend, "Hello!"))["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (1234, 56, 1290)
    usage = (await chat(frontend, "Hello!", n=2))["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (1234, 112)


@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        ((429, "slow down"), 429, "rate_limit_exceeded"),
        ((400, "maximum context length is 8 tokens"), 400, "context_length_exceeded"),
        ((500, "out of memory"), 502, "engine_failed"),
    ],
)
async def test_refusals_of_the_engine_reach_the_client(
    services: Services, refusal: tuple[int, str], status: int, code: str
) -> None:
    engine = await services.engine()
    await services.worker(engine)
    frontend = await services.frontend()
    engine.refuse_with = refusal
    response = await frontend.post("/v1/chat/completions", json=body("Hello!"))
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.headers.get("retry-after") == ("7" if status == 429 else None)


async def test_unary_chat_is_sent_again_when_its_engine_dies(services: Services) -> None:
    engines = [await services.engine() for _ in range(2)]
    for engine in engines:
        engine.break_off_after = 3
        engine.break_off_count = 1
        await services.worker(engine)
    frontend = await services.frontend()
    answer = await chat(frontend, LONG, max_tokens=20, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 20
    assert sum(engine.break_off_count for engine in engines) < 2
    assert sum(len(engine.requests) for engine in engines) > 1


async def test_failing_engine_is_ejected(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its health is good, its load is low, and its cache even has the prompt."""
    monkeypatch.setattr(ejection, "PAUSE_S", (600.0, 600.0))
    engines = [await services.engine() for _ in range(2)]
    for engine in engines:
        await services.worker(engine)
    frontend = await services.frontend()
    await chat(frontend, LONG)
    failing, other = sorted(engines, key=lambda engine: len(engine.requests), reverse=True)
    failing.refuse_with = (500, "out of memory")
    for number in range(30):
        await chat(frontend, f"{LONG} {number}")
    assert len(failing.requests) <= 1 + ejection.FAILURE_COUNT
    assert len(other.requests) == 30

    other.refuse_with = (401, "who are you?")  # the last instance is never ejected
    for _ in range(ejection.FAILURE_COUNT + 1):
        response = await frontend.post("/v1/chat/completions", json=body("Hello!"))
        assert response.status_code == 502
    other.refuse_with = None
    await chat(frontend, LONG)
