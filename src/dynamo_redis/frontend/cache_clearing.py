"""`POST /clear_kv_blocks`: every worker drops the KV blocks that no running request uses."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

from dynamo_redis.clock import SYSTEM_CLOCK
from dynamo_redis.errors import NoInstances, PlaneError
from dynamo_redis.names import EndpointName
from dynamo_redis.planes.context import Context
from dynamo_redis.runtime.handlers import collect_one
from dynamo_redis.runtime.runtime import DistributedRuntime
from dynamo_redis.wire.topics import CLEAR_KV_BLOCKS

ANSWER_S = 10.0
"""Longest time for a worker's answer, in seconds."""


async def clear_kv_blocks(
    runtime: DistributedRuntime, endpoints: Collection[EndpointName]
) -> tuple[int, dict[str, Any]]:
    """Ask the instances in the components of these endpoints, all at once, for at most 10 s.

    Return status and body: `{"cleared_workers": […], "failed_workers": […]}`. The status is 200, 502 if a
    worker failed, 503 if there is no worker. Raises StoreError.
    """

    async def clear_component(namespace: str, component: str) -> list[dict[str, Any]]:
        name = f"{namespace}.{component}.{CLEAR_KV_BLOCKS}"

        async def clear_instance(instance_id: int) -> dict[str, Any]:
            worker: dict[str, Any] = {"endpoint": name, "instance_id": instance_id}
            context = Context(deadline=SYSTEM_CLOCK.monotonic() + ANSWER_S)
            try:
                worker["response"] = await collect_one(await client.direct({}, instance_id, False, context))
            except NoInstances:
                worker["error"] = "the worker has left"
            except (PlaneError, RuntimeError) as exc:
                worker["error"] = str(exc)
            return worker

        async with await runtime.endpoint(name).client() as client:
            return list(await asyncio.gather(*map(clear_instance, client.instance_ids())))

    components = {(endpoint.namespace, endpoint.component) for endpoint in endpoints}
    outcomes = await asyncio.gather(*(clear_component(*component) for component in sorted(components)))
    cleared = [worker for outcome in outcomes for worker in outcome if "error" not in worker]
    failed = [worker for outcome in outcomes for worker in outcome if "error" in worker]
    body: dict[str, Any] = {"cleared_workers": cleared, "failed_workers": failed}
    if not cleared and not failed:
        return 503, {**body, "message": "no worker can be asked: is one running?"}
    return (502 if failed else 200), body
