"""Mock workers and callers on a Redis, each with a runtime of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from dynamo_redis.config import MockEngineSettings
from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.engines.mock.engine import MockEngine
from dynamo_redis.engines.worker import serve_engine
from dynamo_redis.models.directory import read_model_directory
from dynamo_redis.runtime import DistributedRuntime, Settings

ENDPOINT = "dynamo.backend.generate"


@dataclass(slots=True)
class MockWorker:
    """A worker as its process runs it, but in the test's process."""

    runtime: DistributedRuntime
    engine: MockEngine
    serving: asyncio.Task[None]

    async def stop(self) -> None:
        """Shut the worker down, as SIGTERM does."""
        self.runtime.shutdown()
        await self.serving
        await self.runtime.aclose()


class Deployment:
    """Runtimes over one registry prefix."""

    def __init__(self, redis_url: str, prefix: str, **settings: Any) -> None:
        self._settings = {"redis_url": redis_url, "prefix": prefix, "drain_s": 3, **settings}

    @asynccontextmanager
    async def runtime(self) -> AsyncIterator[DistributedRuntime]:
        """Return the runtime of one more process of the deployment."""
        async with DistributedRuntime(settings=Settings.load(**self._settings)) as runtime:
            yield runtime

    @asynccontextmanager
    async def worker(self, *, model_name: str = "demo", **engine: Any) -> AsyncIterator[MockWorker]:
        """Serve a worker until it is stopped, or until the end of the block."""
        model = read_model_directory(DEMO_MODEL_PATH)
        ready = asyncio.Event()
        async with self.runtime() as runtime:
            mock = MockEngine(MockEngineSettings(**{"speedup_ratio": 0, **engine}), model)
            serving = asyncio.create_task(
                serve_engine(
                    runtime,
                    mock,
                    model,
                    endpoint=ENDPOINT,
                    model_name=model_name,
                    on_ready=lambda _: ready.set(),
                )
            )
            waiting = asyncio.create_task(ready.wait())
            try:
                await asyncio.wait((serving, waiting), return_when=asyncio.FIRST_COMPLETED)
                if serving.done():
                    await serving
                yield MockWorker(runtime, mock, serving)
            finally:
                waiting.cancel()
                runtime.shutdown()
                await asyncio.wait([serving])


@pytest.fixture
def deployment(dynamo_redis_url: str, dynamo_redis_prefix: str) -> Deployment:
    return Deployment(dynamo_redis_url, dynamo_redis_prefix)


Deploy = Callable[..., Deployment]


@pytest.fixture
def deploy() -> Deploy:
    """Make a deployment on another server, or with other settings."""
    return Deployment
