"""Ports that are registered without a claim."""

from __future__ import annotations

from typing import Any

from dynamo_redis.store.base import Registration
from dynamo_redis.store.registry.redis_registry import RedisRegistry


class TolerantRegistry(RedisRegistry):
    """Registers a key that another tenant has, too: the last registration wins."""

    async def register(self, key: str, value: bytes, *, exclusive: bool = False, **more: Any) -> Registration:
        """Register a key like `RedisRegistry.register`, always as one that is not exclusive."""
        return await super().register(key, value, exclusive=False, **more)
