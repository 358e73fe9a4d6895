"""The envelope of events: one msgpack array holds a batch of one publisher's events in order. Pure.

    [1, topic, instance_id, epoch, dp_rank, first_sequence, published_at_ms, [event, …]]

A publisher numbers its events from 0 without holes, over all of its batches; `first_sequence` is the number
of a batch's first event. A receiver that has applied all events before `n` expects a batch that begins at
`n`. Events with lower numbers are repetitions; a batch that begins at a higher number shows a gap. A batch
without events tells its publisher's present number. The epoch is a random number of one start of the process:
with another epoch the numbers begin anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dynamo_redis.errors import InvalidRecord, SchemaMismatch
from dynamo_redis.wire.codec import array_header, pack_known, unpack

ENVELOPE_VERSION = 1

_WHAT = "a batch of events"

_U63_END = 1 << 63
_ARRAY_OF_8 = b"\x98"


class PublisherId(NamedTuple):
    """A publisher of numbered events: one data-parallel rank of one start of one instance."""

    instance_id: int
    epoch: int
    dp_rank: int


@dataclass(frozen=True, slots=True)
class EventBatch:
    """Events of one publisher, with consecutive sequences from `first_sequence`."""

    topic: str
    publisher: PublisherId
    first_sequence: int
    published_at_ms: int
    events: list[Any]

    @property
    def next_sequence(self) -> int:
        """The first sequence of the publisher's next batch."""
        return self.first_sequence + len(self.events)

    def to_bytes(self) -> bytes:
        """Pack the batch. Raises TypeError if an event is not msgpack."""
        return pack_known(
            (
                ENVELOPE_VERSION,
                self.topic,
                *self.publisher,
                self.first_sequence,
                self.published_at_ms,
                self.events,
            )
        )

    @classmethod
    def of_packed(
        cls, topic: str, publisher: PublisherId, first_sequence: int, now_ms: int, packed: Sequence[bytes]
    ) -> bytes:
        """Pack a batch whose events are packed already."""
        head = (ENVELOPE_VERSION, topic, *publisher, first_sequence, now_ms)
        return b"".join((_ARRAY_OF_8, *map(pack_known, head), array_header(len(packed)), *packed))

    @classmethod
    def from_bytes(cls, stored: bytes) -> EventBatch:
        """Read a stored batch; fields of later minor versions, at its end, are ignored.

        Raises InvalidRecord if it is no batch, SchemaMismatch for another version.
        """
        try:
            fields = unpack(stored)
        except (ValueError, TypeError) as exc:  # TypeError: not bytes, where an answer brought it
            raise InvalidRecord(_WHAT, exc) from exc
        if not isinstance(fields, list) or not fields:
            raise InvalidRecord(_WHAT, "no array")
        if fields[0] != ENVELOPE_VERSION:
            raise SchemaMismatch(_WHAT, fields[0], ENVELOPE_VERSION)
        if len(fields) < 8:
            raise InvalidRecord(_WHAT, f"{len(fields)} fields")
        _, topic, *numbers, events = fields[:8]
        if not isinstance(topic, str) or not isinstance(events, list):
            raise InvalidRecord(_WHAT, "topic or events are of the wrong type")
        if set(map(type, numbers)) != {int} or min(numbers) < 0 or max(numbers) >= _U63_END:
            raise InvalidRecord(_WHAT, "a number is missing, or not one of 63 bits")
        instance_id, epoch, dp_rank, first_sequence, published_at_ms = numbers
        publisher = PublisherId(instance_id, epoch, dp_rank)
        return cls(topic, publisher, first_sequence, published_at_ms, events)
