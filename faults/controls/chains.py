"""A registry without the writer chain."""

from __future__ import annotations

from unittest import mock

from dynamo_redis.config import StoreSettings
from dynamo_redis.store.registry import redis_registry
from dynamo_redis.store.registry.lease import WriterChain


class AgreeableChain(WriterChain):
    """Accepts every last write of this lease that the registry names."""

    def agrees(self, last_write: str) -> bool:
        """Return True always."""
        return True


def agreeable_registry(settings: StoreSettings) -> redis_registry.RedisRegistry:
    """Return a registry that assumes that none of its acknowledged writes was ever lost."""
    with mock.patch.object(redis_registry, "WriterChain", AgreeableChain):
        return redis_registry.RedisRegistry(settings)
