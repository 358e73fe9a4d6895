"""Event streams in memory, for tests and for a single process: the same contract, no server.

All users of the streams share one `MemoryEventStreams`, in the place of a server. It implements the rules of
the Lua scripts a second time; the contract suite runs on both. All calls are made on one event loop.
"""

from __future__ import annotations

import asyncio
import builtins
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Self

from dynamo_redis.clock import SYSTEM_CLOCK, Clock
from dynamo_redis.config import EventSettings
from dynamo_redis.errors import StreamLost, StreamTrimmed
from dynamo_redis.store.event_base import (
    BEGINNING,
    GROUP_TTL_S,
    Entry,
    EntryId,
    EventGroup,
    EventTail,
    GroupInfo,
    NewEntry,
    StreamInfo,
    StreamName,
    TopicSubscription,
    entry_order,
    just_before,
)

_TOPIC_MESSAGES_COUNT: Final = 10_000
"""Most messages that one subscription holds. Further ones are lost, as on a server that drops a slow
reader."""


@dataclass(frozen=True, slots=True)
class _Stored:
    entry: Entry
    event_count: int


@dataclass(slots=True)
class _Group:
    position: EntryId
    """The last entry that was delivered to it."""
    seen: float
    pending: builtins.list[Entry] = field(default_factory=list)

    @property
    def kept_behind(self) -> EntryId:
        """Position before the first entry that the group still needs."""
        if not self.pending:
            return self.position
        ms, number = entry_order(self.pending[0].entry_id)
        return EntryId(f"{ms}-{number - 1}") if number else just_before(ms)


class MemoryStream:
    """The state of one stream. Every method is one atomic step, as a script is."""

    def __init__(self, name: StreamName, clock: Clock) -> None:
        self._name = name
        self._clock = clock
        self.entries: deque[_Stored] = deque()
        self.groups: dict[str, _Group] = {}
        self.last = BEGINNING
        self.floor = BEGINNING
        self.snapshot: EntryId | None = None
        self.appended = asyncio.Event()
        """Set, and replaced, when something is appended or the stream is deleted."""

    def append(self, new: Sequence[NewEntry], settings: EventSettings, max_age_s: float | None) -> None:
        for entry in new:
            ms, number = entry_order(self.last)
            now_ms = int(self._clock.wall() * 1000)
            self.last = EntryId(f"{now_ms}-0" if now_ms > ms else f"{ms}-{number + 1}")
            self.entries.append(_Stored(Entry(self.last, entry.content), entry.event_count))
        if max_age_s is not None:
            oldest_ms = (self._clock.wall() - max_age_s) * 1000
            while self.entries and entry_order(self.entries[0].entry.entry_id)[0] < oldest_ms:
                self._drop_first()
        while len(self.entries) > 1 and (
            self.event_count > settings.event_stream_events_count
            or self.size_bytes > settings.event_stream_size_bytes
        ):
            for _ in range(-(-len(self.entries) // 16)):
                self._drop_first()
        self.wake()

    def _drop_first(self) -> None:
        self.floor = self.entries.popleft().entry.entry_id

    def wake(self) -> None:
        """Wake the readers that wait for entries."""
        self.appended.set()
        self.appended = asyncio.Event()

    @property
    def event_count(self) -> int:
        return sum(stored.event_count for stored in self.entries)

    @property
    def size_bytes(self) -> int:
        return sum(len(stored.entry.content) for stored in self.entries)

    # ------------------------------------------------------------------ groups

    def place(self, name: str, position: EntryId) -> None:
        self.groups[name] = _Group(position, self._clock.monotonic())

    def seek(self, name: str, position: EntryId) -> None:
        if name not in self.groups:
            raise StreamLost(f"the group {name} is gone")
        known = {stored.entry.entry_id for stored in self.entries} | {self.floor, self.last}
        if position not in known or entry_order(position) < entry_order(self.floor):
            raise StreamTrimmed(f"{self._name.path} has been trimmed up to {self.floor}")
        self.place(name, position)

    def read(self, name: str, count: int) -> list[Entry]:
        group = self.groups.get(name)
        if group is None:
            raise StreamLost(f"the group {name} is gone")
        group.seen = self._clock.monotonic()
        self._remove_silent()
        if entry_order(group.position) < entry_order(self.floor):
            raise StreamTrimmed(f"{self._name.path} has been trimmed up to {self.floor}")
        entries = self.behind(group.position, count)
        group.pending += entries
        if entries:
            group.position = entries[-1].entry_id
        return entries

    def acknowledge(self, name: str, entry_ids: Sequence[EntryId]) -> None:
        group = self.groups.get(name)
        if group is not None:
            done = set(entry_ids)
            group.pending = [entry for entry in group.pending if entry.entry_id not in done]

    def behind(self, position: EntryId, count: int) -> list[Entry]:
        after = entry_order(position)
        found: list[Entry] = []
        for stored in self.entries:
            if len(found) == count:
                break
            if entry_order(stored.entry.entry_id) > after:
                found.append(stored.entry)
        return found

    def trim(self, snapshot: EntryId) -> EntryId:
        self._remove_silent()
        self.snapshot = snapshot
        needed = [snapshot, self.last, *(group.kept_behind for group in self.groups.values())]
        cut = min(map(entry_order, needed))
        while self.entries and entry_order(self.entries[0].entry.entry_id) <= cut:
            self._drop_first()
        return self.floor

    def is_wanted(self) -> bool:
        self._remove_silent()
        if self.groups:
            return True
        return self.snapshot is not None and entry_order(self.snapshot) >= entry_order(self.floor)

    def _remove_silent(self) -> None:
        now = self._clock.monotonic()
        for name, group in tuple(self.groups.items()):
            if now - group.seen > 3 * GROUP_TTL_S:
                del self.groups[name]

    def info(self) -> StreamInfo:
        now = self._clock.monotonic()
        return StreamInfo(
            self._name,
            len(self.entries),
            self.event_count,
            self.size_bytes,
            self.last,
            self.floor,
            tuple(
                GroupInfo(
                    name,
                    group.kept_behind,
                    len(self.behind(group.kept_behind, len(self.entries))),
                    now - group.seen,
                )
                for name, group in sorted(self.groups.items())
            ),
        )


class MemoryEventStreams:
    """`EventStreams` in dictionaries. `aclose` has no effect, since other users share it."""

    def __init__(self, settings: EventSettings | None = None, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._settings = settings or EventSettings()
        self._clock = clock
        self._streams: dict[StreamName, MemoryStream] = {}
        self._topics: dict[StreamName, set[_MemorySubscription]] = {}

    def wipe(self) -> None:
        """Delete all streams, as a server that restarts without its data."""
        for stream in tuple(self._streams):
            self._delete(stream)

    async def append(
        self, stream: StreamName, entries: Sequence[NewEntry], *, max_age_s: float | None = None
    ) -> None:
        """As `EventStreams.append`."""
        if entries:
            self.stream(stream).append(entries, self._settings, max_age_s)

    def group(self, stream: StreamName, name: str) -> EventGroup:
        """As `EventStreams.group`."""
        return _MemoryGroup(self, stream, name)

    def tail(self, stream: StreamName, *, after: EntryId | None = None, max_age_s: float = 0.0) -> EventTail:
        """As `EventStreams.tail`."""
        oldest = just_before(int((self._clock.wall() - max_age_s) * 1000))
        return _MemoryTail(self, stream, after or oldest)

    async def time_ms(self, stream: StreamName) -> int:
        """As `EventStreams.time_ms`."""
        return int(self._clock.wall() * 1000)

    async def trim(self, stream: StreamName, snapshot: EntryId) -> EntryId:
        """As `EventStreams.trim`."""
        return self.existing(stream).trim(snapshot)

    async def keep_if_wanted(self, stream: StreamName) -> bool:
        """As `EventStreams.keep_if_wanted`."""
        found = self._streams.get(stream)
        if found is None or found.is_wanted():
            return found is not None
        self._delete(stream)
        return False

    async def info(self, stream: StreamName) -> StreamInfo | None:
        """As `EventStreams.info`."""
        found = self._streams.get(stream)
        return None if found is None else found.info()

    async def list(self, *, on_left_out: Callable[[str], None] | None = None) -> builtins.list[StreamInfo]:
        """As `EventStreams.list`."""
        found = sorted(
            self._streams,
            key=lambda name: (name.namespace, name.component, name.topic, name.shards_count, name.shard),
        )
        return [self._streams[name].info() for name in found]

    async def delete(self, stream: StreamName) -> bool:
        """As `EventStreams.delete`."""
        return self._delete(stream)

    def _delete(self, stream: StreamName) -> bool:
        found = self._streams.pop(stream, None)
        if found is None:
            return False
        found.groups.clear()
        found.wake()
        return True

    def stream(self, name: StreamName) -> MemoryStream:
        """Return a stream; create it if it does not exist."""
        if name not in self._streams:
            self._streams[name] = MemoryStream(name, self._clock)
        return self._streams[name]

    def existing(self, name: StreamName) -> MemoryStream:
        """Return a stream. Raises StreamLost if it does not exist."""
        found = self._streams.get(name)
        if found is None:
            raise StreamLost(f"the event stream {name.path} is gone")
        return found

    # ------------------------------------------------------------------ topics

    async def publish(self, topic: StreamName, message: bytes) -> int:
        """As `EventStreams.publish`."""
        subscribed = self._topics.get(topic, set())
        for subscription in subscribed:
            subscription.put(message)
        return len(subscribed)

    async def subscribe(self, topic: StreamName) -> TopicSubscription:
        """As `EventStreams.subscribe`."""
        subscribed = self._topics.setdefault(topic, set())
        subscription = _MemorySubscription(subscribed)
        subscribed.add(subscription)
        return subscription

    async def aclose(self) -> None:
        """Do nothing: there are no resources to release."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()


class _MemoryGroup:
    def __init__(self, streams: MemoryEventStreams, stream: StreamName, name: str) -> None:
        self.name: Final = name
        self._streams = streams
        self._stream = stream

    async def create(self) -> EntryId:
        stream = self._streams.stream(self._stream)
        stream.place(self.name, stream.last)
        return stream.last

    async def seek(self, position: EntryId) -> None:
        self._streams.existing(self._stream).seek(self.name, position)

    async def read(self, *, count: int, block_s: float) -> list[Entry]:
        stream = self._streams.existing(self._stream)
        entries = stream.read(self.name, count)
        if not entries:
            await _wait(stream, block_s)
            entries = self._streams.existing(self._stream).read(self.name, count)
        return entries

    async def acknowledge(self, entry_ids: Sequence[EntryId]) -> None:
        with suppress(StreamLost):
            self._streams.existing(self._stream).acknowledge(self.name, entry_ids)

    async def aclose(self) -> None:
        with suppress(StreamLost):
            self._streams.existing(self._stream).groups.pop(self.name, None)


class _MemoryTail:
    def __init__(self, streams: MemoryEventStreams, stream: StreamName, after: EntryId) -> None:
        self._streams = streams
        self._stream = stream
        self._after = after

    async def read(self, *, count: int, block_s: float) -> list[Entry]:
        stream = self._streams.stream(self._stream)
        entries = stream.behind(self._after, count)
        if not entries:
            await _wait(stream, block_s)
            entries = self._streams.stream(self._stream).behind(self._after, count)
        if entries:
            self._after = entries[-1].entry_id
        return entries

    async def aclose(self) -> None:
        """Do nothing: there are no resources to release."""


class _MemorySubscription:
    def __init__(self, subscribed: set[_MemorySubscription]) -> None:
        self._subscribed = subscribed
        self._messages: asyncio.Queue[bytes] = asyncio.Queue(_TOPIC_MESSAGES_COUNT)

    def put(self, message: bytes) -> None:
        with suppress(asyncio.QueueFull):
            self._messages.put_nowait(message)

    async def next(self, timeout_s: float) -> bytes | None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                return await self._messages.get()
        return None

    async def aclose(self) -> None:
        self._subscribed.discard(self)


async def _wait(stream: MemoryStream, block_s: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(min(block_s, 2.0)):
            await stream.appended.wait()
