"""A read-only registry: it writes nothing and reads by plain commands, so a user with few rights can use it.

A script would need the right to run scripts. Plain commands do not see one moment: the changes that the log
has of the time in which they ran are replayed over their results, as over the pages of a large snapshot. Keys
of leases that have ended and are not yet reaped are left out, by the service clock as last saved.

Long-lived part, from `start` to `aclose`: the log reader, which feeds the watches.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NoReturn

from dynamo_redis.config import StoreSettings
from dynamo_redis.errors import InvalidRecord, SchemaMismatch, StoreRefused
from dynamo_redis.histogram import HistogramReading
from dynamo_redis.names import new_instance_id
from dynamo_redis.store.base import LeaseId, LostReason, Record, Registration, Revision, Snapshot, Watch
from dynamo_redis.store.keys import SCHEMA_MAJOR, SCHEMA_VERSION, RegistryKeys, check_prefix, format_lease
from dynamo_redis.store.redis.health import Health
from dynamo_redis.store.redis.opening import open_client
from dynamo_redis.store.registry.change_log import (
    Change,
    Position,
    check_revision,
    parse_record,
    parse_records,
)
from dynamo_redis.store.registry.log_reader import LogReader
from dynamo_redis.store.registry.operations import KeyOperations
from dynamo_redis.store.registry.scripts_api import (
    PAGE_KEYS_COUNT,
    HistoryLost,
    KeyValue,
    LeaseState,
    Written,
    parse_changes,
    replay,
)

ABSENT: Final = Position("", Revision("0-0"), "")
"""The position of a registry that has no write yet."""
UNAPPLIED_COUNT: Final = 2000
RECORDS_A_CALL: Final = 64
LEASES_A_CALL: Final = 500


class PlainReads(KeyValue):
    """The reads of `KeyValue`, by plain commands. A registry that does not exist reads as empty; none is
    created."""

    async def initialize(self) -> Position:
        """Return the position of the last change. Raises SchemaMismatch."""
        position, _ = await self._head()
        return self.saw(_end(position, await self._unapplied_changes(position)))

    async def _head(self) -> tuple[Position, float]:
        """Return the position of the records, and the service clock in ms. Raises SchemaMismatch."""
        fields = await self.client.execute("HMGET", self.keys.meta, "schema", "inc", "rev", "op", "clock")
        schema, *position, clock = (None if field is None else field.decode() for field in fields)
        if schema is not None and schema.partition(".")[0] != SCHEMA_MAJOR:
            raise SchemaMismatch(
                "the registry",
                schema,
                SCHEMA_VERSION,
                remedy="upgrade the older side, or choose another DYN_REDIS_PREFIX",
            )
        incarnation, revision, operation = position
        if incarnation is None or revision is None or operation is None:
            return ABSENT, 0.0
        return Position(incarnation, Revision(revision), operation), float(clock or 0)

    async def _unapplied_changes(self, position: Position) -> list[Change]:
        """Return the changes that the log has after the head's revision: a script stopped before it applied
        them."""
        if position == ABSENT:
            return []
        behind = await self.client.execute(
            "XRANGE", self.keys.log, f"({position.revision}", "+", "COUNT", UNAPPLIED_COUNT
        )
        found: list[Change] = []
        for change in parse_changes(behind):
            end = _end(position, found)
            if change.previous == (end.revision, end.operation):
                found.append(change)
        return found

    async def read(self, keys: Sequence[str], lease: LeaseId | None = None) -> LeaseState:
        """Return the records of keys. `lease` is ignored: this registry has none."""
        position, clock_ms = await self._head()
        unapplied = await self._unapplied_changes(position)
        records: dict[str, Record] = {}
        invalid: dict[str, InvalidRecord] = {}
        for key, packed in zip(keys, await self._packed(keys), strict=True):
            try:
                record = parse_record(key, packed or b"")
            except InvalidRecord as exc:
                invalid[key] = exc
            else:
                if record is not None:
                    records[key] = record
        replay(records, "", [change for change in unapplied if change.key in keys])
        living = await self._living(records, clock_ms)
        return LeaseState(_end(position, unapplied), False, "", frozenset(), living, invalid)

    async def snapshot(self, prefix: str) -> tuple[Snapshot, Position]:
        """As `KeyValue.snapshot`, without the records of leases that have ended."""
        snapshot, position = await super().snapshot(prefix)
        _, clock_ms = await self._head()
        living = await self._living({record.key: record for record in snapshot.records}, clock_ms)
        return Snapshot(tuple(living.values()), snapshot.revision, snapshot.invalid), position

    async def _pages(
        self, prefix: str, invalid: dict[str, InvalidRecord]
    ) -> tuple[dict[str, Record], Position, Position]:
        records: dict[str, Record] = {}
        first, _ = await self._head()
        # No key begins with a zero byte, but a mark does; and none holds the byte 255.
        start, end = b"[" + (prefix.encode() or b"\1"), b"(" + prefix.encode() + b"\xff"
        while True:
            names: list[bytes] = await self.client.execute(
                "ZRANGEBYLEX",
                self.keys.structure("idx"),
                start,
                end,
                "LIMIT",
                0,
                PAGE_KEYS_COUNT,
            )
            found = zip(names, await self._packed(names), strict=True)
            pairs = [part for name, packed in found if packed is not None for part in (name, packed)]
            parse_records(pairs, records, invalid)
            if len(names) < PAGE_KEYS_COUNT:
                break
            start = b"(" + names[-1]
        last, _ = await self._head()
        if last.incarnation != first.incarnation:
            raise HistoryLost("the registry was wiped")
        return records, first, self.saw(_end(last, await self._unapplied_changes(last)))

    async def _packed(self, keys: Sequence[str] | Sequence[bytes]) -> list[bytes | None]:
        """Read the packed records of keys; a few at a time, since each may be large."""
        packed: list[bytes | None] = []
        for start in range(0, len(keys), RECORDS_A_CALL):
            part = keys[start : start + RECORDS_A_CALL]
            packed += await self.client.execute("HMGET", self.keys.structure("kv"), *part)
        return packed

    async def _living(self, records: dict[str, Record], clock_ms: float) -> dict[str, Record]:
        """Return the records whose lease has not ended. A lease that is not listed was reaped just now: then
        the log has the deletes of its keys."""
        leases = sorted({record.lease for record in records.values() if record.lease is not None})
        ended: set[LeaseId] = set()
        for start in range(0, len(leases), LEASES_A_CALL):
            part = leases[start : start + LEASES_A_CALL]
            deadlines = await self.client.pipeline(
                [("ZSCORE", self.keys.structure("leases"), format_lease(lease)) for lease in part]
            )
            ended.update(
                lease
                for lease, deadline in zip(part, deadlines, strict=True)
                if deadline is not None and float(deadline) <= clock_ms
            )
        return {key: record for key, record in records.items() if record.lease not in ended}

    async def write(self, *_: Any, **__: Any) -> Written:
        """Raise StoreRefused."""
        _refuse()


def _end(position: Position, changes: Sequence[Change]) -> Position:
    """Return the position of the log after these changes."""
    if not changes:
        return position
    return Position(position.incarnation, changes[-1].revision, changes[-1].operation)


def _refuse() -> NoReturn:
    raise StoreRefused("this registry is open read-only: nothing is written")


class ReadOnlyRegistry(KeyOperations):
    """`base.Registry` that only reads: methods that write raise StoreRefused. It has no lease and reaps
    none."""

    def __init__(self, settings: StoreSettings) -> None:
        self._lease = LeaseId(new_instance_id())
        self._ttl_s = settings.lease_ttl_s
        self._client = open_client(
            settings.require_url(),
            timeout_s=settings.command_timeout_s,
            client_name=f"dynamo-redis:{self._lease:x}",
            login=settings.login(),
        )
        self._kv = PlainReads(self._client, RegistryKeys(settings.prefix))
        super().__init__(self._kv)
        self._health = Health(self._client.address)
        self._reader = LogReader(
            self._kv, self._health, on_changes=lambda _: None, on_disturbance=lambda _: None
        )
        self._started = False

    @property
    def lease_id(self) -> LeaseId:
        return self._lease

    @property
    def lease_ttl_s(self) -> float:
        return self._ttl_s

    @property
    def connected(self) -> bool:
        return self._health.connected

    @property
    def write_refusal(self) -> str | None:
        return None

    @property
    def process_count(self) -> int:
        return 1

    @property
    def lease_losses(self) -> int:
        return 0

    @property
    def outages(self) -> int:
        return self._health.outage_count

    @property
    def trips(self) -> HistogramReading:
        return self._client.trips_s.read()

    async def start(self) -> None:
        if self._started:
            return
        try:
            await self._client.connect()
            position = await self._kv.initialize()
        except BaseException:
            self._client.disconnect()  # the next attempt resolves the name again
            raise
        self._started = True
        self._health.succeeded()
        self._reader.start(position)

    async def aclose(self) -> None:
        try:
            await self._reader.aclose()
        finally:
            await self._client.aclose()

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
        _refuse()

    def watch(self, prefix: str, *, start_revision: Revision | None = None) -> Watch:
        start = None if start_revision is None else check_revision(start_revision)
        return self._reader.watch(check_prefix(prefix), start)
