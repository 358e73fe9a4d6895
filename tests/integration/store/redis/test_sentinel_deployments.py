"""Whole deployments behind Sentinels: chats go on at a planned failover."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dynamo_redis.store.sentinel_server import SentinelDeployment
from tests.integration.store.cluster.test_deployments import Chats
from tests.routed_deployment import Deployment, deployment, until_served

__all__ = ["deployment"]


@pytest.fixture
async def servers(tmp_path: Path) -> AsyncIterator[SentinelDeployment]:
    async with SentinelDeployment(tmp_path / "servers") as made:
        yield made


@pytest.fixture
def dynamo_redis_url(servers: SentinelDeployment) -> str:
    return servers.url


async def test_chats_go_on_at_planned_failovers(servers: SentinelDeployment, deployment: Deployment) -> None:
    workers = [await deployment.worker() for _ in range(2)]
    frontend = await deployment.frontend()
    await until_served(frontend, instances=2)
    chats = Chats(frontend)
    await chats.some_more()
    old = await servers.primary()
    await servers.fail_over()
    new, _ = await servers.wait_for_primary(other_than=old)
    await chats.some_more()
    await servers.wait_for_info(new, "replication", "role:master")
    await until_served(frontend, instances=2)
    await chats.some_more()
    await chats.end()
    assert sum(worker.engine.request_count for worker in workers) >= chats.count
