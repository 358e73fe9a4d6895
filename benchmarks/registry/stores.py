"""Three stores with one interface: ours, etcd, and bare Redis streams as the floor.

The same drivers run on all three. The rival's interpreter, which has none of our code, imports this module
too. So each side imports its library when it is made.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from importlib import import_module
from typing import Any, Protocol

TTL_S = 10
PREFIX = "v1/instances/bench/"
FLOOR_STREAM = "bench:floor"


class Store(Protocol):
    """The operations that a driver uses. Each store has connections of its own."""

    async def start(self) -> None:
        """Connect."""
        ...

    async def put(self, key: str, value: bytes) -> None:
        """Write; returns when the write is acknowledged."""
        ...

    def watch(self) -> AsyncIterator[bytes]:
        """Yield the values written under `PREFIX` from now on."""
        ...

    async def keep(self, key: str, value: bytes) -> None:
        """Hold a lease of `TTL_S` with one key, as each process of a deployment does."""
        ...

    async def aclose(self) -> None: ...


class Ours:
    """This project's registry with its defaults; `address` is a Redis URL."""

    def __init__(self, address: str) -> None:
        config = import_module("dynamo_redis.config")
        registry = import_module("dynamo_redis.store.registry.redis_registry")
        self._put_type: Any = import_module("dynamo_redis.store.base").Put
        self._registry: Any = registry.RedisRegistry(
            config.StoreSettings.load(redis_url=address, prefix="bench", lease_ttl_s=TTL_S)
        )

    async def start(self) -> None:
        await self._registry.start()

    async def put(self, key: str, value: bytes) -> None:
        await self._registry.put(key, value)

    async def watch(self) -> AsyncIterator[bytes]:
        async with self._registry.watch(PREFIX) as watch:
            async for batch in watch:
                for event in batch.events:
                    if isinstance(event, self._put_type):
                        yield event.record.value

    async def keep(self, key: str, value: bytes) -> None:
        await self._registry.register(key, value)

    async def aclose(self) -> None:
        await self._registry.aclose()


class Etcd:
    """etcd through `aetcd`; `address` is `host:port`."""

    def __init__(self, address: str) -> None:
        host, _, port = address.partition(":")
        # Without a pool of its own, all channels of a process would share one connection.
        options = {"grpc.use_local_subchannel_pool": 1}
        self._client: Any = import_module("aetcd").Client(host, int(port), options=options)
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._client.connect()

    async def put(self, key: str, value: bytes) -> None:
        await self._client.put(key.encode(), value)

    async def watch(self) -> AsyncIterator[bytes]:
        async for event in await self._client.watch_prefix(PREFIX.encode()):
            yield event.kv.value

    async def keep(self, key: str, value: bytes) -> None:
        lease = await self._client.lease(TTL_S)
        await self._client.put(key.encode(), value, lease)
        self._keeper = asyncio.create_task(self._refresh(lease))

    async def _refresh(self, lease: Any) -> None:
        while True:
            await asyncio.sleep(TTL_S / 2)
            await lease.refresh()

    async def aclose(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
        await self._client.close()


class Floor:
    """A stream, written and read with redis-py as bare as it goes; `address` is a Redis URL."""

    def __init__(self, address: str) -> None:
        self._redis: Any = import_module("redis.asyncio").Redis.from_url(address, protocol=2)
        self._redis.response_callbacks.clear()

    async def start(self) -> None:
        await self._redis.execute_command("PING")

    async def put(self, key: str, value: bytes) -> None:
        await self._redis.execute_command(
            "XADD", FLOOR_STREAM, "MAXLEN", "~", 10_000, "*", "k", key, "v", value
        )

    async def watch(self) -> AsyncIterator[bytes]:
        after: bytes = b"$"
        while True:
            reply = await self._redis.execute_command(
                "XREAD", "COUNT", 500, "BLOCK", 2000, "STREAMS", FLOOR_STREAM, after
            )
            for _stream, entries in reply or ():
                for entry, fields in entries:
                    after = entry
                    yield fields[3]

    async def keep(self, key: str, value: bytes) -> None:
        """Do nothing: the floor has no leases."""

    async def aclose(self) -> None:
        await self._redis.aclose()


SIDES: dict[str, Callable[[str], Store]] = {"ours": Ours, "etcd": Etcd, "floor": Floor}
