"""The keys that a process keeps in the registry under its lease, and their repair.

Writes of a lease are serial. A broken connection, lost history, an ended lease or a missing answer may have
lost a write. Then the registered keys are *repaired*: they are read in one call together with the lease's
state, compared, and written again where needed, each only if it has not changed since the read.

The reason why a key is absent decides whether it is written again. If the lease has lived on and its writer
chain is intact, a caller deleted the key: that is reported, not undone. Otherwise the key was lost with the
lease or with the registry's data: it is written again, in the order of registration.

A key under this lease that is not registered is a *stray*, and is deleted. It was left by a registration
whose answer was lost, or restored by a failover that lost its delete. When a stalled server runs a write
late, the log shows the write, and the keys are compared then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

from dynamo_redis.backoff import Backoff
from dynamo_redis.errors import KeyExists, LeaseNotFound, StoreError, StoreUnavailable
from dynamo_redis.store.base import Compare, LeaseId, LostReason, Record, Revision
from dynamo_redis.store.keys import ALWAYS_FIT_COUNT, check_value
from dynamo_redis.store.redis.deadline import Deadline
from dynamo_redis.store.redis.health import REFUSAL_FLAP_S, Trouble
from dynamo_redis.store.registry.change_log import Change, order
from dynamo_redis.store.registry.lease import WriterChain
from dynamo_redis.store.registry.operations import Storage
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
from dynamo_redis.supervision import Supervisor

logger = logging.getLogger(__name__)

NOT_YET_WRITTEN: Final = Revision("0-0")
"""Revision of a registered key that was never written: the server refused writes at its registration."""


class KeyRegistration:
    """A registered key; see `base.Registration`. Made by `Registrations.register`."""

    def __init__(
        self,
        owner: Registrations,
        key: str,
        value: bytes,
        *,
        exclusive: bool,
        stalled_value: bytes | None,
        prepare: Callable[[], Awaitable[None]] | None,
        on_lost: Callable[[LostReason], None] | None,
    ) -> None:
        self.value = value
        self.exclusive = exclusive
        self.stalled_value = stalled_value
        self.prepare = prepare
        self.on_lost = on_lost
        self.revision = Revision("")
        self.was_damaged = False  # its damaged record was deleted: to be written again
        self._key = key
        self._owner = owner
        self._lost: LostReason | None = None

    @property
    def key(self) -> str:
        return self._key

    @property
    def lost(self) -> LostReason | None:
        return self._lost

    async def update(self, value: bytes, *, stalled_value: bytes | None = None) -> Revision:
        return await self._owner.update(self, value, stalled_value)

    async def unregister(self) -> None:
        await self._owner.unregister(self)

    def lose(self, reason: LostReason) -> None:
        """Mark the key as lost, log that, and call `on_lost`."""
        self._lost = reason
        logger.warning("registered key %s was lost: %s", self._key, reason)
        if self.on_lost is not None:
            try:
                self.on_lost(reason)
            except Exception:
                logger.exception("on_lost of %s raised", self._key)


class Registrations:
    """All registered keys of one lease. Call `start` before the first registration; `aclose` stops repairs.

    `on_grant` is called with the incarnation and the time at which the granting call was sent. `spread_s`
    returns a random wait before keys are written again.
    """

    def __init__(
        self,
        kv: Storage,
        lease: LeaseId,
        ttl_s: float,
        chain: WriterChain,
        *,
        on_grant: Callable[[str, float], None],
        spread_s: Callable[[], float],
    ) -> None:
        self.lease_losses = 0
        self._kv = kv
        self._lease = lease
        self._ttl_s = ttl_s
        self._chain = chain
        self._on_grant = on_grant
        self._spread_s = spread_s
        self._entries: dict[str, KeyRegistration] = {}
        self._writing: set[str] = set()
        self._strays: set[str] = set()  # keys whose write or delete failed
        self._incarnation = ""
        self._held = False  # granted at least once
        self._may_grant = True  # whether the next grant is expected: the first, or that of a repair
        self._break_count = 0  # breaks of the lease's history, repaired up to `_repaired_count`
        self._repaired_count = 0
        self._serial = asyncio.Lock()
        self._repairing = asyncio.Lock()
        self._disturbed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._supervisor = Supervisor(logger, "registry repair")
        self._refusal: StoreError | None = None  # of the last write, while the server refuses writes
        self._deferring = Trouble(REFUSAL_FLAP_S)
        self._restoring = Trouble(REFUSAL_FLAP_S)

    def start(self, incarnation: str) -> None:
        """Start repairs in the background."""

        async def repair_on() -> None:
            backoff = Backoff()
            while True:
                await self._disturbed.wait()
                try:
                    await self._repair()
                    backoff.reset()
                except StoreError as exc:
                    self._disturbed.set()
                    logger.debug("repair: %s", exc)
                    await self._kv.pause(backoff.next_s())
                except Exception as exc:  # noqa: BLE001 - logged, with its traceback
                    self._disturbed.set()
                    self._supervisor.failed(exc)
                    await self._kv.pause(backoff.next_s())

        self._incarnation = incarnation
        self._task = asyncio.create_task(repair_on(), name="registry repair")

    async def aclose(self) -> None:
        """Stop repairs, and forget the keys."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._entries.clear()

    @property
    def held(self) -> bool:
        """True if the lease was ever granted."""
        return self._held

    @property
    def settled(self) -> bool:
        """True if no write and no comparison is due."""
        return not self._strays and not self._disturbed.is_set()

    def stalled_values(self) -> list[tuple[str, bytes]]:
        """Return keys and values to write while the event loop hangs. Called from another thread."""
        entries = list(self._entries.values())
        return [(entry.key, entry.stalled_value) for entry in entries if entry.stalled_value is not None]

    # ------------------------------------------------------------------ called by users

    async def register(
        self,
        key: str,
        value: bytes,
        *,
        exclusive: bool,
        stalled_value: bytes | None,
        prepare: Callable[[], Awaitable[None]] | None,
        on_lost: Callable[[LostReason], None] | None,
    ) -> KeyRegistration:
        """See `base.Registry.register`. One round trip. A key that this process keeps already: KeyExists."""
        check_value(value)
        if key in self._entries or key in self._writing:
            raise KeyExists(key)
        entry = KeyRegistration(
            self,
            key,
            value,
            exclusive=exclusive,
            stalled_value=stalled_value,
            prepare=prepare,
            on_lost=on_lost,
        )
        self._strays.discard(key)
        self._writing.add(key)
        try:
            async with self._in_time(), self._serial:
                written = await self._write_new(entry)
                entry.revision = written.revision
                self._entries[key] = entry
        except CompareFailed as exc:
            raise KeyExists(key) from exc
        except BaseException as exc:
            if exclusive or not isinstance(exc, StoreError) or not exc.refuses_writes:
                self._strays.add(key)
                raise
            # The server refuses all writes now. The key counts as lost, so a repair writes it.
            level = logging.WARNING if self._deferring.begin(exc.answer_code) else logging.DEBUG
            logger.log(level, "%s is registered as soon as Redis takes writes, like others: %s", key, exc)
            entry.revision = NOT_YET_WRITTEN
            self._entries[key] = entry
            self._break_count += 1
            self.disturb("a key could not be written yet")
        finally:
            self._writing.discard(key)
        return entry

    async def _write_new(self, entry: KeyRegistration) -> Written:
        puts = [OwnedPut(entry.key, entry.value)]
        if not entry.exclusive:
            return await self._write(puts, [], grant=True)
        try:
            return await self._write(puts, [Compare(entry.key, None)], grant=True)
        except CompareFailed as exc:
            if exc.found is None or exc.found.lease != self._lease:
                raise
            # Left under this lease by a registration whose answer was lost.
            return await self._write(puts, [Compare(entry.key, exc.found.mod_revision)], grant=True)

    async def update(
        self, entry: KeyRegistration, value: bytes, stalled_value: bytes | None = None
    ) -> Revision:
        """See `base.Registration.update`. Raises LeaseNotFound if the key is no longer registered."""
        check_value(value)
        async with self._in_time():
            async with self._serial:
                self._check_kept(entry)
                entry.value = value
                if stalled_value is not None:
                    entry.stalled_value = stalled_value
                written = None
                try:
                    written = await self._write([OwnedPut(entry.key, value, owned=True)], [], grant=False)
                except LeaseNotFound:
                    self.disturb("the lease ended")
                if written is not None and written.change_count:
                    entry.revision = written.revision
                    return written.revision
            await self._repair()
            self._check_kept(entry)
            return entry.revision

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """Bound the wait behind other writes of the lease, and the write itself, by one time-out.

        Raises the refusal of the last write if there was one, since it explains the wait; else
        StoreUnavailable.
        """
        try:
            async with Deadline(self._kv.timeout_s):
                yield
        except TimeoutError as exc:
            if self._refusal is not None:
                raise self._refusal from exc
            raise StoreUnavailable(
                f"Redis did not answer in time ({self._kv.timeout_s:g} s), this write or one before it"
            ) from exc

    def _check_kept(self, entry: KeyRegistration) -> None:
        if self._entries.get(entry.key) is not entry:
            raise LeaseNotFound(f"{entry.key} is no longer registered: {entry.lost or 'unregistered'}")

    async def unregister(self, entry: KeyRegistration) -> None:
        """See `base.Registration.unregister`."""
        if self._entries.get(entry.key) is not entry:
            return
        del self._entries[entry.key]
        self._strays.add(entry.key)
        try:
            async with self._in_time(), self._serial:
                if entry.key in self._entries:
                    return  # registered again meanwhile: the key belongs to the new registration
                try:
                    await self._write([OwnedDelete(entry.key)], [], grant=False)
                except LeaseNotFound:
                    logger.debug("%s ended with its lease", entry.key)
                self._strays.discard(entry.key)
        except BaseException:
            self.disturb("a key could not be deleted")
            raise

    # ------------------------------------------------------------------ writing

    async def _write(
        self, operations: Sequence[Operation], compares: Sequence[Compare], *, grant: bool
    ) -> Written:
        """Make one write of the lease; the caller holds `_serial`."""
        while True:
            operation, sent_at = new_operation(), time.monotonic()
            self._chain.begin(operation)
            try:
                written = await self._kv.write(
                    operations,
                    compares=compares,
                    incarnation=self._incarnation,
                    lease=self._lease,
                    ttl_s=self._ttl_s if grant else 0.0,
                    operation=operation,
                )
            except OtherIncarnation as exc:
                # The registry was replaced: the lease and its keys are gone.
                self._chain.acknowledged(operation, None)
                self._incarnation = exc.found
                self._break_count += 1
                self.disturb("the registry was replaced")
            except (CompareFailed, LeaseNotFound):
                self._chain.acknowledged(operation, None)
                raise
            except BaseException as exc:
                self._chain.in_doubt(operation)
                self.disturb("the outcome of a write is unknown")
                if isinstance(exc, StoreError):
                    self._refusal = exc if exc.refuses_writes else None
                raise
            else:
                self._refusal = None
                if written.granted or not self._held:
                    self._chain.settle("")
                    self._note_grant(sent_at)
                elif written.granted is None and grant:
                    # The lease was renewed; an earlier attempt whose answer was lost may have granted it
                    # again.
                    self._break_count += 1
                    self.disturb("the lease may have ended")
                    self._may_grant = False
                    self._on_grant(self._incarnation, sent_at)
                revision = written.revision if written.change_count else None
                if not self._chain.acknowledged(operation, revision, written.follows):
                    self.disturb("the registry lost a write")
                return written

    def _note_grant(self, sent_at: float) -> None:
        if self._held:
            self.lease_losses += 1
            logger.warning(
                "the lease was lost and has been granted again (%d times so far)", self.lease_losses
            )
        if not self._may_grant:
            self._break_count += 1
            self.disturb("the lease had ended")
        self._held, self._may_grant = True, False
        self._on_grant(self._incarnation, sent_at)

    # ------------------------------------------------------------------ noticing

    def disturb(self, reason: str) -> None:
        """Compare the keys with the registry soon, since a write may have been lost."""
        if not self._disturbed.is_set():
            logger.debug("registered keys will be compared with the registry: %s", reason)
        self._disturbed.set()

    def note(self, changes: Sequence[Change]) -> None:
        """Note changes in the log that concern the registered keys or the lease."""
        for change in changes:
            if change.kind in ("x", "r"):
                if change.lease == self._lease and self._held:
                    self.disturb("the lease ended")
                continue
            if (
                change.kind == "p"
                and change.lease == self._lease
                and not self._chain.expects(change.operation)
            ):
                self.disturb("a write whose outcome was unknown took effect")
            if change.key in self._writing:
                if change.lease != self._lease or change.kind == "d":
                    self.disturb("a key was changed while it was being registered")
                continue
            entry = self._entries.get(change.key)
            if entry is None or order(change.revision) <= order(entry.revision):
                continue
            if change.kind == "d" and change.lease is None:
                # Without a put of another lease before it: the record was ours, damaged, and is deleted now.
                entry.was_damaged = True
                self.disturb("a damaged record was deleted")
            elif change.kind in ("p", "d") and change.lease != self._lease:
                self._lose(entry, "conflict")  # deleted under another lease: its put took the key before
            elif change.kind == "d":
                self._lose(entry, "deleted")

    def _lose(self, entry: KeyRegistration, reason: LostReason) -> None:
        del self._entries[entry.key]
        entry.lose(reason)

    # ------------------------------------------------------------------ repairing

    async def _repair(self) -> None:
        async with self._repairing:
            self._disturbed.clear()
            try:
                breaks, again = await self._repair_once()
            except BaseException:
                self._disturbed.set()
                raise
            if again:
                raise StoreError("some keys could not be brought back yet")
            self._repaired_count = max(self._repaired_count, breaks)
            self._deferring.end()
            self._restoring.end()

    async def _repair_once(self) -> tuple[int, bool]:
        """Compare and restore. Return the count of breaks that this repaired, and whether some keys are
        left."""
        async with self._serial:
            state = await self._kv.read(list(self._entries), self._lease)
            # Note whether the lease's history is intact, and accept the registry's state as the present one.
            is_replaced = state.position.incarnation != self._incarnation
            self._incarnation = state.position.incarnation
            if self._held:
                if is_replaced or not state.alive or not self._chain.agrees(state.last_write):
                    self._break_count += 1
                self._may_grant = not state.alive
                self._chain.settle(state.last_write)
            breaks = self._break_count
            is_whole = breaks == self._repaired_count
            restore = self._compare(state, is_whole)
            await self._delete_strays(state.keys)
        if restore and not is_whole:
            again_count = sum(entry.revision != NOT_YET_WRITTEN for entry, _ in restore)
            if again_count and self._restoring.begin():
                logger.info("registering %d keys again", again_count)
            await asyncio.sleep(self._spread_s())
        left = False
        for entry, found in restore:
            left |= not await self._restore(entry, found)
        return breaks, left

    def _compare(self, state: LeaseState, is_whole: bool) -> list[tuple[KeyRegistration, Record | None]]:
        """Return the keys that have to be written again, with their present records; mark lost ones as lost.

        A record that cannot be read belongs to no process: scripts treat it as absent, and it is written
        again."""
        restore: list[tuple[KeyRegistration, Record | None]] = []
        for entry in list(self._entries.values()):
            record = state.records.get(entry.key)
            if entry.key in state.invalid:
                self._supervisor.skip(entry.key, state.invalid[entry.key])
                restore.append((entry, None))
            elif record is None and is_whole and not entry.was_damaged:
                self._lose(entry, "deleted")
            elif record is not None and record.lease != self._lease:
                self._lose(entry, "conflict")
            elif record is None or record.value != entry.value:
                restore.append((entry, record))
            else:
                entry.revision = record.mod_revision
        return restore

    async def _restore(self, entry: KeyRegistration, found: Record | None) -> bool:
        """Write a key again unless it has changed since `found`. Return False if it must be compared
        again."""
        if found is None and entry.prepare is not None:
            try:
                await entry.prepare()
            except StoreError:
                raise
            except Exception:
                logger.exception("cannot prepare %s to be registered again; trying again", entry.key)
                return False
        async with self._serial:
            if self._entries.get(entry.key) is not entry:
                return True
            compare = Compare(entry.key, found.mod_revision if found else None)
            try:
                written = await self._write([OwnedPut(entry.key, entry.value)], [compare], grant=True)
            except CompareFailed:
                return False
            entry.revision, entry.was_damaged = written.revision, False
            return True

    async def _delete_strays(self, names: frozenset[str]) -> None:
        """Delete the lease's keys that are not registered."""
        strays = sorted(names - self._entries.keys() - self._writing)
        for start in range(0, len(strays), ALWAYS_FIT_COUNT):
            page = strays[start : start + ALWAYS_FIT_COUNT]
            await self._write([OwnedDelete(key) for key in page], [], grant=False)
        self._strays.clear()
