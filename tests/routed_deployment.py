"""Workers, routers and frontends of one registry, each in a runtime of its own, in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest

from dynamo_redis.config import FrontendSettings, MockEngineSettings, RouterSettings
from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.engines.mock.engine import MockEngine
from dynamo_redis.engines.worker import serve_engine
from dynamo_redis.frontend.http.server import serve_frontend
from dynamo_redis.models.directory import ModelDirectory, read_model_directory
from dynamo_redis.models.llm_protocol import GenerateItem, GenerateRequest
from dynamo_redis.names import EndpointName
from dynamo_redis.planes.context import Context
from dynamo_redis.router.kv_router import KvRouter
from dynamo_redis.runtime import DistributedRuntime, Settings
from tests.frontend_deployment import Process

WORKERS = EndpointName("dynamo", "backend", "generate")


class NotingEngine(MockEngine):
    """Counts its requests, and holds answers back while `gate` is closed."""

    def __init__(self, settings: MockEngineSettings, model: ModelDirectory) -> None:
        super().__init__(settings, model)
        self.request_count = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def generate(self, request: GenerateRequest, context: Context) -> AsyncGenerator[GenerateItem]:
        self.request_count += 1
        await self.gate.wait()
        async for item in super().generate(request, context):
            yield item


class FailingEngine(NotingEngine):
    """A mock engine that fails in the middle of its next answer, if a failure is set."""

    failure: ClassVar[Exception | None] = None

    async def generate(self, request: GenerateRequest, context: Context) -> AsyncGenerator[GenerateItem]:
        count = 0
        async for item in super().generate(request, context):
            yield item
            count += 1
            if count == 5 and (failure := FailingEngine.failure) is not None:
                FailingEngine.failure = None
                raise failure


@dataclass
class Worker:
    """A mock worker and its engine."""

    engine: NotingEngine
    process: Process

    @property
    def instance_id(self) -> int:
        return self.process.runtime.instance_id


@dataclass
class Deployment:
    """Starts the services of one registry."""

    open_runtime: Callable[..., Awaitable[DistributedRuntime]]
    cache: Path
    closing: AsyncExitStack
    processes: list[Process] = field(default_factory=list)

    async def worker(
        self,
        runtime_settings: dict[str, Any] | None = None,
        *,
        model_name: str = "demo",
        kind: type[NotingEngine] | None = None,
        **engine: Any,
    ) -> Worker:
        runtime = await self.open_runtime(**(runtime_settings or {}))
        model = read_model_directory(DEMO_MODEL_PATH)
        noting = (kind or NotingEngine)(MockEngineSettings.load(**{"speedup_ratio": 0, **engine}), model)
        ready = asyncio.Event()
        serving = serve_engine(
            runtime,
            noting,
            model,
            endpoint=str(WORKERS),
            model_name=model_name,
            on_ready=lambda _: ready.set(),
        )
        return Worker(noting, await self._started(runtime, serving, ready))

    async def router(
        self, runtime_settings: dict[str, Any] | None = None, **settings: Any
    ) -> tuple[KvRouter, DistributedRuntime]:
        """Start a router alone, without a service around it."""
        runtime = await self.open_runtime(**(runtime_settings or {}))
        router = KvRouter(runtime, WORKERS, RouterSettings.load(**settings))
        await self.closing.enter_async_context(router)
        return router, runtime

    async def frontend(
        self, runtime_settings: dict[str, Any] | None = None, *, mode: str = "kv", **settings: Any
    ) -> httpx.AsyncClient:
        """Start a frontend that serves the demo model; the settings are its own and its router's."""
        runtime = await self.open_runtime(**(runtime_settings or {}))
        ready = asyncio.Event()
        urls: list[str] = []

        def on_ready(url: str) -> None:
            urls.append(url)
            ready.set()

        given = {"http_host": "127.0.0.1", "http_port": 0, "model_cache": self.cache, "router_mode": mode}
        own = {name: value for name, value in settings.items() if name in FrontendSettings.model_fields}
        routers = {name: value for name, value in settings.items() if name in RouterSettings.model_fields}
        assert own.keys() | routers.keys() == settings.keys()
        serving = serve_frontend(
            runtime, FrontendSettings.load(**given, **own), RouterSettings.load(**routers), on_ready=on_ready
        )
        await self._started(runtime, serving, ready)
        return await self.closing.enter_async_context(httpx.AsyncClient(base_url=urls[0], timeout=20))

    async def _started(self, runtime: DistributedRuntime, coroutine: Any, ready: asyncio.Event) -> Process:
        process = Process(runtime, asyncio.create_task(coroutine))
        self.processes.append(process)
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait({process.serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if process.serving.done():
            await process.serving
        return process


@pytest.fixture
async def deployment(
    dynamo_redis_url: str, dynamo_redis_prefix: str, tmp_path: Path
) -> AsyncIterator[Deployment]:
    FailingEngine.failure = None
    executor = ThreadPoolExecutor(4)
    asyncio.get_running_loop().set_default_executor(executor)
    async with AsyncExitStack() as ending:

        async def open_runtime(**overrides: Any) -> DistributedRuntime:
            given: dict[str, Any] = {
                "redis_url": dynamo_redis_url,
                "prefix": dynamo_redis_prefix,
                "drain_s": 1,
            }
            given["command_timeout_s"] = 15  # all services share this process, on a machine that may be busy
            given |= overrides
            return await ending.enter_async_context(DistributedRuntime(settings=Settings.load(**given)))

        async with AsyncExitStack() as closing:
            deployment = Deployment(open_runtime, tmp_path / "cache", closing)
            yield deployment
        for process in reversed(deployment.processes):
            await process.end()
    executor.shutdown()
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(4))


async def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds; the test's own time-out bounds the wait."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def until_served(*frontends: httpx.AsyncClient, instances: int = 1) -> None:
    """Wait until each frontend can reach all workers."""
    async with asyncio.timeout(20):
        for frontend in frontends:
            while len((await frontend.get("/health")).json()["instances"]) != instances:
                await asyncio.sleep(0.02)
