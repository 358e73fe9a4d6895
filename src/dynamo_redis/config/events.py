"""Settings of the event plane."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ByteSize, Field

from dynamo_redis.config.base import Duration, SettingsGroup, Size, setting


class EventSettings(SettingsGroup):
    """The event plane: how KV-cache events reach routers."""

    event_plane: Literal["stream", "pubsub", "none"] = setting(
        "DYN_EVENT_PLANE",
        "stream",
        "stream: durable, in Redis Streams; pubsub: not stored in Redis, workers keep the events that they "
        "sent; none: no events, routers predict from their own decisions.",
    )
    event_linger_s: Annotated[Duration, Field(le=60)] = setting(
        "DYN_EVENT_LINGER_S",
        0.002,
        "Longest time that an event waits to be sent together with others.",
        unit="s",
    )
    event_batch_count: Annotated[int, Field(ge=1, le=10_000)] = setting(
        "DYN_EVENT_BATCH", 256, "Most events in one entry.", unit="events"
    )
    event_queue_count: Annotated[int, Field(ge=1)] = setting(
        "DYN_EVENT_QUEUE",
        65_536,
        "Most events that a publisher holds while Redis cannot be reached. Beyond that, events are dropped, "
        "and routers ask the worker for them.",
        unit="events",
    )
    event_queue_size_bytes: Size = setting(
        "DYN_EVENT_QUEUE_SIZE",
        ByteSize(64 << 20),
        "Most bytes of events that a publisher holds.",
        unit="bytes",
    )
    event_shards_count: Annotated[int, Field(ge=1, le=256)] = setting(
        "DYN_EVENT_SHARDS",
        1,
        "Streams over which a component's KV events are spread, by worker: as many as the cluster has "
        "masters. Alike for workers and routers; without a cluster it is of no use.",
        unit="streams",
    )
    event_stream_events_count: Annotated[int, Field(ge=1000)] = setting(
        "DYN_EVENT_STREAM_EVENTS", 1_000_000, "Most events that one stream keeps.", unit="events"
    )
    event_stream_size_bytes: Size = setting(
        "DYN_EVENT_STREAM_SIZE", ByteSize(256 << 20), "Most bytes that one stream keeps.", unit="bytes"
    )
