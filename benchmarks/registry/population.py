"""Ten thousand instances, as in a large deployment: their records, and their registration."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from benchmarks.registry.rivals.writer import record
from dynamo_redis.names import EndpointName, InstanceId
from dynamo_redis.store.base import LeaseId
from dynamo_redis.store.keys import RegistryKeys
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.registry.scripts_api import KeyValue, OwnedPut

INSTANCES = 10_000
ENDPOINT = EndpointName("dynamo", "backend", "generate")
PREFIX = "bench"
"""Prefix of the registry's keys in Redis."""

_FIRST_ID = 7587888160958627806
_IN_FLIGHT = 16


def leases(count: int = INSTANCES) -> list[LeaseId]:
    """Return the lease ids of `count` processes."""
    return [LeaseId(_FIRST_ID + number) for number in range(count)]


def key_of(lease: LeaseId) -> str:
    """Return the key under which a process's instance is registered."""
    return ENDPOINT.instance_key(InstanceId(lease))


def record_of(lease: LeaseId) -> bytes:
    """Return the record of an instance, about 400 bytes."""
    return record(lease - _FIRST_ID)


def key_value(client: RedisClient) -> KeyValue:
    """Return the population's registry."""
    return KeyValue(client, RegistryKeys(PREFIX))


async def populate(redis_url: str, ids: Sequence[LeaseId], ttl_s: float) -> None:
    """Register an instance for each id, each under a lease of its own."""
    client = RedisClient(redis_url, timeout_s=10, client_name="population")
    kv = key_value(client)
    await kv.initialize()
    waiting = iter(ids)

    async def register() -> None:
        for lease in waiting:
            await kv.write([OwnedPut(key_of(lease), record_of(lease))], lease=lease, ttl_s=ttl_s)

    try:
        await asyncio.gather(*(register() for _ in range(_IN_FLIGHT)))
    finally:
        await client.aclose()
