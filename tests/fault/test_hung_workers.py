"""Workers whose event loop hangs, as their callers see it."""

from __future__ import annotations

import asyncio
import json
import sys
import time

from dynamo_redis.child import ChildProcess
from dynamo_redis.names import INSTANCES
from dynamo_redis.runtime.client import Client
from dynamo_redis.testing import RuntimeFactory
from tests.processes import PROGRAMS

NAME = "test.hung.echo"
START_S = 60.0
HANG_S = 3.2

WORKER = PROGRAMS / "hanging_handler.py"


async def test_hung_worker_is_avoided_until_it_is_back(
    dynamo_runtime_factory: RuntimeFactory, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    """One hangs in Python, one in C. No request fails, and their leases are kept."""
    arguments = [dynamo_redis_url, dynamo_redis_prefix, NAME, str(HANG_S)]
    children = [ChildProcess.start([sys.executable, WORKER, *arguments]) for _ in range(2)]
    try:
        runtime = await dynamo_runtime_factory(lease_ttl_s=1)
        client = await runtime.endpoint(NAME).client()
        await until_instances(client, 2)
        spinning, sleeping = client.instance_ids()

        async def echo(request: str) -> str:
            return request

        healthy_runtime = await dynamo_runtime_factory(lease_ttl_s=1)
        await healthy_runtime.endpoint(NAME).start_serving(echo)
        await until_instances(client, 3)

        hanging = [
            asyncio.create_task(ask(client, what, instance))
            for what, instance in (("spin", spinning), ("sleep", sleeping))
        ]
        async with asyncio.TaskGroup() as group:
            until = time.monotonic() + HANG_S - 0.2
            requests = []
            while time.monotonic() < until:
                requests.append(group.create_task(timed(client)))
                await asyncio.sleep(0.05)
            records = await runtime.registry.get_prefix(f"{INSTANCES}test/hung/")
            ready = {r["instance_id"]: r["ready"] for r in (json.loads(r.value) for r in records.records)}
            assert ready == {spinning: False, sleeping: False, healthy_runtime.instance_id: True}
            assert client.instance_ids() == [healthy_runtime.instance_id]
        assert max(task.result() for task in requests) < 4
        await until_instances(client, 3)
        assert await asyncio.gather(*hanging) == ["spin", "sleep"]  # their requests did not fail
        assert {await ask(client, "who", instance) for instance in (spinning, sleeping)} == {"who"}
    finally:
        await asyncio.gather(*(child.stop(5) for child in children))


async def until_instances(client: Client, count: int) -> None:
    async with asyncio.timeout(START_S):
        while len(client.instance_ids()) != count:
            await asyncio.sleep(0.01)


async def ask(client: Client, request: str, instance: int) -> str:
    (item,) = [item async for item in await client.direct(request, instance, annotated=False)]
    return str(item)


async def timed(client: Client) -> float:
    """Return the duration of a request to any instance."""
    began = time.monotonic()
    assert [item async for item in await client.round_robin("word", annotated=False)] == ["word"]
    return time.monotonic() - began
