"""A whole deployment: frontend, router, worker, and an engine with an HTTP server and KV events of its
own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynamo_redis.config import FrontendSettings, OpenAIEngineSettings, RouterSettings
from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.engines.openai.engine import OpenAIEngine
from dynamo_redis.engines.worker import serve_engine
from dynamo_redis.frontend.http.server import serve_frontend
from dynamo_redis.models.directory import read_model_directory
from dynamo_redis.router.index.indexer import Indexer
from dynamo_redis.runtime import DistributedRuntime
from tests.integration.engines.conftest import ENDPOINT, Deployment
from tests.integration.engines.openai_engine import TestEngine

Ready = Callable[[str], None]


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

    async def worker(
        self,
        engine: TestEngine,
        *,
        replay: bool = True,
        model_path: Path = DEMO_MODEL_PATH,
        modalities: str | None = None,
        migration_limit: int = 0,
    ) -> DistributedRuntime:
        model = read_model_directory(model_path)
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
                modalities=modalities,
                migration_limit=migration_limit,
                on_ready=ready,
            )
        )

    async def frontend(self, **options: Any) -> httpx.AsyncClient:
        urls: list[str] = []
        settings = FrontendSettings.load(
            http_host="127.0.0.1", http_port=0, router_mode="kv", model_cache=self._cache, **options
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
