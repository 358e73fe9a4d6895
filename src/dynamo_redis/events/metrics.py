"""The metrics of a process's publishers of KV events."""

from __future__ import annotations

from collections.abc import Mapping

from dynamo_redis.events.publisher import EventPublisher
from dynamo_redis.exposition import Family
from dynamo_redis.store.event_base import StreamName


def publisher_families(stream: StreamName, publishers: Mapping[int, EventPublisher]) -> list[Family]:
    """Return the figures of the publishers of a stream, by rank."""
    made = Family("dynamo_redis_events_made_total", "counter", "KV events of the engine")
    left_out = Family(
        "dynamo_redis_events_left_out_total", "counter", "KV events for which the queue had no room"
    )
    queued = Family("dynamo_redis_events_queued", "gauge", "KV events that wait, or are being sent")
    resting = Family("dynamo_redis_events_resting", "gauge", "1 while no router reads them, and none is sent")
    for dp_rank, publisher in publishers.items():
        labels = {
            "dynamo_namespace": stream.namespace,
            "dynamo_component": stream.component,
            "topic": stream.topic,
            "dp_rank": str(dp_rank),
        }
        made.add(publisher.next_sequence, labels)
        left_out.add(publisher.left_out_count, labels)
        queued.add(publisher.queued_count, labels)
        resting.add(publisher.is_resting, labels)
    return [made, left_out, queued, resting]
