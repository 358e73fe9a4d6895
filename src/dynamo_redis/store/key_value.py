"""The registry's scripts as typed calls: read, write, snapshot, log, and the life of a lease.

Each method is one script, run once, unless it says otherwise. None waits longer than the client's time-out.
A registry that is missing or damaged is made anew on the way. What a script may answer instead of a result
becomes an exception: SchemaMismatch, LeaseNotFound, CompareFailed, OtherIncarnation.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgpack

from dynamo_redis.errors import LeaseNotFound, SchemaMismatch, StoreError, StoreUnavailable
from dynamo_redis.store.base import Compare, DeleteOp, LeaseId, PutOp, Record, Revision, Snapshot
from dynamo_redis.store.change_log import Change, Position, order, parse_change, parse_record
from dynamo_redis.store.client import Argument, Backoff, RedisClient, SyncConnection
from dynamo_redis.store.keys import SCHEMA_VERSION, RegistryKeys, format_lease
from dynamo_redis.store.scripts import Script, load_script

PAGE_KEYS_COUNT: Final = 1000
PAGE_ENTRIES_COUNT: Final = 500
SNAPSHOT_ATTEMPTS_COUNT: Final = 5


class Wiped(StoreError):
    """There is no registry, or a part of it is gone. Only the keepalive's thread sees this."""


class OtherIncarnation(StoreError):
    """The registry is not the one the caller knew: everything in that one is lost. `found` is the new one."""

    def __init__(self, found: str) -> None:
        super().__init__(f"the registry was replaced: it is {found} now")
        self.found = found


class HistoryLost(StoreError):
    """The log does not connect to the position it was read from."""


class CompareFailed(StoreError):
    """A comparison did not hold; `found` is the key's record, or None. Nothing was written."""

    def __init__(self, index: int, found: Record | None) -> None:
        super().__init__(f"comparison {index} failed")
        self.index = index
        self.found = found


@dataclass(frozen=True, slots=True)
class OwnedPut:
    """Write a key under the caller's lease; if `owned`, only if it stands under that lease already."""

    key: str
    value: bytes
    owned: bool = False


@dataclass(frozen=True, slots=True)
class OwnedDelete:
    """Delete a key if it stands under the caller's lease."""

    key: str


Operation = PutOp | DeleteOp | OwnedPut | OwnedDelete


@dataclass(frozen=True, slots=True)
class Written:
    """What a write did. `revision` is that of its last change, or the registry's if it changed nothing."""

    revision: Revision
    granted: bool
    change_count: int


@dataclass(frozen=True, slots=True)
class Owned:
    """A lease and some keys, at one moment. `last_write`: its owner's, `"revision operation"` or ""."""

    position: Position
    alive: bool
    last_write: str
    records: dict[str, Record]


@dataclass(frozen=True, slots=True)
class Tick:
    """What a tick found: how many leases live, and how many ended ones are left to reap."""

    position: Position
    lease_count: int
    overdue_count: int


def new_operation() -> str:
    """A random operation id, 64 bits."""
    return secrets.token_hex(8)


def encode_write(
    incarnation: str,
    operation: str,
    repeated: bool,
    lease: LeaseId | None,
    ttl_s: float,
    compares: Sequence[Compare],
    operations: Sequence[Operation],
) -> tuple[Argument, ...]:
    """ARGV of `registry_write`."""
    request = (
        [(compare.key, compare.mod_revision or "") for compare in compares],
        [_encode(op) for op in operations],
    )
    flag = "1" if repeated else "0"
    return (
        incarnation,
        operation,
        flag,
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
    """The rest of an 'ok' answer. Raises what any other answer stands for."""
    match answer:
        case [b"ok", *rest]:
            return rest
        case [b"wiped"]:
            raise Wiped("the registry is not there")
        case [b"incarnation", found]:
            raise OtherIncarnation(found.decode())
        case [b"schema", found]:
            raise SchemaMismatch(found.decode(), SCHEMA_VERSION)
        case [b"no-lease"]:
            raise LeaseNotFound("the lease has ended")
        case _:
            raise StoreError(f"a registry script answered {answer!r:.200}")


def parse_written(keys: Sequence[str], answer: list[Any]) -> Written:
    """The answer of `registry_write`; `keys` are those of its comparisons."""
    if answer[0] == b"failed":
        index = int(answer[1])
        raise CompareFailed(index, parse_record(keys[index], answer[2]))
    revision, granted, changes = checked(answer)
    return Written(Revision(revision.decode()), bool(granted), int(changes))


def _position(fields: Sequence[bytes]) -> Position:
    incarnation, revision, operation = fields
    return Position(incarnation.decode(), Revision(revision.decode()), operation.decode())


class KeyValue:
    """One registry, through one client."""

    WRITE: Final = load_script("registry_write", "registry_prelude")
    KEEPALIVE: Final = load_script("registry_keepalive", "registry_prelude")
    _INIT: Final = load_script("registry_init", "registry_prelude")
    _READ: Final = load_script("registry_read", "registry_prelude")
    _SNAPSHOT: Final = load_script("registry_snapshot", "registry_prelude")
    _TICK: Final = load_script("registry_tick", "registry_prelude")
    _REVOKE: Final = load_script("registry_revoke", "registry_prelude")

    def __init__(self, client: RedisClient, keys: RegistryKeys) -> None:
        self.client = client
        self.keys = keys

    @property
    def timeout_s(self) -> float:
        """Longest wait for one answer."""
        return self.client.timeout_s

    async def _run(self, script: Script, *args: Argument, lease: LeaseId | None = None) -> list[Any]:
        """Run a script; a registry that is not there is made first, of which the script then takes note."""
        keys = self.keys.structures if lease is None else (*self.keys.structures, self.keys.lease(lease))
        answer: list[Any] = await self.client.script(script, keys, args)
        if answer == [b"wiped"] and script is not self._INIT:
            await self.initialize()
            answer = await self.client.script(script, keys, args)
        return answer

    # ------------------------------------------------------------------ the registry itself

    async def initialize(self) -> Position:
        """Make the registry if it is missing or damaged; answer where it stands. Raises SchemaMismatch."""
        answer = await self._run(self._INIT, "", new_operation(), new_operation(), SCHEMA_VERSION)
        return _position(checked(answer))

    async def position(self) -> Position | None:
        """Where the registry stands, by one plain command; None if it is not there."""
        fields = await self.client.execute("HMGET", self.keys.meta, "inc", "rev", "op")
        return _position(fields) if all(field is not None for field in fields) else None

    async def tick(self) -> Tick:
        """Reap a bounded number of ended leases."""
        *position, leases, overdue = checked(await self._run(self._TICK, "", new_operation()))
        return Tick(_position(position), int(leases), int(overdue))

    # ------------------------------------------------------------------ read

    async def read(self, keys: Sequence[str], lease: LeaseId | None = None) -> Owned:
        """Keys, and the state of a lease."""
        answer = checked(await self._run(self._READ, "", new_operation(), format_lease(lease), *keys))
        records = (parse_record(key, packed) for key, packed in zip(keys, answer[5:], strict=True))
        found = {record.key: record for record in records if record is not None}
        return Owned(_position(answer[:3]), bool(answer[3]), answer[4].decode(), found)

    async def snapshot(self, prefix: str) -> tuple[Snapshot, Position]:
        """All records under a prefix as of one moment, and that moment's position.

        Takes several calls if there are more than `PAGE_KEYS_COUNT`: the log from the first page's revision
        to the last page's is replayed over what was read, each entry only if it is newer than the record's
        own `mod_revision`. Starts over if the log was trimmed meanwhile. Raises HistoryLost.
        """
        for _ in range(SNAPSHOT_ATTEMPTS_COUNT):
            records, first, last = await self._pages(prefix)
            try:
                if first != last:
                    replay(records, prefix, await self.changes(first.revision, first.operation, last))
            except HistoryLost:
                continue
            return Snapshot(tuple(records[key] for key in sorted(records)), last.revision), last
        raise HistoryLost(f"the log was trimmed {SNAPSHOT_ATTEMPTS_COUNT} times during a snapshot")

    async def _pages(self, prefix: str) -> tuple[dict[str, Record], Position, Position]:
        records: dict[str, Record] = {}
        first: Position | None = None
        incarnation, after = "", b""
        while True:
            args = (incarnation, new_operation(), prefix, after, PAGE_KEYS_COUNT)
            answer = checked(await self._run(self._SNAPSHOT, *args))
            position, after = _position(answer[:3]), answer[3]
            first = first or position
            incarnation = position.incarnation
            for raw_key, packed in zip(answer[4::2], answer[5::2], strict=True):
                record = parse_record(raw_key.decode(), packed or b"")
                if record is not None:
                    records[record.key] = record
            if not after:
                return records, first, position

    async def changes(self, after: Revision, operation: str | None, until: Position) -> list[Change]:
        """The log's entries behind a revision (of that operation, if given), up to and with a position.

        Raises HistoryLost if the log does not connect the two.
        """
        changes: list[Change] = []
        while after != until.revision:
            reply = await self.client.execute(
                "XRANGE", self.keys.log, f"({after}", until.revision, "COUNT", PAGE_ENTRIES_COUNT
            )
            page = parse_changes(reply)
            check_chain(after, operation, page)
            if not page:
                raise HistoryLost(f"the log ends before {until.revision}")
            changes += page
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
        """Make changes atomically, if all comparisons hold.

        A broken connection is tried again under the same operation id, within the client's time-out. With a
        lease, the keys are written under it; it is granted if it is not alive and `ttl_s` is given. Raises
        CompareFailed, LeaseNotFound, OtherIncarnation, StoreError.
        """
        operation = operation or new_operation()
        keys = [compare.key for compare in compares]
        loop = asyncio.get_running_loop()
        deadline, backoff = loop.time() + self.client.timeout_s, Backoff()
        repeated = False
        while True:
            args = encode_write(incarnation, operation, repeated, lease, ttl_s, compares, operations)
            try:
                return parse_written(keys, await self._run(self.WRITE, *args, lease=lease))
            except StoreUnavailable:
                wait_s = backoff.next_s()
                if loop.time() + wait_s >= deadline:
                    raise
                repeated = True
                await asyncio.sleep(wait_s)

    async def revoke(self, lease: LeaseId) -> None:
        """End a lease and delete its keys; no effect if it has ended."""
        checked(await self._run(self._REVOKE, "", new_operation(), format_lease(lease), lease=lease))


def keep_alive(
    connection: SyncConnection, keys: RegistryKeys, incarnation: str, lease: LeaseId, ttl_s: float
) -> str:
    """Renew a lease, from a thread; answers its owner's last write. Raises as `checked` does, StoreError."""
    answer = connection.script(
        KeyValue.KEEPALIVE,
        (*keys.structures, keys.lease(lease)),
        (incarnation, new_operation(), format_lease(lease), round(ttl_s * 1000)),
    )
    last_write: bytes = checked(answer)[0]
    return last_write.decode()


# ---------------------------------------------------------------------- the log


def parse_changes(entries: Sequence[Any] | None) -> list[Change]:
    """Log entries as XRANGE and XREAD answer them. Raises HistoryLost for foreign ones."""
    try:
        return [parse_change(entry_id, fields) for entry_id, fields in entries or ()]
    except ValueError as exc:
        raise HistoryLost(str(exc)) from exc


def check_chain(after: Revision, operation: str | None, changes: Sequence[Change]) -> None:
    """That `changes` follow a revision and one another without a gap. Raises HistoryLost."""
    for change in changes:
        if change.previous[0] != after or operation not in (None, change.previous[1]):
            raise HistoryLost(f"the log does not connect {after} to {change.revision}")
        after, operation = change.revision, change.operation


def replay(records: dict[str, Record], prefix: str, changes: Sequence[Change]) -> None:
    """Bring records read page by page to the last change: apply what is newer than each record."""
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
