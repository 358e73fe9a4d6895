"""Opens the store that the settings name."""

from __future__ import annotations

from dynamo_redis.config import EventSettings, StoreSettings
from dynamo_redis.store.base import Locks, ObjectStore, Registry
from dynamo_redis.store.event_base import EventStreams


def open_store(settings: StoreSettings) -> tuple[Registry, ObjectStore]:
    """Return the registry and the object store, not yet connected. Raises ConfigError if no server is
    configured."""
    from dynamo_redis.store.objects.redis_objects import RedisObjectStore
    from dynamo_redis.store.registry.redis_registry import RedisRegistry

    return RedisRegistry(settings), RedisObjectStore.from_settings(settings)


def open_whole_store(
    settings: StoreSettings, events: EventSettings
) -> tuple[Registry, ObjectStore, Locks, EventStreams]:
    """Return all parts of the store on one client, not yet connected, which is closed with the registry.

    Raises ConfigError if no server is configured.
    """
    from dynamo_redis.store.locks.redis_locks import RedisLocks
    from dynamo_redis.store.objects.redis_objects import RedisObjectStore
    from dynamo_redis.store.registry.redis_registry import RedisRegistry
    from dynamo_redis.store.streams.redis_streams import RedisEventStreams

    registry = RedisRegistry(settings)
    return (
        registry,
        RedisObjectStore(registry.client, settings.prefix),
        RedisLocks(registry.client, settings.prefix),
        RedisEventStreams(registry.client, settings.prefix, events),
    )


def open_read_only(settings: StoreSettings) -> tuple[Registry, ObjectStore]:
    """Return them as `open_store` does, but read-only: methods that write raise StoreRefused."""
    from dynamo_redis.store.objects.redis_objects import RedisObjectStore
    from dynamo_redis.store.registry.read_only import ReadOnlyRegistry

    return ReadOnlyRegistry(settings), RedisObjectStore.from_settings(settings, read_only=True)


def open_locks(settings: StoreSettings) -> Locks:
    """Return the locks, not yet connected. Raises ConfigError if no server is configured."""
    from dynamo_redis.store.locks.redis_locks import RedisLocks

    return RedisLocks.from_settings(settings)


def open_events(settings: StoreSettings, events: EventSettings) -> EventStreams:
    """Return the event streams, not yet connected. Raises ConfigError if no server is configured."""
    from dynamo_redis.store.streams.redis_streams import RedisEventStreams

    return RedisEventStreams.from_settings(settings, events)


def open_read_only_events(settings: StoreSettings, events: EventSettings) -> EventStreams:
    """Return the event streams, not yet connected, for a user that may only read."""
    from dynamo_redis.store.streams.read_only import ReadOnlyEventStreams

    return ReadOnlyEventStreams.from_settings(settings, events)
