"""The limits of managed services, all at once: commands, notifications, RESP3, idle connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dynamo_redis.errors import StoreRefused
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.server import EmbeddedServer
from tests.integration.store.cluster.test_deployments import Chats
from tests.routed_deployment import Deployment, deployment, until_served

__all__ = ["deployment"]

PASSWORD = "Hunter2pass"
REFUSED = (
    *("config", "client", "acl", "monitor", "keys", "script|flush", "info", "latency", "flushall"),
    *("debug", "slowlog", "save", "bgsave", "replicaof", "shutdown", "command", "memory", "module"),
)
"""Commands that no process needs."""
SENT = (
    "CONFIG GET timeout",
    "CLIENT LIST",
    "ACL LIST",
    "MONITOR",
    "KEYS *",
    "SCRIPT FLUSH",
    "INFO",
    "HELLO 3",
)
IDLE_S = 2
SETTINGS: dict[str, str | tuple[str, ...]] = {
    "timeout": str(IDLE_S),
    "maxmemory": "256mb",
    "maxmemory-policy": "volatile-lru",
    "rename-command": ("HELLO", ""),  # rules of users cannot refuse it
}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    directory = tmp_path / "server"
    directory.mkdir()
    async with EmbeddedServer(directory, port=0, settings=SETTINGS) as running:
        yield running


@pytest.fixture
async def admin(server: EmbeddedServer) -> AsyncIterator[RedisClient]:
    client = RedisClient(server.url, timeout_s=10.0)
    rights = [f"-{command}" for command in REFUSED]
    await client.execute("ACL", "SETUSER", "app", "on", f">{PASSWORD}", "~*", "&*", "+@all", *rights)
    yield client
    await client.aclose()


@pytest.fixture
def dynamo_redis_url(server: EmbeddedServer, admin: RedisClient) -> str:
    return server.url.replace("//", f"//app:{PASSWORD}@")


async def idle(admin: RedisClient) -> set[bytes]:
    """Return the names of connections that wait for nothing, and have been silent for a second."""
    lines = (await admin.execute("CLIENT", "LIST")).splitlines()
    silent = [
        line for line in lines if b"user=app " in line and b"flags=N " in line and b"idle=0 " not in line
    ]
    return {line.split()[0] for line in silent}


async def test_deployment_serves_on_a_limited_server(
    admin: RedisClient, deployment: Deployment, dynamo_redis_url: str
) -> None:
    user = RedisClient(dynamo_redis_url, timeout_s=5.0)
    for line in SENT:
        with pytest.raises(StoreRefused, match=r"NOPERM|unknown command"):
            await user.execute(*line.split())
    await user.aclose()
    slow = {"lease_ttl_s": 60}  # renewals have longer pauses than idle connections live
    workers = [await deployment.worker(slow) for _ in range(2)]
    frontend = await deployment.frontend(slow)
    await until_served(frontend, instances=2)
    for _ in range(2):
        chats = Chats(frontend)
        await chats.some_more()
        await chats.end()
        async with asyncio.timeout(30):
            while not (seen := await idle(admin)):
                await asyncio.sleep(0.05)
            while seen & await idle(admin):  # the server cuts them
                await asyncio.sleep(0.05)
    chats = Chats(frontend)
    for kind in ("pubsub", "normal"):
        await admin.execute("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
        await chats.some_more()
    await workers[0].process.runtime.registry.put("x", b"v")
    await chats.end()
    assert [worker.process.runtime.registry.lease_losses for worker in workers] == [0, 0]
    await workers[1].process.end()
    await until_served(frontend, instances=1)
    assert (await admin.execute("CONFIG", "GET", "notify-keyspace-events"))[1] == b""
