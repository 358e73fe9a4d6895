"""A deployment whose services are all in this process, each with a runtime of its own, on a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from dynamo_redis.config import FrontendSettings, MockEngineSettings
from dynamo_redis.engines.base import Engine
from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.engines.mock.embedding import MockEmbeddingEngine
from dynamo_redis.engines.mock.engine import MockEngine
from dynamo_redis.engines.worker import serve_engine
from dynamo_redis.frontend.http.server import serve_frontend
from dynamo_redis.models.card import ModelKind
from dynamo_redis.models.directory import ModelDirectory, read_model_directory
from dynamo_redis.models.llm_protocol import GenerateItem, GenerateRequest
from dynamo_redis.planes.context import Context
from dynamo_redis.runtime import DistributedRuntime


class NotingEngine(MockEngine):
    """A mock engine that records its requests."""

    def __init__(self, settings: MockEngineSettings, model: ModelDirectory) -> None:
        super().__init__(settings, model)
        self.requests: list[GenerateRequest] = []

    def generate(self, request: GenerateRequest, context: Context) -> AsyncGenerator[GenerateItem]:
        self.requests.append(request)
        return super().generate(request, context)

    @property
    def asked_for(self) -> list[str]:
        """The models of its requests."""
        return [request["model"] for request in self.requests]


@dataclass
class Process:
    """A service in a runtime of its own."""

    runtime: DistributedRuntime
    serving: asyncio.Task[None]

    async def end(self) -> None:
        self.runtime.shutdown()
        try:
            await self.serving
        finally:
            await self.runtime.aclose()


@dataclass
class Deployment:
    """Starts the services of one registry."""

    open_runtime: Callable[[], Awaitable[DistributedRuntime]]
    cache: Path
    processes: list[Process]

    async def worker(
        self,
        name: str = "demo",
        *,
        kind: type[NotingEngine] = NotingEngine,
        migration_limit: int = 0,
        context_length: int | None = None,
        **engine: Any,
    ) -> NotingEngine:
        model = read_model_directory(DEMO_MODEL_PATH, context_length=context_length)
        mock = kind(MockEngineSettings.load(**{"speedup_ratio": 0, **engine}), model)
        await self.serve(mock, model, name, migration_limit=migration_limit)
        return mock

    async def embedding_worker(self, name: str = "vectors", **settings: Any) -> MockEmbeddingEngine:
        model = read_model_directory(DEMO_MODEL_PATH)
        engine = MockEmbeddingEngine(MockEngineSettings.load(**{"speedup_ratio": 0, **settings}), model)
        await self.serve(engine, model, name, model_type="embedding")
        return engine

    async def serve(
        self,
        engine: Engine,
        model: ModelDirectory,
        name: str,
        *,
        migration_limit: int = 0,
        model_type: ModelKind | None = None,
    ) -> None:
        """Serve an engine in a runtime of its own."""
        runtime = await self.open_runtime()
        ready = asyncio.Event()
        serving = asyncio.create_task(
            serve_engine(
                runtime,
                engine,
                model,
                endpoint="dynamo.backend.generate",
                model_name=name,
                model_type=model_type,
                migration_limit=migration_limit,
                on_ready=lambda _: ready.set(),
            )
        )
        await self._started(runtime, serving, ready)

    async def frontend(self, on_grpc_ready: Callable[[int], None] | None = None, /, **settings: Any) -> str:
        runtime = await self.open_runtime()
        ready = asyncio.Event()
        urls: list[str] = []

        def on_ready(url: str) -> None:
            urls.append(url)
            ready.set()

        given = {"http_host": "127.0.0.1", "http_port": 0, "model_cache": self.cache, **settings}
        serving = asyncio.create_task(
            serve_frontend(
                runtime, FrontendSettings.load(**given), on_ready=on_ready, on_grpc_ready=on_grpc_ready
            )
        )
        await self._started(runtime, serving, ready)
        return urls[0]

    async def _started(
        self, runtime: DistributedRuntime, serving: asyncio.Task[None], ready: asyncio.Event
    ) -> None:
        self.processes.append(Process(runtime, serving))
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if serving.done():
            await serving


async def until_healthy(url: str, instances: int = 1) -> dict[str, Any]:
    async with httpx.AsyncClient() as http, asyncio.timeout(30):
        while True:
            response = await http.get(f"{url}/health")
            body: dict[str, Any] = response.json()
            if len(body["instances"]) == instances:
                assert response.status_code == (200 if instances else 503)
                return body
            await asyncio.sleep(0.02)
