"""Protocols of event streams, which are durable and have one group a reader, and of topics, which keep
nothing.

Two implementations pass one contract suite: Redis (`streams/redis_streams.py`) and an in-memory one
(`streams/memory.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, NewType, Protocol, Self

from dynamo_redis.errors import InvalidRecord
from dynamo_redis.names import decode_segment, encode_segment

EntryId = NewType("EntryId", str)
"""An entry's place in its stream, `<ms>-<n>`. `entry_order` orders them."""

_ENTRY_ID: Final = re.compile(r"[0-9]{1,20}-[0-9]{1,20}")

_SHARD: Final = re.compile(r"([0-9]{1,9})(?:of([1-9][0-9]{0,8}))?")

BEGINNING = EntryId("0-0")
"""Position before the first entry of any stream."""

GROUP_TTL_S: Final = 10.0
"""A reader sends a sign of life each third of this time. A group that is silent for three times this time is
removed."""


def entry_order(entry_id: EntryId) -> tuple[int, int]:
    """Return the sort key of an entry id: milliseconds and number."""
    ms, _, number = entry_id.partition("-")
    return int(ms), int(number or 0)


def check_entry_id(text: str, what: str) -> EntryId:
    """Return a text if it is an entry's id. Raises InvalidRecord, which names the value around it by
    `what`."""
    if not _ENTRY_ID.fullmatch(text):
        raise InvalidRecord(what, f"{text!r} is not the id of an entry")
    return EntryId(text)


def just_before(ms: int) -> EntryId:
    """Return the position after all entries that were appended before a millisecond."""
    return EntryId(f"{ms - 1}-{(1 << 64) - 1}") if ms > 0 else BEGINNING


@dataclass(frozen=True, slots=True)
class StreamName:
    """The name of a stream or topic: a component's topic, or one of the `shards_count` shards of it."""

    namespace: str
    component: str
    topic: str
    shard: int = 0
    shards_count: int = 1

    @property
    def path(self) -> str:
        """`dynamo/backend/kv_events/0`, or `…/1of3` for the second of three shards, each part
        percent-encoded."""
        parts = map(encode_segment, (self.namespace, self.component, self.topic))
        of = f"of{self.shards_count}" if self.shards_count > 1 else ""
        return f"{'/'.join(parts)}/{self.shard}{of}"

    @classmethod
    def of_path(cls, path: str) -> StreamName | None:
        """Return the stream with that `path`; None if no stream has it."""
        parts = path.split("/")
        found = _SHARD.fullmatch(parts[3]) if len(parts) == 4 and all(parts) else None
        if found is None:
            return None
        shard, shards_count = int(found[1]), int(found[2] or 1)
        namespace, component, topic = map(decode_segment, parts[:3])
        return cls(namespace, component, topic, shard, shards_count)

    def shards(self) -> tuple[StreamName, ...]:
        """Return all shards of its topic."""
        return tuple(replace(self, shard=shard) for shard in range(self.shards_count))


@dataclass(frozen=True, slots=True)
class NewEntry:
    """One entry to append. `event_count` is its share of the stream's ceiling of events."""

    content: bytes
    event_count: int


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry as it was read. `content` is empty if another program wrote the entry."""

    entry_id: EntryId
    content: bytes


@dataclass(frozen=True, slots=True)
class GroupInfo:
    """A reader's group: its position, and its time without a sign of life, by the server's clock."""

    name: str
    position: EntryId
    lag_count: int
    """Number of entries that it has not acknowledged; an upper bound where the server does not count them."""
    silent_s: float


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """The state of a stream. `trim_floor` is the last entry that was ever trimmed, or BEGINNING."""

    name: StreamName
    entry_count: int
    event_count: int
    size_bytes: int
    last_entry_id: EntryId
    trim_floor: EntryId
    groups: tuple[GroupInfo, ...]


class EventGroup(Protocol):
    """One reader's consumer group in one stream, for one task.

    Entries that it has not acknowledged are not trimmed, unless the stream is over its ceiling or the group
    has been silent for three times `GROUP_TTL_S`."""

    @property
    def name(self) -> str: ...

    async def create(self) -> EntryId:
        """Create the group, and the stream if needed, at the stream's present end; return that position.

        From now on no entry after it is trimmed. An existing group of that name is moved there. Raises
        StoreError."""
        ...

    async def seek(self, position: EntryId) -> None:
        """Continue after `position`: an entry, or the floor.

        Raises StreamTrimmed if entries after it have been trimmed or it is no position of this stream,
        StreamLost if the stream or the group is gone."""
        ...

    async def read(self, *, count: int, block_s: float) -> list[Entry]:
        """Return the next entries, in order; an empty list if there are none within `block_s` (at most 2 s).

        A read is also a sign of life. Raises StreamTrimmed if entries were trimmed unread, StreamLost,
        StoreUnavailable. After StoreUnavailable, entries that were read and not acknowledged may come again.
        A cancelled read loses no entries."""
        ...

    async def acknowledge(self, entry_ids: Sequence[EntryId]) -> None:
        """Acknowledge entries that have been applied. May be sent with the next `read`. Raises StoreError."""
        ...

    async def aclose(self) -> None:
        """Remove the group and close its connection. Never raises for a dead server."""
        ...


class EventTail(Protocol):
    """Entries of one stream, read without a group: for readers that can do without trimmed entries."""

    async def read(self, *, count: int, block_s: float) -> list[Entry]:
        """As `EventGroup.read`, but never raise StreamTrimmed: continue with the oldest entry that is
        left."""
        ...

    async def aclose(self) -> None: ...


class TopicSubscription(Protocol):
    """Messages of one topic as they are published; messages published without a subscriber are lost."""

    async def next(self, timeout_s: float) -> bytes | None:
        """Return the next message; None if there is none within `timeout_s`.

        Raises StoreError when the connection is gone: subscribe again, and expect a gap."""
        ...

    async def aclose(self) -> None: ...


class EventStreams(Protocol):
    """A process's client of event streams and topics. It connects when needed; `aclose` closes the
    connections."""

    async def append(
        self, stream: StreamName, entries: Sequence[NewEntry], *, max_age_s: float | None = None
    ) -> None:
        """Append entries in order, in one round trip.

        With `max_age_s`, entries that are older by a sixtieth of it are dropped. The stream is held under its
        ceiling. After StoreUnavailable some of the entries, in order, may have been appended: to repeat the
        call makes duplicates."""
        ...

    def group(self, stream: StreamName, name: str) -> EventGroup:
        """Return a reader's group, not yet created."""
        ...

    def tail(self, stream: StreamName, *, after: EntryId | None = None, max_age_s: float = 0.0) -> EventTail:
        """Return a tail that begins after `after`; else with the first entry younger than `max_age_s`, by the
        server's clock."""
        ...

    async def time_ms(self, stream: StreamName) -> int:
        """Return the server's clock, by which entries of a stream have their ids. Raises StoreError."""
        ...

    async def trim(self, stream: StreamName, snapshot: EntryId) -> EntryId:
        """Drop entries that are no longer needed, up to the oldest of `snapshot` and the groups' positions.

        Silent groups are removed first. Returns the floor: the last entry dropped. Raises StoreError."""
        ...

    async def keep_if_wanted(self, stream: StreamName) -> bool:
        """Delete a stream that no reader can use; return whether it was kept.

        It is kept if it has a group, or a snapshot from which a reader may continue: no entry after that was
        trimmed. Silent groups are removed first. Raises StoreError."""
        ...

    async def info(self, stream: StreamName) -> StreamInfo | None:
        """Return the state of a stream, or None if it does not exist."""
        ...

    async def list(self, *, on_left_out: Callable[[str], None] | None = None) -> list[StreamInfo]:
        """Return all streams, ordered by name.

        `on_left_out` is called with a sentence for each stream that cannot be read; None logs it.
        """
        ...

    async def delete(self, stream: StreamName) -> bool:
        """Delete a stream with its groups. Return whether it existed."""
        ...

    async def publish(self, topic: StreamName, message: bytes) -> int:
        """Send a message to all present subscribers; return their number (on a cluster, those at one node).

        Raises StoreError."""
        ...

    async def subscribe(self, topic: StreamName) -> TopicSubscription:
        """Subscribe to a topic. Raises StoreError."""
        ...

    async def aclose(self) -> None: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc_info: object) -> None: ...
