"""What the store promises of events: durable streams with a group a reader, and topics without memory.

Two implementations stand behind one contract suite: Redis (`streams/redis_streams.py`) and the in-memory
twin.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NewType, Protocol, Self

from dynamo_redis.errors import InvalidRecord
from dynamo_redis.names import encode_segment

EntryId = NewType("EntryId", str)
"""An entry's place in its stream, `<ms>-<n>`. `entry_order` orders them."""

_ENTRY_ID: Final = re.compile(r"[0-9]{1,20}-[0-9]{1,20}")

BEGINNING = EntryId("0-0")
"""Before the first entry of any stream."""


GROUP_TTL_S: Final = 10.0
"""A reader gives a sign of life each third of it. A group that is silent for three times as long is
removed."""


def entry_order(entry_id: EntryId) -> tuple[int, int]:
    """What entry ids are ordered by."""
    ms, _, number = entry_id.partition("-")
    return int(ms), int(number or 0)


def check_entry_id(text: str, what: str) -> EntryId:
    """That a text is an entry's id. Raises InvalidRecord, which calls the value it stands in `what`."""
    if not _ENTRY_ID.fullmatch(text):
        raise InvalidRecord(what, f"{text!r} is not the id of an entry")
    return EntryId(text)


def just_before(ms: int) -> EntryId:
    """What is behind all entries that were appended before that millisecond."""
    return EntryId(f"{ms - 1}-{(1 << 64) - 1}") if ms > 0 else BEGINNING


@dataclass(frozen=True, slots=True)
class StreamName:
    """A stream or topic: of a component, by topic, in shards."""

    namespace: str
    component: str
    topic: str
    shard: int = 0

    @property
    def path(self) -> str:
        """`dynamo/backend/kv_events/0`, each part percent-encoded: the hash tag behind the prefix."""
        parts = map(encode_segment, (self.namespace, self.component, self.topic))
        return f"{'/'.join(parts)}/{self.shard}"


@dataclass(frozen=True, slots=True)
class NewEntry:
    """What is appended as one entry. `event_count` is what it counts towards the stream's ceiling."""

    content: bytes
    event_count: int


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry as it was read. `content` is empty if somebody else has written it."""

    entry_id: EntryId
    content: bytes


@dataclass(frozen=True, slots=True)
class GroupInfo:
    """A reader's group: how far it is, and since when it has been silent, by the server's clock."""

    name: str
    position: EntryId
    lag_count: int
    """Entries that it has not acknowledged; where the server does not count them, at most so many."""
    silent_s: float


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """A stream as it stands. `trim_floor` is the last entry that was ever trimmed, or BEGINNING."""

    name: StreamName
    entry_count: int
    event_count: int
    size_bytes: int
    last_entry_id: EntryId
    trim_floor: EntryId
    groups: tuple[GroupInfo, ...]


class EventGroup(Protocol):
    """One reader's consumer group in one stream, for one task. What it has not acknowledged is not trimmed,
    unless the stream is over its ceiling or the group is silent for too long (`GROUP_TTL_S`, three times)."""

    @property
    def name(self) -> str: ...

    async def create(self) -> EntryId:
        """Make the group (and the stream), at the stream's present end, which is answered: from now on
        nothing behind it is trimmed. A group of that name is moved there. Raises StoreError."""
        ...

    async def seek(self, position: EntryId) -> None:
        """Go on behind `position`: an entry, or the floor. Raises StreamTrimmed if what follows it has been
        trimmed or it is no position of this stream, StreamLost if the stream or the group is gone."""
        ...

    async def read(self, *, count: int, block_s: float) -> list[Entry]:
        """The next entries, in order; empty if there are none within `block_s` (at most 2). It is a sign of
        life, too. Raises StreamTrimmed if some were trimmed unread, StreamLost, StoreUnavailable; after
        that one what was read before, and not acknowledged, may come again. A cancelled read loses
        nothing."""
        ...

    async def acknowledge(self, entry_ids: Sequence[EntryId]) -> None:
        """These have been applied. May be sent with the next `read`. Raises StoreError."""
        ...

    async def aclose(self) -> None:
        """Remove the group and close its connection. Never raises for a dead server."""
        ...


class EventTail(Protocol):
    """Entries of one stream, without a group: for who can do without what was trimmed."""

    async def read(self, *, count: int, block_s: float) -> list[Entry]:
        """As `EventGroup.read`, but it never raises StreamTrimmed: it goes on with what is there."""
        ...

    async def aclose(self) -> None: ...


class TopicSubscription(Protocol):
    """Messages of one topic as they are published; those published while nobody listens are lost."""

    async def next(self, timeout_s: float) -> bytes | None:
        """The next message; None if there is none within `timeout_s`. Raises StoreError when the connection
        is gone: subscribe again, and take it as a gap."""
        ...

    async def aclose(self) -> None: ...


class EventStreams(Protocol):
    """A process's way to event streams and topics. It makes connections when needed; `aclose` closes them."""

    async def append(
        self, stream: StreamName, entries: Sequence[NewEntry], *, max_age_s: float | None = None
    ) -> None:
        """Append in order, in one round trip. With `max_age_s` entries older than that, by a sixtieth of it,
        are dropped; else the stream is held under its ceiling. Raises StoreUnavailable: some, in order, may
        have been appended, and to repeat all makes duplicates."""
        ...

    def group(self, stream: StreamName, name: str) -> EventGroup:
        """A reader's group, not yet made."""
        ...

    def tail(self, stream: StreamName, *, after: EntryId | None = None, max_age_s: float = 0.0) -> EventTail:
        """Read from behind `after`; else from what is younger than `max_age_s` on, by the server's clock."""
        ...

    async def time_ms(self) -> int:
        """Return the server's clock, by which entries have their ids. Raises StoreError."""
        ...

    async def trim(self, stream: StreamName, snapshot: EntryId) -> EntryId:
        """Drop what is no longer needed, up to the oldest of `snapshot` and the groups' positions; silent
        groups are removed first. Answers the floor: the last entry dropped. Raises StoreError."""
        ...

    async def keep_if_wanted(self, stream: StreamName) -> bool:
        """Whether a stream has a reader's group, or a snapshot from which a reader may go on: it was trimmed
        to that, and no further. Silent groups are removed first. One that has neither is deleted. Raises
        StoreError."""
        ...

    async def info(self, stream: StreamName) -> StreamInfo | None:
        """A stream as it stands, or None if there is none."""
        ...

    async def list(self, *, on_left_out: Callable[[str], None] | None = None) -> list[StreamInfo]:
        """All streams, ordered by name.

        `on_left_out` gets a sentence for each that cannot be read; None: it is logged.
        """
        ...

    async def delete(self, stream: StreamName) -> bool:
        """Delete a stream with its groups. Answers whether it was there."""
        ...

    async def publish(self, topic: StreamName, message: bytes) -> int:
        """Send to all that are subscribed now; answers how many, of a cluster those at one node. Raises
        StoreError."""
        ...

    async def subscribe(self, topic: StreamName) -> TopicSubscription:
        """Listen to a topic. Raises StoreError."""
        ...

    async def aclose(self) -> None: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc_info: object) -> None: ...
