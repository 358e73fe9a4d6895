"""Stores the index, so that a router that starts need not read old events; then the stream may be trimmed.

There is one snapshot a component, in the object store. It is replaced under the object's own fenced lock, and
only by one that is further in the stream, and not behind in any shard of it: the stored positions are read
under the lock, and the put is refused if the lock is lost before it takes effect. The stream is trimmed
*after* that. So at every moment there is a snapshot from whose positions the stream goes on. A router that
dies on the way leaves the old snapshot, or an untrimmed stream.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, cast

from dynamo_redis.errors import InvalidRecord, LockNotAcquired, ObjectNotFound, StoreError
from dynamo_redis.router.index.snapshot import (
    IndexSnapshot,
    decode_snapshot,
    encode_snapshot,
    snapshot_positions,
)
from dynamo_redis.store.base import LOCK_TTL_S, Locks, ObjectStore
from dynamo_redis.store.event_base import EntryId, EventStreams, StreamName, entry_order
from dynamo_redis.supervision import Supervisor

log = logging.getLogger(__name__)

SNAPSHOT_BUCKET: Final = "kv_snapshots"
CHECK_S: Final = 0.5
SPACING_S: Final = 30.0
"""Shortest time between two snapshots, at any rate of events. Redis keeps a replaced one for ten minutes, for
its readers; so there are twenty of them at most."""

RETRY_S: Final = 5.0
"""Pause, jittered, after a snapshot that could not be stored, or that another router is storing."""

_MARKS_COUNT: Final = 64
"""Positions that are remembered, with the number of events applied there; they span one threshold."""


@dataclass(frozen=True, slots=True)
class StoredSnapshot:
    """The last snapshot that this or another router stored. `at` is in seconds since 1970."""

    positions: tuple[EntryId, ...]
    """In each shard of the stream."""
    at: float
    size_bytes: int
    block_count: int | None = None
    """None if another router stored it."""

    @property
    def position(self) -> str:
        """The positions as text."""
        return positions_text(self.positions)


def positions_text(positions: Sequence[EntryId]) -> str:
    """Return positions for display: an entry id, or one for each shard."""
    return ",".join(positions)


class Snapshots:
    """The stored snapshot of one stream, or of all shards of one. It is named as the first of them."""

    def __init__(
        self,
        objects: ObjectStore,
        locks: Locks,
        streams: EventStreams,
        shards: Sequence[StreamName],
        *,
        decode: Callable[[bytes], IndexSnapshot] = decode_snapshot,
        lock_ttl_s: float = LOCK_TTL_S,
    ) -> None:
        self._objects = objects
        self._name = shards[0].path
        self._lock = locks.object_lock(SNAPSHOT_BUCKET, self._name, ttl_s=lock_ttl_s)
        self._lock_ttl_s = lock_ttl_s
        self._streams = streams
        self._shards = shards
        self._decode = decode
        self._unreadable: str | None = None  # the digest of a snapshot that was ignored

    async def load(self) -> tuple[IndexSnapshot, StoredSnapshot] | None:
        """Read the snapshot; None if there is none, or if it cannot be read, which is logged. Raises
        StoreError."""
        content = b""
        try:
            content = await self._objects.read(SNAPSHOT_BUCKET, self._name)
            # It takes a second or less, shared with the event loop: no request is served yet.
            snapshot = await asyncio.to_thread(self._decode, content)
            if len(snapshot.positions) != len(self._shards):
                raise InvalidRecord(f"the snapshot of {self._name}", "it is of another number of shards")
            return snapshot, await self._describe(snapshot.positions)
        except ObjectNotFound:
            return None
        except InvalidRecord as exc:
            log.warning("the snapshot of %s is ignored, it cannot be read: %s", self._name, exc)
            self._unreadable = hashlib.sha256(content).hexdigest()
            return None

    async def positions(self) -> tuple[EntryId, ...] | None:
        """Return the stored snapshot's positions; None if there is none that can be read. Reads its first
        chunk. Raises StoreError."""
        info = await self._objects.info(SNAPSHOT_BUCKET, self._name)
        if info is None or info.sha256 == self._unreadable:
            return None
        try:
            chunks = self._objects.get(SNAPSHOT_BUCKET, self._name)
            head = await anext(chunks, b"")
            await cast("AsyncGenerator[bytes]", chunks).aclose()
            positions = snapshot_positions(head)
        except (ObjectNotFound, InvalidRecord):
            return None
        return positions if len(positions) == len(self._shards) else None

    async def save(
        self, take: Callable[[], IndexSnapshot], is_due_after: Callable[[Sequence[EntryId]], bool]
    ) -> StoredSnapshot:
        """Take a snapshot, store it and trim the stream. Return the snapshot that is stored then.

        It stores none if the stored one is as far already in any shard where it differs, or if `is_due_after`
        of its positions is False.
        `take` is called once the lock is held. Raises LockNotAcquired if another router is storing one,
        LockLost, StoreError.
        """

        async def with_pauses(first: bytes, pieces: Iterator[bytes]) -> AsyncGenerator[bytes]:
            """Let other tasks run between two pieces."""
            yield first
            for piece in pieces:
                await asyncio.sleep(0)
                yield piece

        async with self._lock.hold() as held:
            stored = await self.positions()
            if stored is not None and not is_due_after(stored):
                return await self._describe(stored)
            snapshot = take()
            positions, block_count = snapshot.positions, snapshot.index.block_count
            if stored is not None and not _is_further(positions, stored):
                return await self._describe(stored)
            pieces = encode_snapshot(snapshot)
            first = next(pieces)  # the copy is made now, before any other event is applied
            content = with_pauses(first, pieces)
            info = await self._objects.put(SNAPSHOT_BUCKET, self._name, content, fence=held)
        for shard, position in zip(self._shards, positions, strict=True):
            await self._streams.trim(shard, position)
        return StoredSnapshot(positions, info.created_at, info.size_bytes, block_count)

    async def _describe(self, positions: tuple[EntryId, ...]) -> StoredSnapshot:
        """Describe the stored snapshot, which has these positions. Raises StoreError."""
        info = await self._objects.info(SNAPSHOT_BUCKET, self._name)
        return StoredSnapshot(positions, info.created_at if info else 0.0, info.size_bytes if info else 0)

    async def reset(self) -> None:
        """Remove the snapshot and delete the stream. Routers that run then find the stream lost, and ask the
        workers. Raises StoreError."""
        async with self._lock.hold(timeout_s=2 * self._lock_ttl_s):
            await self._objects.remove(SNAPSHOT_BUCKET, self._name)
            for shard in self._shards:
                await self._streams.delete(shard)


def _is_further(positions: Sequence[EntryId], stored: Sequence[EntryId]) -> bool:
    """Return whether positions are behind the stored ones in no shard, and further in some."""
    ours, theirs = list(map(entry_order, positions)), list(map(entry_order, stored))
    return ours != theirs and all(our >= their for our, their in zip(ours, theirs, strict=True))


class Snapshotter:
    """Stores a snapshot after each `threshold` events, but not before `SPACING_S` have passed. It owns one
    task, until `aclose`.

    All routers of a component read the same stream, so a snapshot is due in all of them at the same time. One
    gets the lock; the others try again a little later, find its snapshot, and count from there.
    """

    def __init__(
        self,
        snapshots: Snapshots,
        take: Callable[[], IndexSnapshot],
        wait_until_idle: Callable[[float], Awaitable[bool]],
        threshold: int,
    ) -> None:
        """`take` returns the present index. `wait_until_idle` is awaited before it, with a time-out, so that
        few workers are missing from the snapshot."""
        self.last: StoredSnapshot | None = None
        self.stored_count = 0
        self.failed_count = 0
        self._snapshots = snapshots
        self._take = take
        self._wait_until_idle = wait_until_idle
        self._threshold = threshold
        self._marks: dict[int, deque[tuple[EntryId, int]]] = {}
        """By shard: positions, and the number of its events that had been applied there."""
        self._event_counts: Counter[int] = Counter()
        """Events applied of each shard."""
        self._done_count = 0
        self._done_at = -SPACING_S
        self._task: asyncio.Task[None] | None = None
        self._supervisor = Supervisor(log, "KV snapshots")

    def start(self) -> None:
        """Begin to check every `CHECK_S` whether a snapshot is due."""

        async def store_on() -> None:
            while True:
                await asyncio.sleep(CHECK_S)
                is_due = self._event_counts.total() - self._done_count >= self._threshold
                if not is_due or time.monotonic() - self._done_at < SPACING_S:
                    continue
                await self._wait_until_idle(RETRY_S)
                try:
                    snapshot = await self.save()
                except StoreError as exc:
                    if isinstance(exc, LockNotAcquired):
                        log.debug("%s", exc)
                    else:
                        self.failed_count += 1
                        log.warning("a KV snapshot was not stored, trying again: %s", exc)
                    await asyncio.sleep(RETRY_S * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
                else:
                    log.info("KV snapshot at %s: %d bytes", snapshot.position, snapshot.size_bytes)

        self._task = asyncio.create_task(self._supervisor.run(store_on), name="store KV snapshots")

    async def aclose(self) -> None:
        """Stop. A snapshot that is being stored is given up, and the old one stays."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def note_applied(self, shard: int, position: EntryId, event_count: int) -> None:
        """Note that the entry of a shard at `position`, of `event_count` events, was applied."""
        self._event_counts[shard] += event_count
        applied_count = self._event_counts[shard]
        marks = self._marks.setdefault(shard, deque(maxlen=_MARKS_COUNT))
        if not marks or applied_count - marks[-1][1] >= self._threshold / _MARKS_COUNT:
            marks.append((position, applied_count))

    async def load(self) -> IndexSnapshot | None:
        """Load the stored snapshot, and count events from there on. Return None if there is none that can be
        read. Raises StoreError."""
        stored = await self._snapshots.load()
        if stored is None:
            return None
        snapshot, described = stored
        self.note_stored(described)
        return snapshot

    def note_stored(self, snapshot: StoredSnapshot) -> None:
        """Note the snapshot that is stored now: the next is due `threshold` events after it."""
        self.last = snapshot
        self._done_count = self._count_at(snapshot.positions)
        self._done_at = time.monotonic()

    async def save(self) -> StoredSnapshot:
        """Store a snapshot now, unless the stored one is young enough. Raises as `Snapshots.save`."""
        taken: list[IndexSnapshot] = []

        def take() -> IndexSnapshot:
            taken.append(self._take())
            return taken[0]

        def is_due_after(positions: Sequence[EntryId]) -> bool:
            return self._event_counts.total() - self._count_at(positions) >= self._threshold

        snapshot = await self._snapshots.save(take, is_due_after)
        self.stored_count += len(taken)
        self.note_stored(snapshot)
        return snapshot

    def _count_at(self, positions: Sequence[EntryId]) -> int:
        """Return the number of events that had been applied at these positions, to within a mark a shard."""
        found = 0
        for shard, position in enumerate(positions):
            order = entry_order(position)
            counts = [count for marked, count in self._marks.get(shard, ()) if entry_order(marked) <= order]
            found += counts[-1] if counts else 0
        return found
