"""Stores the index, so that a router that starts need not read the past; then the stream may be trimmed.

One snapshot a component, in the object store. It is replaced under the object's own fenced lock, and only by
one that is further in the stream: under the lock its position is read, and the put is refused if the lock is
lost before it takes effect. The stream is trimmed *after* that, so that at every moment there is a snapshot
from whose position the stream goes on. Who dies on the way leaves the old snapshot, or an untrimmed stream.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Final, cast

from dynamo_redis.errors import InvalidRecord, LockNotAcquired, ObjectNotFound, StoreError
from dynamo_redis.router.index.snapshot import Snapshot, decode_snapshot, encode_snapshot, snapshot_position
from dynamo_redis.store.base import LOCK_TTL_S, Locks, ObjectStore
from dynamo_redis.store.event_base import EntryId, EventStreams, StreamName, entry_order
from dynamo_redis.supervision import Supervisor

log = logging.getLogger(__name__)

SNAPSHOT_BUCKET: Final = "kv_snapshots"
CHECK_S: Final = 0.5
SPACING_S: Final = 30.0
"""Shortest time between two snapshots, whatever the events: Redis keeps a replaced one for ten minutes, for
those who read it, so that twenty of them are there at most."""

RETRY_S: Final = 5.0
"""Pause, jittered, after a snapshot that could not be stored, or that somebody else is storing."""

_MARKS_COUNT: Final = 64
"""So many places of the last threshold's events are remembered with what had been applied there."""


@dataclass(frozen=True, slots=True)
class StoredSnapshot:
    """The last snapshot that this router stored, or found stored by another. `at` in seconds since 1970."""

    position: EntryId
    at: float
    size_bytes: int
    block_count: int | None = None
    """None for another router's."""


class Snapshots:
    """The stored snapshot of one stream."""

    def __init__(
        self,
        objects: ObjectStore,
        locks: Locks,
        streams: EventStreams,
        stream: StreamName,
        *,
        decode: Callable[[bytes], Snapshot] = decode_snapshot,
        lock_ttl_s: float = LOCK_TTL_S,
    ) -> None:
        self._objects = objects
        self._lock = locks.object_lock(SNAPSHOT_BUCKET, stream.path, ttl_s=lock_ttl_s)
        self._lock_ttl_s = lock_ttl_s
        self._streams = streams
        self._stream = stream
        self._decode = decode
        self._unreadable: str | None = None  # the digest of a snapshot that was ignored

    async def load(self) -> tuple[Snapshot, StoredSnapshot] | None:
        """Read it. None if there is none, or none that can be read, which is logged. Raises StoreError."""
        content = b""
        try:
            content = await self._objects.read(SNAPSHOT_BUCKET, self._stream.path)
            # A second or less, of which the event loop gets its share: nobody is served yet.
            snapshot = await asyncio.to_thread(self._decode, content)
            return snapshot, await self._describe(EntryId(snapshot.position))
        except ObjectNotFound:
            return None
        except InvalidRecord as exc:
            log.warning("the snapshot of %s is ignored, it cannot be read: %s", self._stream.path, exc)
            self._unreadable = hashlib.sha256(content).hexdigest()
            return None

    async def position(self) -> EntryId | None:
        """How far the stored one is; None if there is none that can be read. Reads its first chunk. Raises
        StoreError."""
        info = await self._objects.info(SNAPSHOT_BUCKET, self._stream.path)
        if info is None or info.sha256 == self._unreadable:
            return None
        try:
            chunks = self._objects.get(SNAPSHOT_BUCKET, self._stream.path)
            head = await anext(chunks, b"")
            await cast("AsyncGenerator[bytes]", chunks).aclose()
            return EntryId(snapshot_position(head))
        except (ObjectNotFound, InvalidRecord):
            return None

    async def save(self, take: Callable[[], Snapshot], wanted: Callable[[EntryId], bool]) -> StoredSnapshot:
        """Take a snapshot, store it and trim the stream; unless what is stored is as far already, or is not
        to be replaced yet (`wanted`, of its position). Answers what is stored then.

        `take` is called once the lock is held. Raises LockNotAcquired if another router is storing one,
        LockLost, StoreError.
        """
        async with self._lock.hold() as held:
            stored = await self.position()
            if stored is not None and not wanted(stored):
                return await self._describe(stored)
            snapshot = take()
            position, block_count = EntryId(snapshot.position), snapshot.index.block_count
            if stored is not None and entry_order(stored) >= entry_order(position):
                return await self._describe(stored)
            pieces = encode_snapshot(snapshot)
            first = next(pieces)  # the copy is made now, before anything else is applied
            content = _turn_by_turn(first, pieces)
            info = await self._objects.put(SNAPSHOT_BUCKET, self._stream.path, content, fence=held)
        await self._streams.trim(self._stream, position)
        return StoredSnapshot(position, info.created_at, info.size_bytes, block_count)

    async def _describe(self, position: EntryId) -> StoredSnapshot:
        info = await self._objects.info(SNAPSHOT_BUCKET, self._stream.path)
        return StoredSnapshot(position, info.created_at if info else 0.0, info.size_bytes if info else 0)

    async def reset(self) -> None:
        """Remove the snapshot and delete the stream. Routers that run find the stream lost, and ask the
        workers. Raises StoreError."""
        async with self._lock.hold(timeout_s=2 * self._lock_ttl_s):
            await self._objects.remove(SNAPSHOT_BUCKET, self._stream.path)
            await self._streams.delete(self._stream)


class Snapshotter:
    """Stores a snapshot after each `threshold` events, and `SPACING_S` at least, in one task, until `aclose`.

    All routers of a component read the same stream, so they come to this at the same time: one gets the lock;
    the others look again a little later, find its snapshot, and count from there.
    """

    def __init__(
        self,
        snapshots: Snapshots,
        take: Callable[[], Snapshot],
        settle: Callable[[float], Awaitable[bool]],
        threshold: int,
    ) -> None:
        """`take` answers the index as it stands. Before, `settle` is awaited, with a time-out, so that few
        workers are missing in it."""
        self.last: StoredSnapshot | None = None
        self.stored_count = 0
        self.failed_count = 0
        self._snapshots = snapshots
        self._take = take
        self._settle = settle
        self._threshold = threshold
        self._marks: deque[tuple[EntryId, int]] = deque(maxlen=_MARKS_COUNT)
        self._event_count = 0
        self._done_count = 0
        self._done_at = -SPACING_S
        self._task: asyncio.Task[None] | None = None
        self._supervisor = Supervisor(log, "KV snapshots")

    def start(self) -> None:
        """Begin to look, each `CHECK_S`."""
        self._task = asyncio.create_task(self._supervisor.run(self._run), name="store KV snapshots")

    async def aclose(self) -> None:
        """Stop. A snapshot that is being stored is given up; the old one stays."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def note(self, position: EntryId, event_count: int) -> None:
        """An entry of so many events has been applied."""
        self._event_count += event_count
        if not self._marks or self._event_count - self._marks[-1][1] >= self._threshold / _MARKS_COUNT:
            self._marks.append((position, self._event_count))

    def found(self, snapshot: StoredSnapshot) -> None:
        """That one is stored: the next is due `threshold` events after it."""
        self.last = snapshot
        self._done_count = self._count_at(snapshot.position)
        self._done_at = time.monotonic()

    async def save(self) -> StoredSnapshot:
        """Store one now, unless one is stored that is young enough. Raises as `Snapshots.save`."""
        taken: list[Snapshot] = []

        def take() -> Snapshot:
            taken.append(self._take())
            return taken[0]

        snapshot = await self._snapshots.save(take, self._is_due_after)
        self.stored_count += len(taken)
        self.found(snapshot)
        return snapshot

    def _is_due(self) -> bool:
        return self._event_count - self._done_count >= self._threshold

    def _is_due_after(self, position: EntryId) -> bool:
        return self._event_count - self._count_at(position) >= self._threshold

    def _count_at(self, position: EntryId) -> int:
        """How many events had been applied there, to within a mark."""
        order = entry_order(position)
        counts = [count for marked, count in self._marks if entry_order(marked) <= order]
        return counts[-1] if counts else 0

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(CHECK_S)
            if self._is_due() and time.monotonic() - self._done_at >= SPACING_S:
                await self._settle(RETRY_S)
                await self._try()

    async def _try(self) -> None:
        try:
            snapshot = await self.save()
        except LockNotAcquired as exc:
            log.debug("%s", exc)
            await self._pause()
        except StoreError as exc:
            self.failed_count += 1
            log.warning("a KV snapshot was not stored, trying again: %s", exc)
            await self._pause()
        else:
            log.info("KV snapshot at %s: %d bytes", snapshot.position, snapshot.size_bytes)

    async def _pause(self) -> None:
        await asyncio.sleep(RETRY_S * random.uniform(0.5, 1.0))  # noqa: S311 - jitter


async def _turn_by_turn(first: bytes, pieces: Iterator[bytes]) -> AsyncGenerator[bytes]:
    """Others get their turn of the event loop between two pieces."""
    yield first
    for piece in pieces:
        await asyncio.sleep(0)
        yield piece
