"""Servers, proxies and processes for the registry's integration tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from dynamo_redis.config import StoreSettings
from dynamo_redis.store.base import Put, Registry, WatchBatch
from dynamo_redis.store.registry.redis_registry import RedisRegistry
from faults.proxy import Proxy

WAIT_S = 30.0

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
    """The records of a prefix that a watch has shown so far."""

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
    """Follows a prefix; returns once the first state has arrived."""
    mirrors: list[Mirror] = []

    async def begin(registry: Registry, prefix: str) -> Mirror:
        made = Mirror(registry, prefix)
        mirrors.append(made)
        await made.until(lambda: bool(made.batches))
        return made

    yield begin
    for made in mirrors:
        await made.aclose()


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
