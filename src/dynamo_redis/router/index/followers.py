"""Reads a component's KV events: from a durable stream through a group of its own, or from a topic.

Both give each batch to an `Intake`, in order, and tell it when events may have been missed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

from dynamo_redis.backoff import Backoff
from dynamo_redis.errors import StoreError, StreamLost, StreamTrimmed
from dynamo_redis.router.index.recovery import SLICE_S
from dynamo_redis.router.index.snapshot import IndexSnapshot
from dynamo_redis.router.pace import Pace
from dynamo_redis.store.event_base import (
    BEGINNING,
    Entry,
    EntryId,
    EventGroup,
    EventStreams,
    StreamName,
    TopicSubscription,
    entry_order,
)

log = logging.getLogger(__name__)

READ_COUNT: Final = 1024
"""Most entries of one read. The group reads fewer if the entries are large."""

BLOCK_S: Final = 1.0

PACE_S: Final = 0.01
"""Shortest time between two reads while events come one by one."""

UNPACED_COUNT: Final = 256
"""A read that returned this many entries or more is followed by the next at once."""

DEFECT_PAUSE_S: Final = 1.0


class Intake(Protocol):
    """Applies the batches that were read. Only `apply` and `note_applied` are called often."""

    def apply(self, content: bytes) -> int:
        """Apply one message or entry; return the number of its events. Never raises."""
        ...

    def note_applied(self, shard: int, position: EntryId, event_count: int) -> None:
        """Note that the entry of a shard at `position`, of `event_count` events, was applied."""
        ...

    def restore(self, snapshot: IndexSnapshot) -> None:
        """Begin with a snapshot. Called once at most, before any other method."""
        ...

    def note_possible_loss(self) -> None:
        """Note that events of any worker may have been missed."""
        ...

    def note_caught_up(self, shard: int) -> None:
        """Note that all events of a shard that were there when reading began have been read. Idempotent."""
        ...


LoadSnapshot = Callable[[], Awaitable[IndexSnapshot | None]]
"""Returns the stored snapshot, or None if there is none that can be read. Raises StoreError."""


class SnapshotStart:
    """The snapshot from which the followers of all shards begin: loaded and restored once."""

    def __init__(self, load: LoadSnapshot, intake: Intake) -> None:
        self._load = load
        self._intake = intake
        self._lock = asyncio.Lock()
        self._positions: tuple[EntryId, ...] | None = None
        self._restored = False

    async def position(self, shard: int) -> EntryId:
        """Return the snapshot's position in a shard; the first call restores the snapshot before it returns.

        BEGINNING without a snapshot. Raises StoreError; then the next call tries again."""
        async with self._lock:
            if not self._restored:
                snapshot = await self._load()
                if snapshot is not None:
                    self._intake.restore(snapshot)
                    self._positions = snapshot.positions
                self._restored = True
        return BEGINNING if self._positions is None else self._positions[shard]


class _Follower:
    """The common part of both followers: whether events can be read, and since when they cannot."""

    def __init__(self) -> None:
        self.cut_off_count = 0
        """Number of times that reading had to begin anew."""
        self._unread_since: float | None = time.monotonic()

    @property
    def connected(self) -> bool:
        """True while events can be read."""
        return self._unread_since is None

    @property
    def disconnected_s(self) -> float:
        """Seconds for which events could not be read; 0 while they can."""
        return 0.0 if self._unread_since is None else time.monotonic() - self._unread_since

    def _set_connected(self, connected: bool) -> None:
        if connected != self.connected:
            self._unread_since = None if connected else time.monotonic()


class StreamFollower(_Follower):
    """Follows a stream, or one shard. `run` ends only by cancellation; `aclose` then removes the group.

    The group is made first, so that no entry behind its position is trimmed. Then the snapshot is read, and
    the group moved to the snapshot's position. If entries behind that position have been trimmed, reading
    begins at the stream's end, and the workers are asked for the events between. They are also asked when the
    stream or the group is lost, when entries were trimmed unread, and when the connection broke: a Redis that
    was restarted, or replaced, may have lost its last writes.
    """

    def __init__(
        self,
        streams: EventStreams,
        stream: StreamName,
        group_name: str,
        intake: Intake,
        start: SnapshotStart,
    ) -> None:
        super().__init__()
        self.position: EntryId = BEGINNING
        """The last entry that was applied."""
        self._group: EventGroup = streams.group(stream, group_name)
        self._stream = stream
        self._intake = intake
        self._start = start
        self._has_begun = False
        self._end: EntryId | None = None  # the stream's, when reading began; None: begin anew
        self._may_have_lost = False  # events, since the last read; the intake is not told yet
        self._pace = Pace(PACE_S, UNPACED_COUNT)

    async def run(self) -> None:
        """Read and apply, for ever."""
        backoff = Backoff()
        while True:
            try:
                if self._end is None:
                    self._end = await self._begin()
                    self._note_caught_up(self._end)
                entries = await self._group.read(count=READ_COUNT, block_s=BLOCK_S)
                if self._may_have_lost:
                    self._intake.note_possible_loss()
                    self._may_have_lost = False
                if not self.connected:
                    log.info("KV events of %s are followed from %s", self._stream.path, self.position)
                    self._set_connected(True)
                await self._apply(entries)
                self._note_caught_up(self._end if entries else self.position)
                await self._pace.wait(len(entries))
            except (StreamTrimmed, StreamLost) as exc:
                log.warning("KV events of %s begin anew: %s", self._stream.path, exc)
                self.cut_off_count += 1
                self._end, self._may_have_lost = None, True
                await asyncio.sleep(backoff.next_s())
            except StoreError as exc:
                if self.connected:
                    log.warning("KV events of %s cannot be read, trying again: %s", self._stream.path, exc)
                self._set_connected(False)
                self._may_have_lost = True
                if self._end is None:  # `read` waits by itself before it tries again
                    await asyncio.sleep(backoff.next_s())
            except Exception:
                # A defect. If following ended here the index would go stale, and no error would show it.
                log.exception("KV events of %s begin anew", self._stream.path)
                self._end, self._may_have_lost = None, True
                await asyncio.sleep(DEFECT_PAUSE_S)
            else:
                backoff.reset()

    async def aclose(self) -> None:
        """Remove the group."""
        await self._group.aclose()

    async def _begin(self) -> EntryId:
        """Make the group, and at the first time move it to the snapshot. Return the stream's end."""
        end = await self._group.create()
        if self._has_begun:
            self.position = end
            return end
        position = await self._start.position(self._stream.shard)
        try:
            if entry_order(position) > entry_order(end):
                raise StreamTrimmed(f"the stream ends at {end}, before the snapshot's {position}")
            await self._group.seek(position)
        except StreamTrimmed as exc:
            log.info("KV events of %s begin at their end, workers are asked: %s", self._stream.path, exc)
            position = end
            self._may_have_lost = True
        self._has_begun = True
        self.position = position
        return end

    async def _apply(self, entries: Sequence[Entry]) -> None:
        """Apply entries, with pauses for other tasks, and acknowledge them."""
        began_at = time.monotonic()
        for entry in entries:
            event_count = self._intake.apply(entry.content)
            self.position = entry.entry_id
            self._intake.note_applied(self._stream.shard, entry.entry_id, event_count)
            if time.monotonic() - began_at > SLICE_S:
                await asyncio.sleep(0)
                began_at = time.monotonic()
        if entries:
            await self._group.acknowledge([entry.entry_id for entry in entries])

    def _note_caught_up(self, end: EntryId) -> None:
        if entry_order(self.position) >= entry_order(end):
            self._intake.note_caught_up(self._stream.shard)


class TopicFollower(_Follower):
    """Follows a topic. `run` ends only by cancellation.

    Earlier messages cannot be read, so the workers are asked at the start, and after each broken
    connection.
    """

    def __init__(self, streams: EventStreams, topic: StreamName, intake: Intake) -> None:
        super().__init__()
        self._streams = streams
        self._topic = topic
        self._intake = intake
        self._subscription: TopicSubscription | None = None

    async def run(self) -> None:
        """Read and apply, for ever."""
        backoff = Backoff()
        while True:
            try:
                if self._subscription is None:
                    self._subscription = await self._streams.subscribe(self._topic)
                    self._set_connected(True)
                    self._intake.note_possible_loss()
                    self._intake.note_caught_up(self._topic.shard)
                subscription = self._subscription
                message = await subscription.next(BLOCK_S)
                until = time.monotonic() + SLICE_S
                while message is not None:
                    self._intake.apply(message)
                    if time.monotonic() > until:
                        await asyncio.sleep(0)
                        break
                    message = await subscription.next(BLOCK_S)
            except StoreError as exc:
                if self.connected:
                    log.warning("KV events of %s are interrupted: %s", self._topic.path, exc)
                    self.cut_off_count += 1
                self._set_connected(False)
                await self.aclose()
                await asyncio.sleep(backoff.next_s())
            except Exception:
                log.exception("KV events of %s begin anew", self._topic.path)  # as in the stream's follower
                self._set_connected(False)
                await self.aclose()
                await asyncio.sleep(DEFECT_PAUSE_S)
            else:
                backoff.reset()

    async def aclose(self) -> None:
        """Unsubscribe."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.aclose()
