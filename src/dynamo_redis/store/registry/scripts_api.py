"""The registry's scripts as typed calls: read, write, snapshot, log, and the life of a lease.

Each method runs one script once, unless its docstring says otherwise, and takes at most the client's
time-out. A registry that is missing or damaged is created first. A script's answer that is no result is
raised as an exception: SchemaMismatch, LeaseNotFound, CompareFailed, OtherIncarnation.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgpack

from dynamo_redis.backoff import Backoff
from dynamo_redis.errors import (
    ConfigError,
    InvalidRecord,
    LeaseNotFound,
    SchemaMismatch,
    StoreError,
    StoreRefused,
    StoreUnavailable,
)
from dynamo_redis.store.base import Compare, DeleteOp, LeaseId, PutOp, Record, Revision, Snapshot
from dynamo_redis.store.keys import SCHEMA_VERSION, RegistryKeys, format_lease, transaction_too_large
from dynamo_redis.store.redis.base import StoreClient
from dynamo_redis.store.redis.blocking import Argument
from dynamo_redis.store.redis.page_size import PAGE_BYTES, PageSize
from dynamo_redis.store.redis.threads import ThreadScripts
from dynamo_redis.store.registry.change_log import (
    Change,
    Position,
    order,
    parse_change,
    parse_record,
    parse_records,
    size_bytes,
)
from dynamo_redis.store.scripts import Script, load_script

PAGE_KEYS_COUNT: Final = 1000
"""Most keys in a page of a snapshot, which also ends at `PAGE_BYTES`: scripts are short, answers are
small."""
READ_KEYS_COUNT: Final = 500
PAGE_ENTRIES_COUNT: Final = 500
CLIENT_COUNT: Final = re.compile(rb"^connected_clients:(\d+)", re.MULTILINE)
_PRELUDES: Final = ("registry_clock", "registry_prelude")
SNAPSHOT_ATTEMPTS_COUNT: Final = 5


class Wiped(StoreError):
    """There is no registry, or a part of it is gone. Raised only in the keepalive's thread."""


class OtherIncarnation(StoreError):
    """The registry was replaced: all state of the one that the caller knew is lost. `found` is the new
    one."""

    def __init__(self, found: str) -> None:
        super().__init__(f"the registry was replaced: it is {found} now")
        self.found = found


class HistoryLost(StoreError):
    """The log does not connect to the position it was read from."""


class OutcomeUnknown(StoreUnavailable):
    """A repeated write was not made, and it is no longer known whether the first attempt was."""


class CompareFailed(StoreError):
    """A comparison did not hold; `found` is the key's record, or None. Nothing was written."""

    def __init__(self, index: int, found: Record | None) -> None:
        super().__init__(f"comparison {index} failed")
        self.index = index
        self.found = found


@dataclass(frozen=True, slots=True)
class OwnedPut:
    """Write a key under the caller's lease; if `owned`, only if the key is under that lease already."""

    key: str
    value: bytes = field(repr=False)
    owned: bool = False


@dataclass(frozen=True, slots=True)
class OwnedDelete:
    """Delete a key if it is under the caller's lease."""

    key: str


Operation = PutOp | DeleteOp | OwnedPut | OwnedDelete


@dataclass(frozen=True, slots=True)
class Written:
    """The result of a write. `revision` is that of its last change, or the registry's if it changed nothing.

    `granted` is None if the write was repeated, and the first attempt may have granted the lease. `follows`
    is the operation of the lease's previous write: "" if there is none, None if it is unknown.
    """

    revision: Revision
    granted: bool | None
    change_count: int
    follows: str | None = ""


@dataclass(frozen=True, slots=True)
class LeaseState:
    """A lease and the records of some keys, at one moment.

    `last_write` is the last write of the lease's owner, `"revision operation previous"`, or "". `keys` are
    the names of all keys of the lease. Records that cannot be read are in `invalid`, by key.
    """

    position: Position
    alive: bool
    last_write: str
    keys: frozenset[str]
    records: dict[str, Record]
    invalid: Mapping[str, InvalidRecord] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Tick:
    """The result of a tick: live leases, ended leases that are left, and the time without a tick before it.

    `full`: the server's memory is full, so it refuses writes that need more.
    """

    lease_count: int
    overdue_count: int
    idle_s: float
    full: bool = False


@dataclass(frozen=True, slots=True)
class Renewal:
    """The result of a renewal. `last_write` is that of the lease's owner, `"revision operation previous"` or
    "".

    `lease_count` includes ended leases that are not yet reaped. `idle_s` is the time without a tick. `full`
    as in `Tick`.
    """

    last_write: str
    lease_count: int
    idle_s: float
    full: bool = False


def new_operation() -> str:
    """Return a random operation id of 64 bits."""
    return secrets.token_hex(8)


def encode_write(
    incarnation: str,
    operation: str,
    repeats_after: str,
    lease: LeaseId | None,
    ttl_s: float,
    compares: Sequence[Compare],
    operations: Sequence[Operation],
) -> tuple[Argument, ...]:
    """Return the ARGV of `registry_write`, which documents them.

    Args:
        incarnation: Incarnation that the caller knows; "" for any.
        operation: Operation id of the call and its repetitions.
        repeats_after: For a repetition, a log entry from before the first attempt; else "".
        lease: Lease to write under, if any.
        ttl_s: TTL with which an ended lease is granted again; 0: not at all.
        compares: Conditions of the write.
        operations: Changes to make.
    """
    request = (
        [(compare.key, compare.mod_revision or "") for compare in compares],
        [_encode(op) for op in operations],
    )
    return (
        incarnation,
        operation,
        repeats_after,
        format_lease(lease),
        round(ttl_s * 1000),
        msgpack.packb(request, use_bin_type=False),
    )


def _encode(operation: Operation) -> tuple[str, str, bytes, int]:
    match operation:
        case PutOp(key, value):
            return ("p", key, value, 0)
        case OwnedPut(key, value, owned):
            return ("p", key, value, int(owned))
        case DeleteOp(key):
            return ("d", key, b"", 0)
        case OwnedDelete(key):
            return ("d", key, b"", 1)


def checked(answer: list[Any]) -> list[Any]:
    """Return the rest of an 'ok' answer. Raises the exception for any other answer."""
    match answer:
        case [b"ok", *rest]:
            return rest
        case [b"wiped"]:
            raise Wiped("the registry is not there")
        case [b"incarnation", found]:
            raise OtherIncarnation(found.decode())
        case [b"schema", found]:
            raise SchemaMismatch(
                "the registry",
                found.decode("utf-8", "replace"),
                SCHEMA_VERSION,
                remedy="upgrade the older side, or choose another DYN_REDIS_PREFIX",
            )
        case [b"large", size_bytes]:
            raise ConfigError(transaction_too_large("finds", int(size_bytes)))
        case [b"no-lease"]:
            raise LeaseNotFound("the lease has ended")
        case [b"unknown"]:
            raise OutcomeUnknown("too much was written since to tell whether the write took effect")
        case _:
            raise StoreError(f"a registry script answered {answer!r:.200}")


def parse_written(keys: Sequence[str], answer: list[Any]) -> Written:
    """Read an answer of `registry_write`; `keys` are those of its comparisons."""
    if answer[0] == b"failed":
        index = int(answer[1])
        try:
            found = parse_record(keys[index], answer[2])
        except InvalidRecord:
            found = None  # scripts treat it as absent: a write replaces it
        raise CompareFailed(index, found)
    revision, granted, changes, follows = checked(answer)
    return Written(
        Revision(revision.decode()),
        {0: False, 1: True}.get(granted),
        int(changes),
        None if follows is None else follows.decode(),
    )


def _position(fields: Sequence[bytes]) -> Position:
    incarnation, revision, operation = fields
    return Position(incarnation.decode(), Revision(revision.decode()), operation.decode())


class KeyValue:
    """One registry, through one client."""

    WRITE: Final = load_script("registry_write", *_PRELUDES)
    KEEPALIVE: Final = load_script("registry_keepalive", "registry_clock")
    _INIT: Final = load_script("registry_init", *_PRELUDES)
    _READ: Final = load_script("registry_read", *_PRELUDES)
    _SNAPSHOT: Final = load_script("registry_snapshot", *_PRELUDES)
    _TICK: Final = load_script("registry_tick", *_PRELUDES)
    _REVOKE: Final = load_script("registry_revoke", *_PRELUDES)

    def __init__(self, client: StoreClient, keys: RegistryKeys) -> None:
        self.client = client
        self.keys = keys
        self.log_page = PageSize(PAGE_ENTRIES_COUNT)
        """Number of log entries to read at once, shared by all readers of the log."""
        self._seen = ""  # a recent log entry, as "revision operation"

    @property
    def timeout_s(self) -> float:
        """Longest wait for one answer."""
        return self.client.timeout_s

    async def pause(self, wait_s: float) -> None:
        """Wait before another attempt, as `RedisClient.pause`."""
        await self.client.pause(wait_s)

    async def _run(self, script: Script, *args: Argument, lease: LeaseId | None = None) -> list[Any]:
        """Run a script, and repeat it while it answers `again`. A registry that is missing is created
        first."""
        keys = self.keys.structures if lease is None else (*self.keys.structures, self.keys.lease(lease))
        made = False
        while True:
            answer: list[Any] = await self.client.script(script, keys, args)
            if answer == [b"wiped"] and not made:
                await self.initialize()
                made = True
            elif answer != [b"again"]:
                return answer

    def saw(self, position: Position) -> Position:
        """Remember the last log entry read: later writes follow it."""
        self._seen = f"{position.revision} {position.operation}"
        return position

    # ------------------------------------------------------------------ the registry itself

    async def initialize(self) -> Position:
        """Create the registry if it is missing or damaged; return its position. Raises SchemaMismatch.

        Writes nothing if it is intact, so this works on a server that refuses writes.
        """
        args = ("", new_operation(), new_operation(), SCHEMA_VERSION)
        answer = await self.client.script(self._INIT, self.keys.structures, args)
        return self.saw(_position(checked(answer)))

    async def position(self) -> Position | None:
        """Read the registry's position by one plain command; return None if there is no registry."""
        fields = await self.client.execute("HMGET", self.keys.meta, "inc", "rev", "op")
        return self.saw(_position(fields)) if all(field is not None for field in fields) else None

    async def client_count(self) -> int:
        """Return the number of connections of all processes to the server; 0 if INFO is not allowed."""
        try:
            found = CLIENT_COUNT.search(await self.client.execute("INFO", "clients", beside=self.keys.meta))
        except StoreRefused:
            return 0
        return int(found[1]) if found else 0

    async def tick(self) -> Tick:
        """Reap a bounded number of ended leases."""
        *position, leases, overdue, idle_ms, full = checked(await self._run(self._TICK, "", new_operation()))
        self.saw(_position(position))
        return Tick(leases, overdue, idle_ms / 1000, bool(full))

    # ------------------------------------------------------------------ read

    async def read(self, keys: Sequence[str], lease: LeaseId | None = None) -> LeaseState:
        """Return the records of keys, and the state of a lease.

        The result is of one moment, unless there are more than `READ_KEYS_COUNT` keys or names of the lease,
        or `PAGE_BYTES` of records. Then several calls read one registry, and `alive` and `position` are those
        of the last call. Raises OtherIncarnation.
        """
        records: dict[str, Record] = {}
        invalid: dict[str, InvalidRecord] = {}
        names: set[str] = set()
        incarnation, after, start = "", b"", 0
        while True:
            page = keys[start : start + READ_KEYS_COUNT]
            bounds = (format_lease(lease), after, READ_KEYS_COUNT, PAGE_BYTES)
            while True:
                answer = await self._run(self._READ, incarnation, new_operation(), *bounds, *page)
                if answer != [b"unmade"]:
                    break
                await self.tick()
            answer = checked(answer)
            position = self.saw(_position(answer[:3]))
            alive, last_write, listed = bool(answer[3]), answer[4].decode(), answer[5]
            names.update(name.decode("utf-8", "backslashreplace") for name in listed)
            for key, packed in zip(page, answer[6:], strict=False):
                try:
                    record = parse_record(key, packed)
                except InvalidRecord as exc:
                    invalid[key] = exc
                else:
                    if record is not None:
                        records[key] = record
            start += len(answer) - 6
            if start >= len(keys) and len(listed) < READ_KEYS_COUNT:
                return LeaseState(position, alive, last_write, frozenset(names), records, invalid)
            incarnation, after = position.incarnation, listed[-1] if listed else after

    async def snapshot(self, prefix: str) -> tuple[Snapshot, Position]:
        """Return all records under a prefix as of one moment, and that moment's position.

        Makes several calls if there are more records than fit a page. Then the log from the first page's
        revision to the last page's is replayed over the records, each entry only if it is newer than the
        record's own `mod_revision`. Starts over if history was lost meanwhile. Raises HistoryLost.
        """
        for _ in range(SNAPSHOT_ATTEMPTS_COUNT):
            try:
                invalid: dict[str, InvalidRecord] = {}
                records, first, last = await self._pages(prefix, invalid)
                if first != last:
                    changes = await self.changes(first.revision, first.operation, last)
                    replay(records, prefix, changes)
                    for change in changes:
                        invalid.pop(change.key, None)
                    records = {key: records[key] for key in sorted(records)}
            except (HistoryLost, OtherIncarnation):
                continue
            return Snapshot(tuple(records.values()), last.revision, tuple(invalid.values())), last
        raise HistoryLost(f"history was lost {SNAPSHOT_ATTEMPTS_COUNT} times during a snapshot")

    async def _pages(
        self, prefix: str, invalid: dict[str, InvalidRecord]
    ) -> tuple[dict[str, Record], Position, Position]:
        """Return the records by key, in order, and the range of the log to replay over them.

        The range is from the last change in the first page to the last change logged at the last page.
        """
        records: dict[str, Record] = {}
        answer = await self._page("", prefix, b"")
        first = _position(answer[:3])
        while answer[5]:
            # The next page is requested while this one is parsed.
            following = asyncio.ensure_future(self._page(first.incarnation, prefix, answer[5]))
            try:
                await asyncio.sleep(0)
                parse_records(answer[6:], records, invalid)
                answer = await following
            finally:
                following.cancel()
        parse_records(answer[6:], records, invalid)
        return records, first, self.saw(_position((answer[0], *answer[3:5])))

    async def _page(self, incarnation: str, prefix: str, after: bytes) -> list[Any]:
        args = (incarnation, new_operation(), prefix, after, PAGE_KEYS_COUNT, PAGE_BYTES)
        return checked(await self._run(self._SNAPSHOT, *args))

    async def changes(self, after: Revision, operation: str | None, until: Position) -> list[Change]:
        """Return the changes after a revision (of that operation, if given) up to a position, inclusive.

        Raises HistoryLost if the log does not connect the two.
        """
        changes: list[Change] = []
        cursor = after
        while after != until.revision:
            count = self.log_page.count
            try:
                reply = await self.client.execute(
                    "XRANGE", self.keys.log, f"({cursor}", until.revision, "COUNT", count
                )
            except StoreUnavailable:
                self.log_page.failed()
                raise
            if not reply:
                raise HistoryLost(f"the log ends before {until.revision}")
            page = parse_changes(reply)
            self.log_page.took(len(page), size_bytes(page))
            check_chain(after, operation, page)
            changes += page
            cursor = Revision(reply[-1][0].decode())
            if page:
                after, operation = page[-1].revision, page[-1].operation
        if operation not in (None, until.operation):
            raise HistoryLost(f"{until.revision} was written twice")
        return changes

    # ------------------------------------------------------------------ write

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
        """Apply operations atomically if all comparisons hold.

        After a broken connection the write is repeated under the same operation id, within the client's
        time-out. With `lease`, the keys are written under it; an ended lease is granted again if `ttl_s` is
        given. `incarnation`: the one that the caller knows, "" for any. Raises CompareFailed, LeaseNotFound,
        OtherIncarnation, StoreError; ConfigError if the write is too large for one script.
        """
        operation = operation or new_operation()
        keys = [compare.key for compare in compares]
        loop = asyncio.get_running_loop()
        deadline, backoff = loop.time() + self.client.timeout_s, Backoff()
        seen, repeats_after = self._seen or "none", ""
        while True:
            args = encode_write(incarnation, operation, repeats_after, lease, ttl_s, compares, operations)
            try:
                written = parse_written(keys, await self._run(self.WRITE, *args, lease=lease))
            except StoreUnavailable as exc:
                wait_s = backoff.next_s()
                if isinstance(exc, OutcomeUnknown) or loop.time() + wait_s >= deadline:
                    raise
                repeats_after = seen
                await self.client.pause(wait_s)
            else:
                if written.change_count:
                    self._seen = f"{written.revision} {operation}"
                return written

    async def revoke(self, lease: LeaseId) -> None:
        """End a lease and delete its keys; no effect if it has ended."""
        checked(await self._run(self._REVOKE, "", new_operation(), format_lease(lease), lease=lease))


def keep_alive(
    connection: ThreadScripts, keys: RegistryKeys, incarnation: str, lease: LeaseId, ttl_s: float
) -> Renewal:
    """Renew a lease, from a thread. Raises StoreError, and the exceptions of `checked`."""
    answer = connection.script(
        KeyValue.KEEPALIVE,
        (keys.meta, keys.structure("leases"), keys.structure("lr"), keys.lease(lease)),
        (incarnation, format_lease(lease), round(ttl_s * 1000)),
    )
    last_write, lease_count, idle_ms, full = checked(answer)
    return Renewal(last_write.decode(), lease_count, idle_ms / 1000, bool(full))


# ---------------------------------------------------------------------- the log


def parse_changes(
    entries: Sequence[Any], on_invalid: Callable[[InvalidRecord], None] | None = None
) -> list[Change]:
    """Read log entries from an answer of XRANGE or XREAD.

    Unreadable entries are left out, and `on_invalid` is called with each error. An entry of another program
    is not part of the chain; if one of ours is left out, `check_chain` finds the gap.
    """
    changes = []
    for entry_id, fields in entries:
        try:
            changes.append(parse_change(entry_id, fields))
        except InvalidRecord as exc:
            if on_invalid is not None:
                on_invalid(exc)
    return changes


def check_chain(after: Revision, operation: str | None, changes: Sequence[Change]) -> None:
    """Check that `changes` follow a revision and one another without a gap. Raises HistoryLost."""
    for change in changes:
        if change.previous[0] != after or operation not in (None, change.previous[1]):
            raise HistoryLost(f"the log does not connect {after} to {change.revision}")
        after, operation = change.revision, change.operation


def replay(records: dict[str, Record], prefix: str, changes: Sequence[Change]) -> None:
    """Bring records that were read page by page up to date: apply each change newer than its record."""
    for change in changes:
        if not change.key.startswith(prefix) or change.event is None:
            continue
        known = records.get(change.key)
        if known is not None and order(known.mod_revision) >= order(change.revision):
            continue
        if change.record is not None:
            records[change.key] = change.record
        else:
            records.pop(change.key, None)
