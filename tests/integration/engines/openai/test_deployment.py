"""A whole deployment: frontend, router, worker, and an engine with an HTTP server and KV events of its
own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynamo_redis.config import FrontendSettings, OpenAIEngineSettings, RouterSettings
from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.engines.openai.engine import OpenAIEngine
from dynamo_redis.engines.worker import serve_engine
from dynamo_redis.events.block_hashes import chain, local_hashes
from dynamo_redis.frontend.http.server import serve_frontend
from dynamo_redis.models.directory import read_model_directory
from dynamo_redis.router.base import Worker
from dynamo_redis.router.index.indexer import Indexer
from dynamo_redis.runtime import DistributedRuntime, ejection
from dynamo_redis.wire.kv_event import DEVICE
from tests.integration.engines.conftest import ENDPOINT, Deployment
from tests.integration.engines.openai_engine import TestEngine, restarted

Ready = Callable[[str], None]

LONG = "Tell me of the river, the lighthouse and the clockmaker's daughter. " * 8


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


class Services:
    """Workers, a frontend and an index over one Redis, each in its own runtime."""

    def __init__(self, deployment: Deployment, stack: AsyncExitStack, cache: Path) -> None:
        self._deployment = deployment
        self._stack = stack
        self._cache = cache

    async def engine(self, **options: Any) -> TestEngine:
        engine = TestEngine(**{"block_size": 4, "total_kv_blocks": 400} | options)
        self._stack.push_async_callback(engine.stop)
        await engine.start()
        return engine

    async def worker(self, engine: TestEngine, *, replay: bool = True) -> DistributedRuntime:
        model = read_model_directory(DEMO_MODEL_PATH)
        settings = OpenAIEngineSettings(
            engine_url=engine.url,
            engine_poll_interval_s=0.05,
            kv_events_endpoint=engine.events[0].endpoint,
            kv_replay_endpoint=engine.events[0].replay_endpoint if replay else None,
        )
        return await self._serve(
            lambda runtime, ready: serve_engine(
                runtime,
                OpenAIEngine(settings, model),
                model,
                endpoint=ENDPOINT,
                model_name="demo",
                on_ready=ready,
            )
        )

    async def frontend(self) -> httpx.AsyncClient:
        urls: list[str] = []
        settings = FrontendSettings.load(
            http_host="127.0.0.1", http_port=0, router_mode="kv", model_cache=self._cache
        )

        def serve(runtime: DistributedRuntime, ready: Ready) -> Coroutine[Any, Any, None]:
            def on_ready(url: str) -> None:
                urls.append(url)
                ready(url)

            return serve_frontend(runtime, settings, RouterSettings.load(), on_ready=on_ready)

        await self._serve(serve)
        client = httpx.AsyncClient(base_url=urls[0], timeout=30)
        await self._stack.enter_async_context(client)
        async with asyncio.timeout(30):
            while not (await client.get("/v1/models")).json()["data"]:
                await asyncio.sleep(0.01)
        return client

    async def index(self) -> Indexer:
        runtime = await self._stack.enter_async_context(self._deployment.runtime())
        await runtime.start()
        indexer = Indexer(runtime, "dynamo", "backend", RouterSettings.load(), router_id="the-test")
        self._stack.push_async_callback(indexer.aclose)
        await indexer.start()
        return indexer

    async def _serve(
        self, serve: Callable[[DistributedRuntime, Ready], Coroutine[Any, Any, None]]
    ) -> DistributedRuntime:
        runtime = await self._stack.enter_async_context(self._deployment.runtime())
        ready = asyncio.Event()
        serving = asyncio.create_task(serve(runtime, lambda _: ready.set()))

        async def end() -> None:
            runtime.shutdown()
            await asyncio.wait([serving])

        self._stack.push_async_callback(end)
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait((serving, waiting), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if serving.done():
            await serving
        return runtime


@pytest.fixture
async def services(deployment: Deployment, tmp_path: Path) -> AsyncIterator[Services]:
    async with AsyncExitStack() as stack:
        yield Services(deployment, stack, tmp_path / "models")


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
        ((429, "slow down"), 429, "rate_limited"),
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
