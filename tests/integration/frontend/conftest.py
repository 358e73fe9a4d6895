"""A frontend on a loopback port, with a worker that the test scripts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx
import openai
import pytest

from dynamo_redis.config import FrontendSettings
from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.errors import NoInstances
from dynamo_redis.frontend.apis import APIS
from dynamo_redis.frontend.app import make_app
from dynamo_redis.frontend.http.door import Door
from dynamo_redis.frontend.http.port import bind, url_of
from dynamo_redis.frontend.http.server import kserve_apis, kserve_errors, run_server
from dynamo_redis.frontend.kserve.metadata import Metadata
from dynamo_redis.frontend.kserve.server import serving_kserve
from dynamo_redis.frontend.models import LiveModels
from dynamo_redis.frontend.prompts import Preparation
from dynamo_redis.frontend.tokens import Tokenizer
from dynamo_redis.models.directory import read_model_directory
from dynamo_redis.models.llm_protocol import GenerateItem, GenerateRequest
from dynamo_redis.models.upload import make_card, upload_model_files
from dynamo_redis.names import EndpointName, InstanceId
from dynamo_redis.planes.context import Context
from dynamo_redis.router.base import BusyThresholds
from dynamo_redis.runtime import DistributedRuntime, Settings
from dynamo_redis.runtime.discovery import Member
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.store.base import Delete, DeleteCause, LeaseId, Put, Record, Revision, WatchBatch
from dynamo_redis.store.objects.memory import MemoryObjectStore
from tests.frontend_deployment import Deployment

ENDPOINT = EndpointName("dynamo", "backend", "generate")
WINDOW_COUNT = 64
KSERVE_DRAIN_S = 120.0
Script = Callable[[GenerateRequest, Context], AsyncGenerator[Any]]


class FakeCall:
    """An answer that a test wrote. It runs ahead of its reader as a worker does, within a window."""

    instance_id = 1
    resent_count = 0

    def __init__(self, items: AsyncGenerator[Any]) -> None:
        self._arrived: asyncio.Queue[Any] = asyncio.Queue(WINDOW_COUNT)
        self._reading = asyncio.create_task(self._read(items))
        self.is_over = False

    async def _read(self, items: AsyncGenerator[Any]) -> None:
        end: Any = StopAsyncIteration()
        try:
            async for item in items:
                await self._arrived.put(item)
        except Exception as exc:  # noqa: BLE001 - the reader gets it
            end = exc
        finally:
            await items.aclose()
        await self._arrived.put(end)

    async def next_items(self) -> list[Any]:
        """Return the next item and all that have come behind it; nothing at the end."""
        items = [await self._arrived.get()]
        while not self._arrived.empty():
            items.append(self._arrived.get_nowait())
        if isinstance(items[-1], Exception):
            end = items.pop()
            if items:
                self._arrived.put_nowait(end)
            else:
                self.is_over = True
                if not isinstance(end, StopAsyncIteration):
                    raise end
        return items

    async def aclose(self) -> None:
        """Close the generator."""
        self._reading.cancel()
        await asyncio.wait([self._reading])


class FakeWatch:
    """A watch whose batches come from the test."""

    def __init__(self) -> None:
        self.batches: asyncio.Queue[WatchBatch] = asyncio.Queue()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> WatchBatch:
        return await self.batches.get()

    async def aclose(self) -> None:
        pass

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        pass


@dataclass
class FakeRegistry:
    """A registry with a watch only."""

    watching: FakeWatch = field(default_factory=FakeWatch)
    connected: bool = True
    write_refusal: str | None = None

    def watch(self, prefix: str, *, start_revision: Revision | None = None) -> FakeWatch:
        assert start_revision is None
        return self.watching if prefix == "v1/mdc/" else FakeWatch()

    def put(self, key: str, value: bytes) -> None:
        record = Record(key, value, Revision("1-0"), Revision("1-0"), 1, LeaseId(1))
        self.watching.batches.put_nowait(WatchBatch((Put(record),), Revision("1-0")))

    def delete(self, key: str, cause: DeleteCause = DeleteCause.DELETED) -> None:
        self.watching.batches.put_nowait(WatchBatch((Delete(key, Revision("2-0"), cause),), Revision("2-0")))


class Worker:
    """All instances of one endpoint. It answers by `script`, and records its requests."""

    def __init__(self, endpoint: EndpointName, tokenizer: Tokenizer) -> None:
        self.endpoint = endpoint
        self.tokenizer = tokenizer
        self.ids: list[int] = [1]
        self.requests: list[GenerateRequest] = []
        self.contexts: list[Context] = []
        self.among: list[Collection[int] | None] = []
        self.ended: list[str] = []
        """How each answer ended here: `complete`, or `closed` by the frontend."""
        self.script: Script = self.says("Hello, world! How are you?")

    def says(
        self, text: str, *, finish_reason: str = "stop", pause_s: float | None = None, **extra: Any
    ) -> Script:
        """Return a script that answers with a text, one token an item, one loop turn (or `pause_s`) apart."""
        token_ids = self.tokenizer.encode(text)

        async def script(request: GenerateRequest, context: Context) -> AsyncGenerator[GenerateItem]:
            for index, token_id in enumerate(token_ids):
                if pause_s is not None:
                    await asyncio.sleep(pause_s)
                last = {"finish_reason": finish_reason} if index == len(token_ids) - 1 else {}
                yield {"token_ids": [token_id], **(extra if index == 0 else {}), **last}  # type: ignore[typeddict-item]

        return script

    async def generate(
        self,
        request: Any,
        annotated: bool | None = True,
        context: Context | None = None,
        *,
        among: Collection[int] | None = None,
        busy: BusyThresholds | None = None,
    ) -> FakeCall:
        assert annotated is False
        assert busy is None
        assert context is not None
        if not self.ids:
            raise NoInstances("no instance of dynamo.backend.generate is known")
        self.requests.append(request)
        self.contexts.append(context)
        self.among.append(among)
        return FakeCall(self._answer(request, context))

    async def _answer(self, request: GenerateRequest, context: Context) -> AsyncGenerator[Any]:
        ended = "closed"
        try:
            async for item in self.script(request, context):
                yield item
            ended = "complete"
        finally:
            self.ended.append(ended)

    def instance_ids(self) -> list[int]:
        return self.ids

    def confirmed_instances(self) -> list[Instance]:
        transports = {"tcp": "127.0.0.1:1/x"}
        return [Instance(self.endpoint, InstanceId(i), transports, secret=b"never shown") for i in self.ids]

    def members(self) -> list[Member]:
        return []

    async def count_load(self) -> None:
        pass

    async def aclose(self) -> None:
        pass


@dataclass
class FakeRuntime:
    """The part of a runtime that the frontend needs."""

    registry: Any = field(default_factory=FakeRegistry)
    objects: MemoryObjectStore = field(default_factory=MemoryObjectStore)
    workers: dict[str, Worker] = field(default_factory=dict)
    opened: list[str] = field(default_factory=list)

    async def client(self, endpoint: EndpointName) -> Worker:
        self.opened.append(str(endpoint))
        return self.workers[str(endpoint)]

    async def clear_caches(self, endpoints: Collection[EndpointName]) -> tuple[int, dict[str, Any]]:
        return 200, {"cleared_workers": sorted(map(str, endpoints))}

    async def publish(
        self,
        name: str,
        *,
        path: Path = DEMO_MODEL_PATH,
        endpoint: EndpointName = ENDPOINT,
        instance_id: int = 1,
        **changes: Any,
    ) -> str:
        """Upload a model's files and put its card. Return the card's key."""
        model = read_model_directory(path)
        card = make_card(model, model_name=name, kv_cache_block_size=16).model_copy(update=changes)
        await upload_model_files(self.objects, model, card)
        key = endpoint.model_card_key(instance_id)
        self.registry.put(key, card.to_bytes())
        return key


@dataclass
class Frontend:
    """The frontend under test."""

    url: str
    models: LiveModels
    runtime: FakeRuntime
    worker: Worker
    http: httpx.AsyncClient
    client: openai.AsyncOpenAI
    shutdown: asyncio.Event
    grpc_port: int = 0

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition is true. The test's own time-out bounds the wait."""
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.005)

    async def until_served(self, name: str) -> None:
        await self.until(lambda: any(model.name == name for model in self.models.served()))


OpenFrontend = Callable[..., Awaitable[Frontend]]


@pytest.fixture(scope="session")
def demo_tokenizer() -> Tokenizer:
    return Tokenizer.from_files(DEMO_MODEL_PATH)


@pytest.fixture
async def open_frontend(tmp_path: Path, demo_tokenizer: Tokenizer) -> AsyncIterator[OpenFrontend]:
    """Yield a function that opens a frontend with given settings. It serves the demo model as `demo`."""
    # The openai client and `asyncio.to_thread` start threads in the loop's executor, which end here.
    executor = ThreadPoolExecutor(4)
    asyncio.get_running_loop().set_default_executor(executor)
    closing: list[Any] = []

    async def open_(*, model: str | None = "demo", **settings: Any) -> Frontend:
        context = _frontend(tmp_path, demo_tokenizer, settings)
        frontend = await context.__aenter__()
        closing.append(context)
        if model is not None:
            await frontend.runtime.publish(model)
            await frontend.until_served(model)
        return frontend

    yield open_
    for context in closing:
        await context.__aexit__(None, None, None)
    executor.shutdown()
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(4))


@pytest.fixture
async def frontend(open_frontend: OpenFrontend) -> Frontend:
    """Yield a frontend with default settings."""
    return await open_frontend()


@asynccontextmanager
async def _frontend(
    directory: Path, tokenizer: Tokenizer, overrides: dict[str, Any]
) -> AsyncIterator[Frontend]:
    settings = FrontendSettings.load(
        http_host="127.0.0.1", http_port=0, **{"tokenizer": "default", **overrides}
    )
    runtime = FakeRuntime()
    worker = runtime.workers[str(ENDPOINT)] = Worker(ENDPOINT, tokenizer)
    preparation = Preparation(int(settings.max_body_bytes))
    shutdown = asyncio.Event()
    door = Door(settings, {api.path: api.errors for api in APIS} | kserve_errors(settings))
    listener = bind(settings.http_host, settings.http_port)
    accepting = asyncio.Event()

    async def wait_for_shutdown() -> None:
        await shutdown.wait()

    with listener:
        async with LiveModels(
            runtime,
            open_client=runtime.client,
            cache_dir=directory / "cache",
            lease_ttl_s=1.0,
            tokenizer=settings.tokenizer,
        ) as models:
            app = make_app(
                models,
                preparation,
                settings,
                runtime.registry,
                runtime.clear_caches,
                grpc_apis=kserve_apis() if settings.kserve_grpc_server else (),
            )
            metadata = Metadata(models, runtime.registry)
            serving = asyncio.create_task(
                run_server(
                    door.wrap(app),
                    [listener],
                    wait_for_shutdown,
                    settings,
                    drain_s=2,
                    on_ready=lambda _: accepting.set(),
                    tls=door.tls,
                )
            )
            await accepting.wait()
            url = url_of(listener, door.scheme)
            async with (
                (
                    serving_kserve(door.wrap(app), metadata, settings, wait_for_shutdown, KSERVE_DRAIN_S)
                    if settings.kserve_grpc_server
                    else nullcontext(0)
                ) as grpc_port,
                httpx.AsyncClient(base_url=url, timeout=20) as http,
                openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
            ):
                yield Frontend(url, models, runtime, worker, http, client, shutdown, grpc_port)
                shutdown.set()
            await serving
    await preparation.aclose()


@pytest.fixture
async def deployment(
    dynamo_redis_url: str, dynamo_redis_prefix: str, tmp_path: Path
) -> AsyncIterator[Deployment]:
    executor = ThreadPoolExecutor(4)
    asyncio.get_running_loop().set_default_executor(executor)

    async with AsyncExitStack() as ending:

        async def open_runtime() -> DistributedRuntime:
            settings = Settings.load(redis_url=dynamo_redis_url, prefix=dynamo_redis_prefix, drain_s=2)
            return await ending.enter_async_context(DistributedRuntime(settings=settings))

        deployment = Deployment(open_runtime, tmp_path / "cache", [])
        yield deployment
        for process in reversed(deployment.processes):
            await process.end()
    executor.shutdown()
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(4))
