"""Opens the store that the settings name."""

from __future__ import annotations

from dynamo_redis.config import StoreSettings
from dynamo_redis.store.base import Locks, ObjectStore, Registry


def open_store(settings: StoreSettings) -> tuple[Registry, ObjectStore]:
    """The registry and the object store, not yet connected. Raises ConfigError if no server is configured."""
    from dynamo_redis.store.objects import RedisObjectStore
    from dynamo_redis.store.registry import RedisRegistry

    return RedisRegistry(settings), RedisObjectStore.from_settings(settings)


def open_locks(settings: StoreSettings) -> Locks:
    """The locks, not yet connected. Raises ConfigError if no server is configured."""
    from dynamo_redis.store.lock_redis import RedisLocks

    return RedisLocks.from_settings(settings)
