"""Asks the routers of a deployment, whether they live in frontends or are services."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from dynamo_redis.clock import SYSTEM_CLOCK
from dynamo_redis.errors import DynamoRedisError, InvalidRecord, NoInstances
from dynamo_redis.events.router_record import list_routers
from dynamo_redis.names import INSTANCES, EndpointName, decode_segment
from dynamo_redis.planes.context import Context
from dynamo_redis.router.answering import best_worker_endpoint, is_state_endpoint
from dynamo_redis.router.router_state import check_state
from dynamo_redis.runtime.handlers import collect_one
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.runtime.runtime import DistributedRuntime
from dynamo_redis.store.base import Record

ANSWER_S = 5.0
"""Longest time that a router may take to answer."""


@dataclass(frozen=True, slots=True)
class RouterAnswer:
    """The answer of one router: its state as JSON, or the reason why there is none. `key` is its
    record's key."""

    key: str
    state: dict[str, Any] | None
    failure: str | None = None
    is_readable: bool = True
    """False if its record in the registry, or its answer, cannot be read."""


async def ask_states(runtime: DistributedRuntime) -> list[RouterAnswer]:
    """Ask all routers for their states, each for 5 s at most. Return their answers, ordered by component and
    instance, and after them the records of routers that cannot be read. Raises StoreError."""

    async def ask(record: Record) -> RouterAnswer:
        """Ask the router with this record."""
        try:
            instance = Instance.from_record(record)
            async with await runtime.endpoint(str(instance.name)).client() as client:
                call = await client.direct({}, instance.instance_id, False, _context())
                return RouterAnswer(record.key, check_state(await collect_one(call)))
        except InvalidRecord as exc:
            return RouterAnswer(record.key, None, str(exc), is_readable=False)
        except (DynamoRedisError, RuntimeError) as exc:
            return RouterAnswer(record.key, None, str(exc))

    found = await runtime.registry.get_prefix(INSTANCES)
    routers = [record for record in found.records if _is_of_router(record.key)]
    answers = await asyncio.gather(*map(ask, routers))
    _, invalid = await list_routers(runtime.registry)
    unreadable = [*(exc for exc in found.invalid if _is_of_router(exc.key)), *invalid]
    return [*answers, *(RouterAnswer(exc.key, None, str(exc), is_readable=False) for exc in unreadable)]


def _is_of_router(key: str) -> bool:
    """Return whether an instance's key is that of an endpoint that shows a router's state."""
    try:
        namespace, component, endpoint, _ = map(decode_segment, key.removeprefix(INSTANCES).split("/"))
        return is_state_endpoint(EndpointName(namespace, component, endpoint))
    except ValueError:
        return False


async def ask_best_worker(
    runtime: DistributedRuntime, workers: EndpointName, request: dict[str, Any]
) -> dict[str, Any]:
    """Let a router of these workers explain the worker that it would choose, within 5 s: see
    `describe_choice`.

    Raises NoInstances if there is no router, PlaneError, StoreError.
    """
    async with await runtime.endpoint(str(best_worker_endpoint(workers))).client() as client:
        try:
            call = await client.random(request, False, _context())
            answer: dict[str, Any] = await collect_one(call)
        except NoInstances as exc:
            if client.known_ids():
                raise
            raise NoInstances(
                f"no router chooses among {workers}: start a frontend with --router-mode kv, or "
                f"`dynamo-redis router --endpoint {workers}`"
            ) from exc
        return answer


def _context() -> Context:
    """Make the context of one ask."""
    return Context(deadline=SYSTEM_CLOCK.monotonic() + ANSWER_S)
