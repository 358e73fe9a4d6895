"""A registry without the writer chain."""

from __future__ import annotations

from unittest import mock

from dynamo_redis.config import StoreSettings
from dynamo_redis.store.registry import redis_registry
from dynamo_redis.store.registry.lease import WriterChain


class AgreeableChain(WriterChain):
    """Finds that whatever the registry says was this lease's last write, was."""

    def agrees(self, last_write: str) -> bool:
        """Always."""
        return True


def agreeable_registry(settings: StoreSettings) -> redis_registry.RedisRegistry:
    """A registry that believes that no write it was acknowledged was ever lost."""
    with mock.patch.object(redis_registry, "WriterChain", AgreeableChain):
        return redis_registry.RedisRegistry(settings)
