"""Servers, proxies and processes for the registry's integration tests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from dynamo_redis.config import StoreSettings
from dynamo_redis.store.base import Put, Registry, WatchBatch
from dynamo_redis.store.registry import RedisRegistry

WAIT_S = 10.0

OpenRegistry = Callable[..., Awaitable[RedisRegistry]]


@pytest.fixture
async def open_registry(dynamo_redis_prefix: str) -> AsyncIterator[OpenRegistry]:
    """Opens started registries on a URL, all with the test's prefix; closes them after the test."""
    opened: list[RedisRegistry] = []

    async def open_one(
        url: str, *, ttl_s: float = 2.0, timeout_s: float = 1.0, **more: object
    ) -> RedisRegistry:
        settings = StoreSettings.load(
            redis_url=url,
            prefix=dynamo_redis_prefix,
            lease_ttl_s=ttl_s,
            command_timeout_s=timeout_s,
            **more,
        )
        registry = RedisRegistry(settings)
        opened.append(registry)
        await registry.start()
        return registry

    yield open_one
    await asyncio.gather(*(registry.aclose() for registry in opened))


class Mirror:
    """What a watch has shown of a prefix so far."""

    def __init__(self, registry: Registry, prefix: str) -> None:
        self.state: dict[str, bytes] = {}
        self.batches: list[WatchBatch] = []
        self._watch = registry.watch(prefix)
        self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        async for batch in self._watch:
            for event in batch.events:
                if isinstance(event, Put):
                    self.state[event.record.key] = event.record.value
                else:
                    assert event.key in self.state, f"phantom {event}"
                    del self.state[event.key]
            self.batches.append(batch)

    @property
    def resyncs(self) -> list[str]:
        return [batch.resync for batch in self.batches if batch.resync is not None]

    async def until(self, condition: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                assert not self._task.done()
                await asyncio.sleep(0.005)

    async def until_state(self, state: dict[str, bytes], timeout_s: float = WAIT_S) -> None:
        try:
            await self.until(lambda: self.state == state, timeout_s)
        except TimeoutError:
            assert self.state == state

    async def aclose(self) -> None:
        await self._watch.aclose()
        await self._task


@pytest.fixture
async def mirror() -> AsyncIterator[Callable[[Registry, str], Awaitable[Mirror]]]:
    """Follows a prefix; answers once the first state has been seen."""
    mirrors: list[Mirror] = []

    async def begin(registry: Registry, prefix: str) -> Mirror:
        made = Mirror(registry, prefix)
        mirrors.append(made)
        await made.until(lambda: bool(made.batches))
        return made

    yield begin
    for made in mirrors:
        await made.aclose()


class Proxy:
    """A TCP proxy that can cut its connections, swallow the answers, and be sent elsewhere."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.swallow_answers = False
        self.refuse = False
        self.url = ""
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def aclose(self) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await self._server.wait_closed()

    def cut(self) -> None:
        """Break all connections."""
        for writer in list(self._writers):
            writer.transport.abort()

    def cut_one(self) -> None:
        """Break one connection."""
        if self._writers:
            next(iter(self._writers)).transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuse:
            writer.transport.abort()
            return
        host, _, port = self.target.removeprefix("redis://").partition(":")
        try:
            to_reader, to_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, to_writer}
        try:
            await asyncio.gather(
                self._pump(reader, to_writer, is_answer=False), self._pump(to_reader, writer, is_answer=True)
            )
        finally:
            self._writers -= {writer, to_writer}

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_answer: bool
    ) -> None:
        with contextlib.suppress(OSError, RuntimeError):  # uvloop raises the latter on a closed transport
            while content := await reader.read(1 << 16):
                if not (is_answer and self.swallow_answers):
                    writer.write(content)
                    await writer.drain()
        writer.transport.abort()


@pytest.fixture
async def open_proxy() -> AsyncIterator[Callable[[str], Awaitable[Proxy]]]:
    """Opens proxies to a `redis://host:port` URL."""
    proxies: list[Proxy] = []

    async def open_one(url: str) -> Proxy:
        proxy = Proxy(url)
        await proxy.start()
        proxies.append(proxy)
        return proxy

    yield open_one
    for proxy in proxies:
        await proxy.aclose()
