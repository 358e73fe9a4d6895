"""The registry in memory: for tests, and for programs that run in one process.

Several registries share one `MemoryServer`, as they would share a Redis. It implements the rules of the Lua
scripts a second time: the contract suite runs on both, and a model test compares them. All calls are made on
one event loop. Leases count on the given clock.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from dynamo_redis.clock import SYSTEM_CLOCK, Clock
from dynamo_redis.errors import Compacted, ConfigError, LeaseNotFound
from dynamo_redis.names import new_instance_id
from dynamo_redis.store.base import (
    Compare,
    LeaseId,
    LostReason,
    PutOp,
    Record,
    Registration,
    Revision,
    Snapshot,
    Watch,
)
from dynamo_redis.store.keys import (
    ALWAYS_FIT_COUNT,
    TRANSACTION_MAX_BYTES,
    check_key,
    check_prefix,
    transaction_too_large,
)
from dynamo_redis.store.registry.change_log import Change, ChangeKind, Position, check_revision, order
from dynamo_redis.store.registry.lease import WriterChain
from dynamo_redis.store.registry.operations import KeyOperations
from dynamo_redis.store.registry.registrations import Registrations
from dynamo_redis.store.registry.scripts_api import (
    CompareFailed,
    LeaseState,
    Operation,
    OtherIncarnation,
    OwnedDelete,
    OwnedPut,
    Written,
    new_operation,
)
from dynamo_redis.store.registry.watch import Fanout

LOG_CHANGES_COUNT: Final = 10_000
PULSE_S: Final = 0.05


class MemoryServer:
    """The state of one registry. Every method is one atomic step, as a script is."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._followers: list[Callable[[Sequence[Change]], None]] = []
        self._wipe_followers: list[Callable[[], None]] = []
        self._revision_count = 0
        self._begin()

    @property
    def lease_count(self) -> int:
        """Number of leases, among them ended ones that are not reaped yet."""
        return len(self._deadlines)

    def _begin(self) -> None:
        self.incarnation = new_operation()
        self.records: dict[str, Record] = {}
        self.log: deque[Change] = deque(maxlen=LOG_CHANGES_COUNT)
        self._deadlines: dict[LeaseId, float] = {}
        self._last_writes: dict[LeaseId, str] = {}
        self._last: tuple[Revision, str] = (Revision("0-0"), "")
        self._fresh: list[Change] = []
        self._emit("i", "", None, new_operation())

    # ------------------------------------------------------------------ followers

    def follow(self, on_changes: Callable[[Sequence[Change]], None], on_wipe: Callable[[], None]) -> None:
        """Call `on_changes` for each step's changes and `on_wipe` for each wipe, on the event loop and in
        order."""
        self._followers.append(on_changes)
        self._wipe_followers.append(on_wipe)

    def unfollow(self, on_changes: Callable[[Sequence[Change]], None], on_wipe: Callable[[], None]) -> None:
        """Stop calling these functions."""
        self._followers.remove(on_changes)
        self._wipe_followers.remove(on_wipe)

    def _publish(self) -> None:
        changes, self._fresh = self._fresh, []
        if changes:
            for follower in self._followers:
                asyncio.get_running_loop().call_soon(follower, changes)

    def wipe(self) -> None:
        """Delete all state, as FLUSHALL does."""
        self._begin()
        self._fresh.clear()
        for follower in self._wipe_followers:
            asyncio.get_running_loop().call_soon(follower)

    def compact(self) -> None:
        """Delete the change log except its last entry."""
        last = self.log[-1]
        self.log.clear()
        self.log.append(last)

    # ------------------------------------------------------------------ steps

    @property
    def position(self) -> Position:
        """Position of the last change."""
        return Position(self.incarnation, *self._last)

    def reap(self) -> None:
        """End the leases that have expired."""
        operation = new_operation()
        now = self._clock.monotonic()
        for lease in [lease for lease, deadline in self._deadlines.items() if deadline <= now]:
            self._finish(lease, "x", operation)
        self._publish()

    def renew(self, incarnation: str, lease: LeaseId, ttl_s: float) -> bool:
        """Renew a lease; return False if it has ended."""
        self.reap()
        if incarnation != self.incarnation or lease not in self._deadlines:
            return False
        self._deadlines[lease] = self._clock.monotonic() + ttl_s
        return True

    def revoke(self, lease: LeaseId) -> None:
        """End a lease and delete its keys."""
        self.reap()
        self._finish(lease, "r", new_operation())
        self._publish()

    def read(self, keys: Sequence[str], lease: LeaseId | None) -> LeaseState:
        """Return the records of keys, and the state of a lease."""
        self.reap()
        found = {key: self.records[key] for key in keys if key in self.records}
        last_write = "" if lease is None else self._last_writes.get(lease, "")
        names = frozenset(key for key, record in self.records.items() if lease and record.lease == lease)
        return LeaseState(self.position, lease in self._deadlines, last_write, names, found)

    def snapshot(self, prefix: str) -> Snapshot:
        """Return all records under a prefix."""
        self.reap()
        keys = sorted(key for key in self.records if key.startswith(prefix))
        return Snapshot(tuple(self.records[key] for key in keys), self._last[0])

    def changes_after(self, revision: Revision) -> list[Change]:
        """Return the changes after a revision. Raises Compacted."""
        if revision == self._last[0]:
            return []
        changes = list(self.log)
        for index, change in enumerate(changes):
            if change.previous[0] == revision:
                return changes[index:]
        raise Compacted(revision)

    def write(
        self,
        operations: Sequence[Operation],
        compares: Sequence[Compare],
        incarnation: str,
        lease: LeaseId | None,
        ttl_s: float,
        operation: str,
    ) -> Written:
        """Apply operations if all comparisons hold."""
        self.reap()
        if incarnation not in ("", self.incarnation):
            raise OtherIncarnation(self.incarnation)
        keys = [*(op.key for op in operations), *(compare.key for compare in compares)]
        found_bytes = sum(len(self.records[key].value) for key in keys if key in self.records)
        if len(keys) > ALWAYS_FIT_COUNT and found_bytes > TRANSACTION_MAX_BYTES:
            raise ConfigError(transaction_too_large("finds", found_bytes))
        for index, compare in enumerate(compares):
            found = self.records.get(compare.key)
            if (found.mod_revision if found else None) != compare.mod_revision:
                raise CompareFailed(index, found)
        granted = lease is not None and lease not in self._deadlines
        if lease is not None and granted:
            if not ttl_s:
                raise LeaseNotFound("the lease has ended")
            self._deadlines[lease] = self._clock.monotonic() + ttl_s
        change_count = sum(self._apply(op, lease, operation) for op in operations)
        follows = "" if lease is None else self._last_writes.get(lease, "  ").split(" ")[1]
        if lease is not None and change_count:
            self._last_writes[lease] = " ".join((*self._last, follows))
        self._publish()
        return Written(self._last[0], granted, change_count, follows)

    # ------------------------------------------------------------------ inside a step

    def _apply(self, op: Operation, lease: LeaseId | None, operation: str) -> bool:
        old = self.records.get(op.key)
        owned = isinstance(op, OwnedDelete) or (isinstance(op, OwnedPut) and op.owned)
        if owned and (old is None or old.lease != lease):
            return False
        if isinstance(op, PutOp | OwnedPut):
            revision = self._next_revision()
            created, version = (old.create_revision, old.version + 1) if old else (revision, 1)
            record = Record(op.key, op.value, created, revision, version, lease)
            self.records[op.key] = record
            self._emit("p", op.key, lease, operation, record)
        elif old is None:
            return False
        else:
            self._remove(old, "d", operation)
        return True

    def _remove(self, record: Record, kind: ChangeKind, operation: str) -> None:
        del self.records[record.key]
        self._emit(kind, record.key, record.lease, operation)

    def _finish(self, lease: LeaseId, kind: ChangeKind, operation: str) -> None:
        for record in [record for record in self.records.values() if record.lease == lease]:
            self._remove(record, kind, operation)
        self._deadlines.pop(lease, None)
        self._last_writes.pop(lease, None)

    def _next_revision(self) -> Revision:
        self._revision_count += 1
        return Revision(f"{self._revision_count}-0")

    def _emit(
        self,
        kind: ChangeKind,
        key: str,
        lease: LeaseId | None,
        operation: str,
        record: Record | None = None,
    ) -> None:
        revision = record.mod_revision if record else self._next_revision()
        change = Change(revision, kind, key, lease, operation, self._last, record)
        self._last = (revision, operation)
        self.log.append(change)
        self._fresh.append(change)


class MemoryStorage:
    """A `MemoryServer` as `operations.Storage`."""

    timeout_s = 3.0

    async def pause(self, wait_s: float) -> None:
        await asyncio.sleep(wait_s)

    def __init__(self, server: MemoryServer) -> None:
        self.server = server

    async def read(self, keys: Sequence[str], lease: LeaseId | None = None) -> LeaseState:
        return self.server.read(keys, lease)

    async def snapshot(self, prefix: str) -> tuple[Snapshot, Position]:
        return self.server.snapshot(prefix), self.server.position

    async def write(
        self,
        operations: Sequence[Operation],
        *,
        compares: Sequence[Compare] = (),
        incarnation: str = "",
        lease: LeaseId | None = None,
        ttl_s: float = 0.0,
        operation: str | None = None,
    ) -> Written:
        return self.server.write(
            operations, compares, incarnation, lease, ttl_s, operation or new_operation()
        )


class MemoryRegistry(KeyOperations):
    """A process's view of a `MemoryServer`; see `base.Registry`.

    A task renews the lease, not a thread. An event loop that hangs stops the server as well, so
    `stalled_value` is never written.
    """

    def __init__(
        self,
        server: MemoryServer,
        clock: Clock = SYSTEM_CLOCK,
        *,
        ttl_s: float = 10.0,
        lease: LeaseId | None = None,
    ) -> None:
        storage = MemoryStorage(server)
        super().__init__(storage)
        self.connected = False
        self.write_refusal: str | None = None
        self._server = server
        self._clock = clock
        self._ttl_s = ttl_s
        self._lease = LeaseId(new_instance_id()) if lease is None else lease
        self._incarnation = ""
        self._renew_at = float("inf")
        self._fanout = Fanout()

        def on_grant(incarnation: str, _sent_at: float) -> None:
            self._incarnation = incarnation
            self._renew_at = clock.monotonic() + ttl_s / 2

        self._registrations = Registrations(
            storage, self._lease, ttl_s, WriterChain(), on_grant=on_grant, spread_s=lambda: 0.0
        )
        self._pulse: asyncio.Task[None] | None = None

    @property
    def lease_id(self) -> LeaseId:
        return self._lease

    @property
    def lease_ttl_s(self) -> float:
        return self._ttl_s

    @property
    def process_count(self) -> int:
        return self._server.lease_count

    @property
    def lease_losses(self) -> int:
        return self._registrations.lease_losses

    @property
    def outages(self) -> int:
        return 0

    @property
    def trips(self) -> None:
        return None

    async def start(self) -> None:
        if self._pulse is not None:
            return

        async def keep_alive() -> None:
            while True:
                await asyncio.sleep(min(PULSE_S, self._ttl_s / 8))
                self._server.reap()
                if self._clock.monotonic() >= self._renew_at:
                    if self._server.renew(self._incarnation, self._lease, self._ttl_s):
                        self._renew_at = self._clock.monotonic() + self._ttl_s / 2
                    else:
                        self._renew_at = float("inf")
                        self._registrations.disturb("the lease has ended")

        self.connected = True
        self._server.follow(self._on_changes, self._on_wipe)
        self._registrations.start(self._server.incarnation)
        self._pulse = asyncio.create_task(keep_alive(), name="memory registry")

    async def aclose(self) -> None:
        if self._pulse is None:
            return
        await self.abandon()
        self._server.revoke(self._lease)

    async def abandon(self) -> None:
        """Stop as a killed process does: the lease expires."""
        if self._pulse is not None:
            self._server.unfollow(self._on_changes, self._on_wipe)
            self._pulse.cancel()
            await asyncio.gather(self._pulse, return_exceptions=True)
            self._pulse = None
        await self._registrations.aclose()
        await self._fanout.aclose()
        self.connected = False

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
        return await self._registrations.register(
            check_key(key),
            value,
            exclusive=exclusive,
            stalled_value=stalled_value,
            prepare=prepare,
            on_lost=on_lost,
        )

    def watch(self, prefix: str, *, start_revision: Revision | None = None) -> Watch:
        if start_revision is not None:
            check_revision(start_revision)
        watch = self._fanout.watch(check_prefix(prefix), after=start_revision is not None)
        if not watch.view.is_loaded:
            watch.view.begin_load()
            snapshot = self._server.snapshot(prefix)
            watch.view.finish_load(snapshot, self._server.position)
        if start_revision is not None:
            joined = watch.join()
            try:
                changes = self._server.changes_after(start_revision)
            except Compacted as exc:
                watch.fail(exc)
            else:
                known = [change for change in changes if order(change.revision) <= order(joined.revision)]
                watch.begin_with(known, joined.revision)
        return watch

    # ------------------------------------------------------------------ called by the server

    def _on_changes(self, changes: Sequence[Change]) -> None:
        self._fanout.follow(changes)
        self._registrations.note(changes)

    def _on_wipe(self) -> None:
        reason = "the registry was wiped"
        for view in self._fanout.views.values():
            view.replace(self._server.snapshot(view.prefix), self._server.position, reason)
        self._registrations.disturb(reason)
