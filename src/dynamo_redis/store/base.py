"""Protocols of the registry, the object store and the locks.

Each has two implementations that pass one contract suite: Redis (`registry/`, `objects/`, `locks/`) and, in
the same folders, an in-memory one (`memory.py`). Code above this package works with either.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Literal, NewType, Protocol, Self

from dynamo_redis.errors import InvalidRecord
from dynamo_redis.histogram import HistogramReading

Revision = NewType("Revision", str)
"""The entry id of a change in the change log, `<ms>-<n>`. Opaque: compare for equality only."""

LeaseId = NewType("LeaseId", int)
"""A process's lease; also its instance id. 63 bits, random."""


# --------------------------------------------------------------------------- values


@dataclass(frozen=True, slots=True)
class Record:
    """A key with its value and the revisions of its creation and last change.

    `version` counts the writes since creation, from 1. `lease` is the lease the key ends with, or None. The
    value is left out of the repr, since that of an instance holds its secret.
    """

    key: str
    value: bytes = field(repr=False)
    create_revision: Revision
    mod_revision: Revision
    version: int
    lease: LeaseId | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All live records under a prefix, ordered by key, as of `revision`.

    `invalid` has an error, with its key, for each record that cannot be read."""

    records: tuple[Record, ...]
    revision: Revision
    invalid: tuple[InvalidRecord, ...] = ()


class DeleteCause(StrEnum):
    """The cause of a key's deletion."""

    DELETED = "deleted"  # a caller deleted it
    REVOKED = "revoked"  # its lease was ended by its owner
    EXPIRED = "expired"  # its lease ran out
    RESYNC = "resync"  # absent after history was lost: the cause is unknown


@dataclass(frozen=True, slots=True)
class Put:
    """A key was created or changed."""

    record: Record


@dataclass(frozen=True, slots=True)
class Delete:
    """A key was deleted. `revision` is that of the change; after a resync, that of the snapshot."""

    key: str
    revision: Revision
    cause: DeleteCause


@dataclass(frozen=True, slots=True)
class WatchBatch:
    """Changes of one prefix, in the order of the log.

    The first batch of a watch is the state at its start (empty if there are no keys). `resync` is None for
    changes read from the log. Otherwise it is the reason why history was lost. The events are then the
    difference, by value, between the state that this watch had reported and the server's state. After them
    the watcher has exactly the server's state.
    """

    events: tuple[Put | Delete, ...]
    revision: Revision
    resync: str | None = None


# --------------------------------------------------------------------------- transactions


@dataclass(frozen=True, slots=True)
class Compare:
    """A condition on a key: its `mod_revision`, or None for "the key is absent"."""

    key: str
    mod_revision: Revision | None


@dataclass(frozen=True, slots=True)
class PutOp:
    """Write a key, without a lease."""

    key: str
    value: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class DeleteOp:
    """Delete a key; no effect if it is absent."""

    key: str


# --------------------------------------------------------------------------- registry


class Watch(Protocol):
    """Changes of one prefix. Iterate it once; `aclose()` or leaving `async with` ends it.

    It outlives Redis: while the server is away it is silent, and afterwards it goes on, with a resync if
    history was lost. A consumer that falls behind its bounded queue gets a resync too, never a gap.
    """

    def __aiter__(self) -> AsyncIterator[WatchBatch]: ...
    async def __anext__(self) -> WatchBatch: ...
    async def aclose(self) -> None: ...
    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *exc_info: object) -> None: ...


LostReason = Literal["deleted", "conflict"]
"""Reason for the loss of a registered key: it was deleted, or another process re-created it first (exclusive
keys)."""


class Registration(Protocol):
    """A key that this process keeps in the registry for as long as it lives."""

    @property
    def key(self) -> str: ...

    @property
    def lost(self) -> LostReason | None:
        """The reason why the key is lost; None while it is kept, or will be written again once Redis is
        back."""
        ...

    async def update(self, value: bytes, *, stalled_value: bytes | None = None) -> Revision:
        """Replace the value. Raises StoreError; a write of unknown outcome is repaired in the background."""
        ...

    async def unregister(self) -> None:
        """Delete the key and stop keeping it. Idempotent.

        Raises StoreError if the delete does not reach Redis: then the key ends with the lease."""
        ...


class Registry(Protocol):
    """One process's view of the registry: one lease, one log reader, any number of keys and watches.

    Cancellation-safe: a cancelled write may or may not have happened, and is repaired in the background if
    the key is registered. Reads and plain writes raise StoreUnavailable when Redis does not answer within
    `DYN_REDIS_TIMEOUT_S`; registered keys and watches survive any outage by themselves.
    """

    @property
    def lease_id(self) -> LeaseId:
        """Id of this process's lease. It is granted again under the same id if the registry loses it."""
        ...

    @property
    def lease_ttl_s(self) -> float:
        """TTL of the lease in seconds: the time after which it ends when its process has died."""
        ...

    @property
    def connected(self) -> bool:
        """True if Redis answered the last read."""
        ...

    @property
    def write_refusal(self) -> str | None:
        """The reason why Redis, though it answers, refuses writes, or those that need memory; None if it
        takes them.

        Meanwhile reads, watches and `start` work and no lease ends. Registered keys are written later.
        """
        ...

    @property
    def process_count(self) -> int:
        """Number of processes that hold a lease, as far as this one knows: it is at most some seconds old."""
        ...

    @property
    def lease_losses(self) -> int:
        """Number of times that the lease was granted again since the start."""
        ...

    @property
    def outages(self) -> int:
        """Number of times that Redis ceased to answer since the start."""
        ...

    @property
    def trips(self) -> HistogramReading | None:
        """The durations in seconds of this registry's commands that Redis answered; None without a Redis."""
        ...

    async def start(self) -> None:
        """Connect, check server and schema, and start the log reader.

        The lease is granted at the first `register`. Raises StoreUnavailable, StoreRefused or SchemaMismatch;
        then it may be called again. No effect once it has succeeded.
        """
        ...

    async def aclose(self) -> None:
        """Revoke the lease (its keys go at once), end watches and threads. Never raises for a dead Redis."""
        ...

    async def get(self, key: str) -> Record | None: ...

    async def get_prefix(self, prefix: str) -> Snapshot: ...

    async def put(self, key: str, value: bytes) -> Revision:
        """Create or replace a key that outlives this process; return its revision.

        Raises ConfigError for a value over 1 MiB, as every method that writes."""
        ...

    async def create(self, key: str, value: bytes) -> Revision:
        """Create if absent. Raises KeyExists."""
        ...

    async def create_or_validate(self, key: str, value: bytes) -> Revision:
        """Create if absent; if the key has the same value already, return its `mod_revision`. Raises
        KeyExists."""
        ...

    async def compare_and_put(self, key: str, value: bytes, expected: Revision | None) -> Revision:
        """Replace if `mod_revision` is `expected` (None: if absent). Raises RevisionMismatch."""
        ...

    async def delete(self, key: str) -> bool:
        """Delete a key, of any owner. Return whether it existed."""
        ...

    async def transact(self, compares: Sequence[Compare], ops: Sequence[PutOp | DeleteOp]) -> Revision:
        """Apply all operations atomically if all comparisons hold; return the last revision.

        Raises RevisionMismatch, which names the first comparison that failed; then nothing is written. Raises
        ConfigError for more than 1,000 comparisons and operations. With three or more of them, it is also
        raised for more than 2 MiB of values to write, or of present records under the keys.
        """
        ...

    async def register(
        self,
        key: str,
        value: bytes,
        *,
        exclusive: bool = False,
        stalled_value: bytes | None = None,
        prepare: Callable[[], Awaitable[None]] | None = None,
        on_lost: Callable[[LostReason], None] | None = None,
    ) -> Registration:
        """Write a key under this process's lease and keep it there.

        If the registry loses the key with its data, the key is written again, in the order of registration.
        A key that is deleted by a caller is not written again: it is lost, and `on_lost` is called.

        Args:
            exclusive: The key is created only if absent, now and when it is written again. A conflict raises
                KeyExists now, and calls `on_lost` later.
            stalled_value: Replaces the value while the event loop hangs (see `DYN_LOOP_STALL_S`). prepare:
            Awaited before the key is written *again*: it restores the files that the value refers to.
            on_lost: Called on the event loop, with the reason, when the key is lost.

        While Redis refuses all writes (`write_refusal`), a key that is not `exclusive` is registered without
        being written. It is written as soon as Redis takes writes. In every other case a failed write raises
        StoreError, and nothing stays registered.
        """
        ...

    def watch(self, prefix: str, *, start_revision: Revision | None = None) -> Watch:
        """Watch a prefix: its present state first, then every change.

        With `start_revision` the watch begins with the changes after that revision, without a state. The
        first iteration raises Compacted if the log no longer holds it.
        """
        ...


# --------------------------------------------------------------------------- objects


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object's metadata. `created_at` is in seconds since the epoch, by the server's clock."""

    bucket: str
    name: str
    size_bytes: int
    sha256: str
    chunk_count: int
    created_at: float

    @property
    def url(self) -> str:
        """`redis-object://bucket/name`."""
        return f"redis-object://{self.bucket}/{self.name}"


ObjectSource = bytes | Path | AsyncIterable[bytes]
"""Content to store: bytes, a file, or pieces of any size."""

Progress = Callable[[int, int | None], None]
"""Called with (bytes done, total bytes or None if unknown)."""


class ObjectStore(Protocol):
    """Files in Redis: chunked, checked, replaced atomically."""

    async def put(
        self,
        bucket: str,
        name: str,
        source: ObjectSource,
        *,
        progress: Progress | None = None,
        fence: HeldLock | None = None,
    ) -> ObjectInfo:
        """Store or replace. Readers see the old object until the new one is whole.

        Chunks that Redis has already are not sent again. `fence` is the held `Locks.object_lock` of this
        object; the lock of another object raises ValueError. With it, the object is replaced only if the lock
        is held at that moment and no later holder has put the object. Otherwise LockLost is raised: the
        object has not been replaced, and will not be. Raises StoreError; after StoreUnavailable the object
        may or may not have been replaced.
        """
        ...

    def get(self, bucket: str, name: str) -> AsyncIterator[bytes]:
        """Yield the content, chunk by chunk, each verified, in constant memory.

        Raises ObjectNotFound, and ObjectChanged if the version being read vanishes or is damaged.
        """
        ...

    async def read(self, bucket: str, name: str) -> bytes:
        """Return the whole content. Starts over once if the object changes meanwhile."""
        ...

    async def fetch(
        self, bucket: str, name: str, path: Path, *, progress: Progress | None = None
    ) -> ObjectInfo:
        """Write the content to a file, which appears only when complete. Starts over once, as `read` does."""
        ...

    async def info(self, bucket: str, name: str) -> ObjectInfo | None: ...

    async def holds(self, bucket: str, name: str, sha256: str) -> bool:
        """Return whether the object exists with all of that content, as far as is known without reading it.

        If not, a put stores it."""
        ...

    async def list(
        self, bucket: str | None = None, *, on_left_out: Callable[[str], None] | None = None
    ) -> list[ObjectInfo]:
        """Return all objects, or those of one bucket, ordered by bucket and name.

        `on_left_out` is called with a sentence for each object that cannot be read; None logs it.
        """
        ...

    async def remove(self, bucket: str, name: str) -> bool:
        """Remove an object. Return whether it existed."""
        ...

    async def aclose(self) -> None: ...


def parse_object_url(url: str) -> tuple[str, str]:
    """`redis-object://bucket/name` → (bucket, name). Raises ValueError."""
    scheme, _, rest = url.partition("://")
    bucket, _, name = rest.partition("/")
    if scheme != "redis-object" or not bucket or not name:
        raise ValueError(f"{url!r} is not an object URL: write redis-object://bucket/name")
    return bucket, name


# --------------------------------------------------------------------------- locks

LOCK_TTL_S = 10.0
"""Default TTL of a lock, in seconds: the time after which it ends when its holder has died."""


@dataclass(frozen=True, slots=True)
class LockedValue:
    """The bytes last written under a lock, and the fencing token of the holder that wrote them."""

    value: bytes = field(repr=False)
    fencing_token: int


@dataclass(frozen=True, slots=True)
class LockHolder:
    """The holder of a lock, for display: `process` is host and process id, `remaining_s` the rest of its
    TTL."""

    owner: str
    fencing_token: int
    process: str
    remaining_s: float


class HeldLock(Protocol):
    """A lock while it is held. Its methods may be called from any task of the event loop."""

    @property
    def name(self) -> str:
        """Name of the lock; for the lock of an object, the object's URL."""
        ...

    @property
    def owner(self) -> str:
        """Random id of this holding alone."""
        ...

    @property
    def fencing_token(self) -> int:
        """Number higher than that of every holder before. A resource that keeps the highest token it has seen
        can refuse calls with a lower one."""
        ...

    @property
    def lost(self) -> bool:
        """True once the lock is held no longer: it was lost, its TTL may have passed, or the block has
        ended."""
        ...

    async def write(self, value: bytes) -> None:
        """Replace the value that the lock protects, if it is held at that moment.

        Writes of one holding take effect in the order of their calls. After LockLost the value was not
        written, and will not be. After StoreUnavailable it may or may not have been written.
        """
        ...


class Lock(Protocol):
    """A lock that ends by itself when its holder dies. Not reentrant; any number of holdings may wait."""

    def hold(self, *, timeout_s: float = 0.0) -> AbstractAsyncContextManager[HeldLock]:
        """Hold the lock while a block runs: `async with lock.hold() as held:`.

        Waits at most `timeout_s` for the present holder (0: one attempt), then raises LockNotAcquired.
        Waiting callers get the lock in no particular order. Raises StoreUnavailable if Redis has not answered
        within `timeout_s` or `DYN_REDIS_TIMEOUT_S`, whichever is longer; StoreRefused if Redis refuses.

        The lock is renewed while the block runs. When it is lost, and at the latest when 90 % of its TTL
        have passed since the last renewal was *sent*, the task that entered is cancelled and `hold` raises
        LockLost. It also raises LockLost when the block ends by itself after that moment. Any other
        cancellation passes through. A block that suppresses its cancellation goes on, but its `write` is
        refused.
        """
        ...

    async def read(self) -> LockedValue | None:
        """Return the protected value, or None if none was written. Does not need the lock."""
        ...

    async def holder(self) -> LockHolder | None:
        """Return the present holder, or None."""
        ...


class Locks(Protocol):
    """The locks of a deployment, by name."""

    def lock(self, name: str, *, ttl_s: float = LOCK_TTL_S) -> Lock:
        """Return the lock `name`. Raises ConfigError for an empty name or a TTL under 0.1 s."""
        ...

    def object_lock(self, bucket: str, name: str, *, ttl_s: float = LOCK_TTL_S) -> Lock:
        """Return the lock of an object, for `ObjectStore.put(…, fence=held)`."""
        ...

    async def aclose(self) -> None: ...
