"""Formats as a later minor version may write them: with fields that the present release does not know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgpack

from dynamo_redis.wire.topics import ACTIVE_SEQUENCES, KV_EVENTS

LATER: Final = {"later": {"of": [1, "two"], "is": True}}
"""Fields that a later release adds to each JSON object."""

FREE: Final = frozenset({"transport", "settings", "data", "workers"})
"""JSON objects whose names are content, and no fields."""


def later_json(value: Any, *, is_record: bool = True) -> Any:
    """Return a JSON value with more fields in it and in the objects that it is made of."""
    if not isinstance(value, Mapping):
        return value
    found = {
        name: later_json(part, is_record=name != "files") if name not in FREE else part
        for name, part in value.items()
    }
    return {**found, **LATER} if is_record else found


def later_batch(packed: bytes) -> bytes:
    """Return a batch of events with more fields: of the batch, and of each event."""
    version, topic, *head, events = msgpack.unpackb(packed)
    events = [later_event(topic, event) for event in events]
    return bytes(msgpack.packb([version, topic, *head, events, LATER]))


def later_event(topic: str, event: Any) -> Any:
    """Return an event with more fields."""
    if topic == KV_EVENTS:
        return [*event, LATER]
    if topic != ACTIVE_SEQUENCES:
        return {**event, **LATER}
    match event:
        case ["add", *booking]:
            return ["add", *booking, 0, LATER]  # the place of `shared`, of "active" messages, comes first
        case ["active", active]:
            return ["active", [[*booking, LATER] for booking in active], LATER]
        case _:
            return [*event, LATER]


def later_fields(packed: bytes) -> bytes:
    """Return an array of names and values with one more of each."""
    return bytes(msgpack.packb([b"later", b"x", *msgpack.unpackb(packed, raw=True)]))


def later_array(packed: bytes) -> bytes:
    """Return an array with one more part."""
    return bytes(msgpack.packb([*msgpack.unpackb(packed, raw=True), b"later"]))
