"""Deployments whose password is changed while chats run: behind one server, Sentinels and a cluster."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dynamo_redis.store.cluster_server import EmbeddedCluster
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.sentinel_server import SentinelDeployment
from dynamo_redis.store.server import EmbeddedServer
from tests.integration.store.cluster.test_deployments import Chats
from tests.routed_deployment import Deployment, deployment, until_served

__all__ = ["deployment"]

log = logging.getLogger(__name__)

USER = "app"
SECRET = "Hunter2pass"
CHANGES_COUNT = 4


@dataclass
class Servers:
    """All servers of a deployment, with one user whose password is changed."""

    url: str
    admins: list[RedisClient]
    file: Path
    numbers: itertools.count[int]

    async def all(self, *command: str) -> list[Any]:
        return [await admin.execute(*command) for admin in self.admins]

    async def begin(self) -> None:
        password = self._next()
        await self.all("ACL", "SETUSER", USER, "on", f">{password}", "~*", "&*", "+@all")
        self._write(password)

    async def change(self, *, file_is_late: bool) -> None:
        """Replace the password, and end all connections of the user. `file_is_late`: as Kubernetes' files."""
        password, old = self._next(), self.file.read_text()
        if not file_is_late:
            self._write(password)
        await self.all("ACL", "SETUSER", USER, f">{password}", f"<{old}")
        refused = await self._refused_count()
        await self.all("CLIENT", "KILL", "USER", USER)
        if file_is_late:
            async with asyncio.timeout(30):
                while await self._refused_count() == refused:
                    await asyncio.sleep(0.01)
            self._write(password)

    def _next(self) -> str:
        return f"{SECRET}-{next(self.numbers)}"

    def _write(self, password: str) -> None:
        replacement = self.file.with_suffix(".new")
        replacement.write_text(password)
        replacement.rename(self.file)

    async def connections_made(self) -> int:
        """Return how many connections the servers have taken so far."""
        infos = [info.decode() for info in await self.all("INFO", "stats")]
        return sum(int(info.split("total_connections_received:")[1].split()[0]) for info in infos)

    async def _refused_count(self) -> int:
        """Return how often a server has refused a password."""
        infos = [info.decode() for info in await self.all("INFO", "commandstats")]
        found = [re.search(r"cmdstat_auth:.*failed_calls=(\d+)", info) for info in infos]
        return sum(int(one[1]) for one in found if one)


@pytest.fixture(params=["one", "sentinel", "cluster"])
async def servers(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Servers]:
    directory = tmp_path / "servers"
    directory.mkdir()
    running: Any
    if request.param == "one":
        running = EmbeddedServer(directory, port=0)
    elif request.param == "sentinel":
        running = SentinelDeployment(directory)
    else:
        running = EmbeddedCluster(directory)
    async with running:
        match running:
            case SentinelDeployment():
                urls = [server.url for server in running.servers]
            case EmbeddedCluster():
                urls = [f"redis://127.0.0.1:{node.port}" for node in running.running()]
            case _:
                urls = [running.url]
        admins = [RedisClient(url, timeout_s=10.0) for url in urls]
        made = Servers(running.url, admins, tmp_path / "password", itertools.count())
        await made.begin()
        yield made
        for admin in admins:
            await admin.aclose()


@pytest.fixture
def dynamo_redis_url(servers: Servers) -> str:
    return servers.url


async def test_chats_go_on_while_the_password_changes(
    servers: Servers, deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    login = {"redis_username": USER, "redis_password_file": servers.file}
    workers = [await deployment.worker(login) for _ in range(2)]
    frontend = await deployment.frontend(login)
    await until_served(frontend, instances=2)
    chats = Chats(frontend)
    await chats.some_more()
    runtime = workers[0].process.runtime
    written: dict[str, bytes] = {}
    opened = b"".join(await servers.all("CLIENT", "LIST")).count(f"user={USER}".encode())
    before = await servers.connections_made()
    for number in range(CHANGES_COUNT):
        await servers.change(file_is_late=number % 2 == 1)
        for part in range(5):
            key, value = f"x/{number}/{part}", b"%d" % number
            await runtime.registry.put(key, value)
            written[key] = value
        await chats.some_more()
    await chats.end()
    made = await servers.connections_made() - before
    found = {record.key: record.value for record in (await runtime.registry.get_prefix("x/")).records}
    assert found == written
    await until_served(frontend, instances=2)
    assert [worker.process.runtime.registry.lease_losses for worker in workers] == [0, 0]
    log.info("%d connections at %d changes, %d open", made, CHANGES_COUNT, opened)
    assert made <= CHANGES_COUNT * 4 * opened, "connections come in a storm"
    assert SECRET not in caplog.text
