"""pytest fixtures for users of this package. pytest loads them once `dynamo-redis[testing]` is installed.

    dynamo_redis_server          a Redis or Valkey for the whole session: its `url` and its `source`
    dynamo_redis_url             its URL
    dynamo_redis_prefix          the prefix of a registry of the test's own
    dynamo_runtime               a started runtime in that registry
    dynamo_runtime_factory       `await dynamo_runtime_factory(**settings)`: further runtimes
    dynamo_mock_worker           a worker that serves the demo model with the mock engine, without delays
    dynamo_mock_worker_factory   `await dynamo_mock_worker_factory(**settings)`: further workers

All end with the test. The last four run on the test's event loop, with anyio's plugin and with
pytest-asyncio. docs/testing.md has examples and the options.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from dynamo_redis.testing.event_loops import (
    dynamo_asyncio_backend,
    on_the_tests_loop,
    pytest_pycollect_makeitem,
)
from dynamo_redis.testing.sources import SessionRedis, run_apart, session_redis

# pytest loads the plugin in every run where the package is installed: slow modules are imported by the
# fixtures.
if TYPE_CHECKING:
    from dynamo_redis.runtime.runtime import DistributedRuntime

__all__ = [
    "MockWorker",
    "MockWorkerFactory",
    "RuntimeFactory",
    "SessionRedis",
    "dynamo_asyncio_backend",
    "dynamo_mock_worker",
    "dynamo_mock_worker_factory",
    "dynamo_redis_prefix",
    "dynamo_redis_server",
    "dynamo_redis_url",
    "dynamo_runtime",
    "dynamo_runtime_factory",
    "pytest_addoption",
    "pytest_pycollect_makeitem",
]

_LOOPBACK = "127.0.0.1"
_DRAIN_S = 2.0


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the settings `DYN_TEST_…`."""
    group = parser.getgroup("dynamo-redis")
    group.addoption(
        "--dynamo-redis",
        metavar="SOURCE",
        help="the tests' Redis: auto, container, path, wheel or a URL (default: DYN_TEST_REDIS, or auto)",
    )
    group.addoption(
        "--dynamo-skip-without-redis",
        action="store_true",
        default=None,
        help="if no Redis is available, skip the tests that need one instead of failing them",
    )


@pytest.fixture(scope="session")
def dynamo_redis_server(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[SessionRedis]:
    """A Redis or Valkey server for the session. Tests share it: give each its `dynamo_redis_prefix`."""
    from dynamo_redis.config import FixtureSettings

    settings = FixtureSettings.load(
        dynamo_redis=pytestconfig.getoption("--dynamo-redis"),
        dynamo_skip_without_redis=pytestconfig.getoption("--dynamo-skip-without-redis"),
    )
    with session_redis(
        settings.dynamo_redis, tmp_path_factory, skips=settings.dynamo_skip_without_redis
    ) as server:
        yield server


@pytest.fixture
def dynamo_redis_url(dynamo_redis_server: SessionRedis, dynamo_redis_prefix: str) -> Iterator[str]:
    """Yield the URL of the session's server."""
    yield dynamo_redis_server.url
    if dynamo_redis_server.source == "url":
        from dynamo_redis.store.registry.erase import erase_prefix

        run_apart(lambda: erase_prefix(dynamo_redis_server.url, dynamo_redis_prefix))


@pytest.fixture
def dynamo_redis_prefix() -> str:
    """Return a registry prefix (`DYN_REDIS_PREFIX`) that no other test has."""
    return f"test-{secrets.token_hex(8)}"


# --------------------------------------------------------------------------- runtimes and workers


@dataclass(frozen=True, slots=True)
class MockWorker:
    """A worker in the test's process. `runtime.shutdown()` ends it, as SIGTERM ends a real worker."""

    runtime: DistributedRuntime
    endpoint: str
    model_name: str

    @property
    def instance_id(self) -> int:
        return self.runtime.instance_id


class RuntimeFactory(Protocol):
    """Makes runtimes that the fixture closes. Settings are fields of any group, `lease_ttl_s=1.0`."""

    async def __call__(self, **settings: Any) -> DistributedRuntime: ...


class MockWorkerFactory(Protocol):
    """Makes workers that the fixture closes. Settings are those of the mock engine, `speedup_ratio=1.0`."""

    async def __call__(
        self, *, endpoint: str = "dynamo.backend.generate", model_name: str | None = None, **settings: Any
    ) -> MockWorker: ...


@on_the_tests_loop(globals())
async def dynamo_runtime_factory(
    dynamo_redis_url: str, dynamo_redis_prefix: str
) -> AsyncIterator[RuntimeFactory]:
    """`await dynamo_runtime_factory(**settings)` makes a started runtime, like that of another process."""
    from dynamo_redis.runtime.runtime import DistributedRuntime, Settings

    async with AsyncExitStack() as runtimes:

        async def make(**settings: Any) -> DistributedRuntime:
            defaults = {
                "redis_url": dynamo_redis_url,
                "prefix": dynamo_redis_prefix,
                "tcp_host": _LOOPBACK,
                "drain_s": _DRAIN_S,
            }
            runtime = DistributedRuntime(settings=Settings.load(**{**defaults, **settings}))
            await runtimes.enter_async_context(runtime)
            return runtime

        yield make


@on_the_tests_loop(globals())
async def dynamo_runtime(dynamo_runtime_factory: RuntimeFactory) -> DistributedRuntime:
    """Return a started runtime in the test's own registry."""
    return await dynamo_runtime_factory()


@on_the_tests_loop(globals())
async def dynamo_mock_worker_factory(
    dynamo_runtime_factory: RuntimeFactory,
) -> AsyncIterator[MockWorkerFactory]:
    """`await dynamo_mock_worker_factory(**settings)` makes a serving worker with a runtime of its own."""
    if find_spec("tokenizers") is None:
        pytest.fail("the mock engine needs dynamo-redis[http], which is not installed", pytrace=False)
    from dynamo_redis.config import MockEngineSettings, ModelSettings
    from dynamo_redis.engines.mock.engine import MockEngine
    from dynamo_redis.engines.worker import open_model, serve_engine

    async with AsyncExitStack() as workers:

        async def make(
            *, endpoint: str = "dynamo.backend.generate", model_name: str | None = None, **settings: Any
        ) -> MockWorker:
            runtime = await dynamo_runtime_factory()
            model, model_name = open_model(ModelSettings.load(model_name=model_name))
            engine = MockEngine(MockEngineSettings.load(**{"speedup_ratio": 0.0, **settings}), model)
            ready = asyncio.Event()
            serving = asyncio.create_task(
                serve_engine(
                    runtime,
                    engine,
                    model,
                    endpoint=endpoint,
                    model_name=model_name,
                    on_ready=lambda _: ready.set(),
                )
            )

            async def end() -> None:
                runtime.shutdown()
                await asyncio.wait((serving,))  # the test got a failure when the worker started

            workers.push_async_callback(end)
            waiting = asyncio.create_task(ready.wait())
            await asyncio.wait((serving, waiting), return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if serving.done():
                serving.result()  # it failed
            return MockWorker(runtime, endpoint, model_name)

        yield make


@on_the_tests_loop(globals())
async def dynamo_mock_worker(dynamo_mock_worker_factory: MockWorkerFactory) -> MockWorker:
    """Return a worker that serves the demo model at `dynamo.backend.generate`, without delays."""
    return await dynamo_mock_worker_factory()
