"""What the store promises: the registry, the object store and the locks, as Protocols.

Two implementations of each stand behind one contract suite: Redis (`registry/`, `objects/`, `locks/`)
and, in the same folders, the in-memory twins (`memory.py`). Nothing above this package knows which one it
has.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Literal, NewType, Protocol, Self

from dynamo_redis.errors import InvalidRecord

Revision = NewType("Revision", str)
"""The entry id of a change in the change log, `<ms>-<n>`. Opaque: compare for equality only."""

LeaseId = NewType("LeaseId", int)
"""A process's lease; also its instance id. 63 bits, random."""


# --------------------------------------------------------------------------- values


@dataclass(frozen=True, slots=True)
class Record:
    """A key as it stands: its value, and when it was made and last changed.

    `version` counts the writes since creation, from 1. `lease` is the lease the key dies with, or None. The
    value is kept out of the repr: an instance's holds its secret.
    """

    key: str
    value: bytes = field(repr=False)
    create_revision: Revision
    mod_revision: Revision
    version: int
    lease: LeaseId | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All live records under a prefix, ordered by key, as of `revision`. `invalid` are those that cannot be
    read, each with its key."""

    records: tuple[Record, ...]
    revision: Revision
    invalid: tuple[InvalidRecord, ...] = ()


class DeleteCause(StrEnum):
    """Why a key went away."""

    DELETED = "deleted"  # somebody deleted it
    REVOKED = "revoked"  # its lease was ended by its owner
    EXPIRED = "expired"  # its lease ran out
    RESYNC = "resync"  # absent after history was lost; the cause is unknown


@dataclass(frozen=True, slots=True)
class Put:
    """A key was created or changed."""

    record: Record


@dataclass(frozen=True, slots=True)
class Delete:
    """A key went away. `revision` is the change's own (of the snapshot, after a resync)."""

    key: str
    revision: Revision
    cause: DeleteCause


@dataclass(frozen=True, slots=True)
class WatchBatch:
    """Changes of one prefix, in the order of the log.

    The first batch of a watch is the state at its start (empty if there is none). `resync` is None for
    changes read from the log; otherwise history was lost for the reason it names, and the events are the
    difference by value between what this watch had reported and the server's state: afterwards the watcher
    is exactly at that state.
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
"""Why a registered key is no longer ours: somebody deleted it, or re-created it first (exclusive keys)."""


class Registration(Protocol):
    """A key that this process keeps in the registry for as long as it lives."""

    @property
    def key(self) -> str: ...

    @property
    def lost(self) -> LostReason | None:
        """None while the key is ours (or will be again once Redis is back)."""
        ...

    async def update(self, value: bytes, *, stalled_value: bytes | None = None) -> Revision:
        """Replace the value. Raises StoreError; an ambiguous failure is repaired in the background."""
        ...

    async def unregister(self) -> None:
        """Delete the key and forget it. Idempotent. Raises StoreError if Redis cannot be told: the key then
        ends with the lease."""
        ...


class Registry(Protocol):
    """One process's view of the registry: one lease, one log reader, any number of keys and watches.

    Cancellation-safe: a cancelled write may or may not have happened, and is repaired in the background if
    the key is registered. Reads and plain writes raise StoreUnavailable when Redis does not answer within
    `DYN_REDIS_TIMEOUT_S`; registered keys and watches survive any outage by themselves.
    """

    @property
    def lease_id(self) -> LeaseId:
        """This process's lease. The same id is granted again if the registry loses it."""
        ...

    @property
    def lease_ttl_s(self) -> float:
        """How long the lease outlives a process that dies."""
        ...

    @property
    def connected(self) -> bool:
        """Whether Redis answered the last read."""
        ...

    @property
    def write_refusal(self) -> str | None:
        """The reason why Redis takes no writes, or none that need memory, though it answers; None if it does.

        Meanwhile reads, watches and `start` work and no lease ends. Registered keys follow when they can.
        """
        ...

    @property
    def lease_losses(self) -> int:
        """How many times the lease had to be granted again, since start."""
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
        """Create or replace a key that outlives this process. Raises ConfigError for a value over 1 MiB, as
        all that write do."""
        ...

    async def create(self, key: str, value: bytes) -> Revision:
        """Create if absent. Raises KeyExists."""
        ...

    async def create_or_validate(self, key: str, value: bytes) -> Revision:
        """Create if absent; if it stands with the same value, answer its `mod_revision`. Raises KeyExists."""
        ...

    async def compare_and_put(self, key: str, value: bytes, expected: Revision | None) -> Revision:
        """Replace if `mod_revision` is `expected` (None: if absent). Raises RevisionMismatch."""
        ...

    async def delete(self, key: str) -> bool:
        """Delete a key, whoever owns it. Answers whether it was there."""
        ...

    async def transact(self, compares: Sequence[Compare], ops: Sequence[PutOp | DeleteOp]) -> Revision:
        """All operations, if all comparisons hold, atomically; answers the last revision.

        Raises RevisionMismatch, naming the first comparison that failed; nothing is written then. Raises
        ConfigError for more than 1,000 comparisons and operations, and, from the third of them on, for more
        than 2 MiB of values to write or of records that stand under the keys.
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

        It is written again, in the order of registration, when the registry lost it with its data; it is
        not brought back when somebody deleted it: `on_lost` is called, on the event loop. `exclusive` keys
        are created only if absent, now and later; a conflict raises KeyExists now, and is `on_lost` later.
        `stalled_value` replaces the value while the event loop hangs (see `DYN_LOOP_STALL_S`). `prepare` is
        awaited before the key is written *again*: it restores what the value refers to (uploaded files).
        While Redis refuses all writes (`write_refusal`), a key that is not `exclusive` is owed: it is written
        as soon as writes are taken. Raises StoreError otherwise; then nothing stays registered.
        """
        ...

    def watch(self, prefix: str, *, start_revision: Revision | None = None) -> Watch:
        """Watch a prefix: its present state first, then every change.

        With `start_revision`, no state: the changes after that revision. The first iteration raises
        Compacted if the log no longer holds it.
        """
        ...


# --------------------------------------------------------------------------- objects


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object as it stands. `created_at` in seconds since the epoch, by the server's clock."""

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
"""What can be stored: bytes, a file, or pieces of any size."""

Progress = Callable[[int, int | None], None]
"""Called with (bytes done, bytes in all or None)."""


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

        Content that is there already is not sent twice. `fence` is the held `Locks.object_lock` of this very
        object (ValueError if it is another): the object is replaced only if it is held at that moment, and
        no later holder has put it; otherwise LockLost is raised, and it has not been and will not be
        replaced. Raises StoreError; after StoreUnavailable it may or may not have been replaced.
        """
        ...

    def get(self, bucket: str, name: str) -> AsyncIterator[bytes]:
        """The content, chunk by chunk, each verified, in constant memory.

        Raises ObjectNotFound, and ObjectChanged if the version being read vanishes or is damaged.
        """
        ...

    async def read(self, bucket: str, name: str) -> bytes:
        """The whole content. Starts over once if the object changes meanwhile."""
        ...

    async def fetch(
        self, bucket: str, name: str, path: Path, *, progress: Progress | None = None
    ) -> ObjectInfo:
        """Write the content to a file, which appears only when whole. Starts over once, as `read` does."""
        ...

    async def info(self, bucket: str, name: str) -> ObjectInfo | None: ...

    async def holds(self, bucket: str, name: str, sha256: str) -> bool:
        """Whether the object is there with that content, all of it, as far as that is known without reading
        it. If not, a put makes it so."""
        ...

    async def list(
        self, bucket: str | None = None, *, on_left_out: Callable[[str], None] | None = None
    ) -> list[ObjectInfo]:
        """All objects, or those of one bucket, ordered by bucket and name.

        `on_left_out` gets a sentence for each that cannot be read; None: it is logged.
        """
        ...

    async def remove(self, bucket: str, name: str) -> bool:
        """Remove an object. Answers whether it was there."""
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
"""How long a lock outlives a holder that has died, unless said otherwise."""


@dataclass(frozen=True, slots=True)
class LockedValue:
    """What a lock protects: the bytes last written under it, and the fencing token of who wrote them."""

    value: bytes = field(repr=False)
    fencing_token: int


@dataclass(frozen=True, slots=True)
class LockHolder:
    """Who has a lock, for people: `process` is host and process id, `remaining_s` what is left of its TTL."""

    owner: str
    fencing_token: int
    process: str
    remaining_s: float


class HeldLock(Protocol):
    """A lock while it is held. Its methods may be called from any task of the event loop."""

    @property
    def name(self) -> str:
        """The lock's name; of an object's lock, the object's URL."""
        ...

    @property
    def owner(self) -> str:
        """Random, of this holding alone."""
        ...

    @property
    def fencing_token(self) -> int:
        """Higher than that of every holder before. A resource that keeps the highest token it has seen can
        refuse whoever comes with a lower one."""
        ...

    @property
    def lost(self) -> bool:
        """Whether the lock is held no longer: it was lost, its TTL may have passed, or the block is left."""
        ...

    async def write(self, value: bytes) -> None:
        """Replace the value that the lock protects, if it is held at that very moment.

        Writes of one holding take effect in the order of their calls. Raises LockLost: the value was not
        written, and will not be. Raises StoreUnavailable: it may or may not have been.
        """
        ...


class Lock(Protocol):
    """A lock that ends by itself when its holder dies. Not reentrant; any number of holdings may wait."""

    def hold(self, *, timeout_s: float = 0.0) -> AbstractAsyncContextManager[HeldLock]:
        """`async with lock.hold() as held:` runs the block while nobody else has the lock.

        Waits at most `timeout_s` for whoever has it, 0 is one try; then raises LockNotAcquired. In which
        order those who wait get it is not said. Raises StoreUnavailable if Redis has not answered when that
        time, or if longer `DYN_REDIS_TIMEOUT_S`, is over; StoreRefused if it says no.

        The lock is renewed while the block runs. When it is lost, and at the latest when 90 % of its TTL
        have passed since the last renewal was *sent*, the task that entered is cancelled and `hold` raises
        LockLost, as it does when the block ends by itself after that. Any other cancellation stays one. A
        block that will not be cancelled goes on, but its `write` is refused.
        """
        ...

    async def read(self) -> LockedValue | None:
        """The protected value, or None if there has been none. Needs no lock."""
        ...

    async def holder(self) -> LockHolder | None:
        """Who has the lock now."""
        ...


class Locks(Protocol):
    """The locks of a deployment, by name."""

    def lock(self, name: str, *, ttl_s: float = LOCK_TTL_S) -> Lock:
        """The lock `name`. Raises ConfigError for an empty name or a TTL under 0.1 s."""
        ...

    def object_lock(self, bucket: str, name: str, *, ttl_s: float = LOCK_TTL_S) -> Lock:
        """The lock of an object, which `ObjectStore.put(…, fence=held)` obeys."""
        ...

    async def aclose(self) -> None: ...
