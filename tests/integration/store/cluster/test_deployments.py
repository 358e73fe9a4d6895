"""Whole deployments on a cluster: chats go on whatever happens to its masters and slots."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from dynamo_redis.events.shards import kv_event_streams
from dynamo_redis.store.cluster_server import EmbeddedCluster
from dynamo_redis.store.keys import RegistryKeys, StreamKeys
from tests.integration.store.cluster.conftest import other_master
from tests.routed_deployment import Deployment, deployment, until_served

__all__ = ["deployment"]

SHARDED = {"event_shards_count": 3}


@pytest.fixture
def dynamo_redis_url(cluster: EmbeddedCluster) -> str:
    return cluster.url


class Chats:
    """Chats that follow each other, of which none may fail."""

    def __init__(self, frontend: httpx.AsyncClient) -> None:
        self._frontend = frontend
        self.count = 0
        self._is_over = False
        self._task = asyncio.create_task(self._chat_on())

    async def _chat_on(self) -> None:
        while not self._is_over:
            messages = [{"role": "user", "content": f"chat {self.count} " + "word " * 50}]
            body = {"model": "demo", "messages": messages, "max_tokens": 4}
            answer = await self._frontend.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            self.count += 1

    async def some_more(self) -> None:
        """Wait until further chats were answered."""
        before = self.count
        while self.count < before + 5 and not self._task.done():
            await asyncio.sleep(0.01)

    async def end(self) -> None:
        """End; raises if one has failed."""
        self._is_over = True
        await self._task


async def test_chats_go_on_while_slots_move_and_masters_change(
    cluster: EmbeddedCluster, deployment: Deployment, dynamo_redis_prefix: str
) -> None:
    workers = [await deployment.worker(SHARDED) for _ in range(2)]
    frontend = await deployment.frontend(SHARDED)
    await until_served(frontend, instances=2)
    chats = Chats(frontend)
    await chats.some_more()
    registry_key = RegistryKeys(dynamo_redis_prefix).meta
    shards = kv_event_streams("dynamo", "backend", workers[0].process.runtime.settings.events)
    assert len({await cluster.owner_of(StreamKeys(dynamo_redis_prefix, one).events) for one in shards}) == 3
    for key in (registry_key, *(StreamKeys(dynamo_redis_prefix, shard).events for shard in shards)):
        slot = await cluster.slot_of(key)
        await cluster.move_slot(slot, await other_master(cluster, await cluster.owner(slot)))
        await chats.some_more()
    await cluster.failover(await cluster.replica_of(await cluster.owner_of(registry_key)))
    await chats.some_more()
    await cluster.wait_until_whole()
    master = await cluster.owner_of(registry_key)
    replica = await cluster.replica_of(master)
    await master.server.kill()
    await chats.some_more()
    await cluster.until(replica.is_master)
    await chats.some_more()
    await chats.end()
    await master.server.start()
    await cluster.wait_until_whole()
    assert sum(worker.engine.request_count for worker in workers) >= chats.count


async def test_requests_pass_a_cluster(deployment: Deployment) -> None:
    through_redis = {"request_plane": "redis"}
    await deployment.worker(through_redis)
    frontend = await deployment.frontend(through_redis)
    await until_served(frontend)
    chats = Chats(frontend)
    await chats.some_more()
    await chats.end()
