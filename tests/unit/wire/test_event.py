"""The envelope of events, as bytes."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from dynamo_redis.errors import SchemaMismatch
from dynamo_redis.wire.event import EventBatch, PublisherId

PUBLISHER = PublisherId((1 << 63) - 1, 12345678901, 3)
FIELDS: list[Any] = [1, "kv_events", *PUBLISHER, 40, 1_700_000_000_000, [[0, 0, b"x"], "y"]]


def test_batch_is_an_array_of_eight() -> None:
    batch = EventBatch("kv_events", PUBLISHER, 40, 1_700_000_000_000, [[0, 0, b"x"], "y"])
    assert msgpack.unpackb(batch.to_bytes()) == FIELDS
    assert EventBatch.from_bytes(batch.to_bytes()) == batch
    assert batch.next_sequence == 42


@pytest.mark.parametrize("count", [0, 1, 15, 16, 65_535, 65_536])
def test_events_packed_before_make_the_same_bytes(count: int) -> None:
    events = [n % 100 for n in range(count)]
    packed = [msgpack.packb(event) for event in events]
    made = EventBatch.of_packed("kv_events", PUBLISHER, 7, 99, packed)
    assert made == EventBatch("kv_events", PUBLISHER, 7, 99, events).to_bytes()


def test_later_fields_are_ignored() -> None:
    assert EventBatch.from_bytes(msgpack.packb([*FIELDS, "later"])).events == FIELDS[7]


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused(version: Any) -> None:
    with pytest.raises(SchemaMismatch):
        EventBatch.from_bytes(msgpack.packb([version, *FIELDS[1:]]))


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"\xc1",
        b"not msgpack at all",
        msgpack.packb([]),
        msgpack.packb({"a": 1}),
        msgpack.packb(FIELDS[:7]),
        msgpack.packb(FIELDS)[:-1],
        *(msgpack.packb([*FIELDS[:n], None, *FIELDS[n + 1 :]]) for n in range(1, 8)),
        msgpack.packb([*FIELDS[:2], -1, *FIELDS[3:]]),
        msgpack.packb([*FIELDS[:2], 1 << 63, *FIELDS[3:]]),
        msgpack.packb([*FIELDS[:2], True, *FIELDS[3:]]),
        msgpack.packb([*FIELDS[:2], 1.0, *FIELDS[3:]]),
    ],
)
def test_malformed_batch_is_refused(stored: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        EventBatch.from_bytes(stored)
