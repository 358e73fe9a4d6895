"""The streams over which a component's KV events are spread: `DYN_EVENT_SHARDS` of them."""

from __future__ import annotations

from struct import Struct

from xxhash import xxh3_64_intdigest

from dynamo_redis.config import EventSettings
from dynamo_redis.store.event_base import StreamName
from dynamo_redis.wire.event import PublisherId
from dynamo_redis.wire.topics import KV_EVENTS

_WORKER = Struct("<QI")


def shards_count(settings: EventSettings) -> int:
    """Return the number of streams: topics are not spread, since a cluster sends each message to all
    nodes."""
    return settings.event_shards_count if settings.event_plane == "stream" else 1


def kv_event_streams(namespace: str, component: str, settings: EventSettings) -> tuple[StreamName, ...]:
    """Return the streams of a component's KV events, or the topic."""
    return StreamName(namespace, component, KV_EVENTS, shards_count=shards_count(settings)).shards()


def shard_of(publisher: PublisherId, count: int) -> int:
    """Return the shard of a publisher's events, the same for each start of a worker: so its events of two
    starts stay in order."""
    worker = _WORKER.pack(publisher.instance_id, publisher.dp_rank & 0xFFFF_FFFF)
    return xxh3_64_intdigest(worker) % count
