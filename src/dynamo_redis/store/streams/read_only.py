"""Read-only event streams: they write nothing and read by plain commands, for a user with few rights.

A script would need the right to run scripts. Plain commands do not see one moment: an entry that comes
between two of them may be counted in one figure and not yet in another.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final, NoReturn

from dynamo_redis.errors import StoreRefused, StreamLost
from dynamo_redis.store.event_base import (
    BEGINNING,
    EntryId,
    EventGroup,
    EventTail,
    GroupInfo,
    NewEntry,
    StreamInfo,
    StreamName,
    entry_order,
    just_before,
)
from dynamo_redis.store.keys import StreamKeys
from dynamo_redis.store.redis.base import StoreClient
from dynamo_redis.store.streams.readers import RedisEventTail, check_schema, server_time_ms
from dynamo_redis.store.streams.redis_streams import RedisEventStreams

_HEAD: Final = ("v", "events", "bytes", "floor", "clock", "seen")
_LONGEST_STEP_MS: Final = 10_000
"""Most time that passes on a stream's clock between two writes to it, as its scripts count."""


class ReadOnlyEventStreams(RedisEventStreams):
    """`EventStreams` that only reads: `info`, `list`, `tail`, `subscribe`. Other methods raise StoreRefused.

    `info`, `list` and `tail` need only commands of the category @read.
    """

    async def append(
        self, stream: StreamName, entries: Sequence[NewEntry], *, max_age_s: float | None = None
    ) -> None:
        """Refuse: raises StoreRefused."""
        _refuse()

    def group(self, stream: StreamName, name: str) -> EventGroup:
        """Refuse: raises StoreRefused."""
        _refuse()

    async def trim(self, stream: StreamName, snapshot: EntryId) -> EntryId:
        """Refuse: raises StoreRefused."""
        _refuse()

    async def keep_if_wanted(self, stream: StreamName) -> bool:
        """Refuse: raises StoreRefused."""
        _refuse()

    async def delete(self, stream: StreamName) -> bool:
        """Refuse: raises StoreRefused."""
        _refuse()

    async def publish(self, topic: StreamName, message: bytes) -> int:
        """Refuse: raises StoreRefused."""
        _refuse()

    def tail(self, stream: StreamName, *, after: EntryId | None = None, max_age_s: float = 0.0) -> EventTail:
        """As `EventStreams.tail`. Without the right to TIME, age counts by this machine's clock."""
        return _ReadOnlyTail(self._client, self._keys(stream), after, max_age_s)

    async def info(self, stream: StreamName) -> StreamInfo | None:
        """As `EventStreams.info`. Raises SchemaMismatch, StoreError."""
        keys = self._keys(stream)
        head, exists, length, signs = await self._client.pipeline(
            [
                ("HMGET", keys.meta, *_HEAD),
                ("EXISTS", keys.events),
                ("XLEN", keys.events),
                ("ZRANGE", keys.groups, 0, -1, "WITHSCORES"),
            ]
        )
        schema, event_count, size_bytes, floor, clock_ms, seen_ms = head
        check_schema(stream, schema)
        if not exists:
            return None
        try:
            state, groups = await self._client.pipeline(
                [("XINFO", "STREAM", keys.events), ("XINFO", "GROUPS", keys.events)]
            )
        except StoreRefused:
            if await self._client.execute("EXISTS", keys.events):
                raise
            return None  # it was deleted between the two reads
        seen = dict(zip(signs[::2], map(float, signs[1::2]), strict=True))
        now_ms = int(clock_ms or 0)
        if int(seen_ms or 0) > 0:
            passed_ms = await _time_ms(self._client, keys) - int(seen_ms)
            now_ms += max(0, min(passed_ms, _LONGEST_STEP_MS))
        found = [await self._group(keys, length, _named(group), seen, now_ms) for group in groups]
        return StreamInfo(
            stream,
            length,
            int(event_count or 0),
            int(size_bytes or 0),
            EntryId(_named(state)["last-generated-id"].decode()),
            EntryId((floor or BEGINNING.encode()).decode()),
            tuple(group for group in found if group is not None),
        )

    async def _group(
        self, keys: StreamKeys, length: int, group: dict[str, Any], seen: dict[bytes, float], now_ms: int
    ) -> GroupInfo | None:
        """Return the state of one group, as XINFO describes it; None if it has been removed since.

        `seen` has the last sign of life of each group, and `now_ms` is the time, both by the stream's clock.
        """
        name, position, pending = (
            group["name"],
            EntryId(group["last-delivered-id"].decode()),
            group["pending"],
        )
        # Servers before 7.0 do not count the entries behind a group, later ones not always.
        lag_count = group.get("lag")
        if pending:
            try:
                _, first, *_ = await self._client.execute("XPENDING", keys.events, name)
            except StreamLost:
                return None
            if first:  # every entry before the first pending one is applied
                ms, number = entry_order(EntryId(first.decode()))
                position = EntryId(f"{ms}-{number - 1}") if number > 0 else just_before(ms)
        return GroupInfo(
            name.decode("utf-8", "replace"),
            position,
            min(length, pending + (length if lag_count is None else lag_count)),
            max(0.0, now_ms - seen.get(name, now_ms)) / 1000,
        )


def _refuse() -> NoReturn:
    raise StoreRefused("these event streams are open read-only: nothing is written")


class _ReadOnlyTail(RedisEventTail):
    async def _time_ms(self) -> int:
        return await _time_ms(self._client, self._keys)


async def _time_ms(client: StoreClient, keys: StreamKeys) -> int:
    """Return the server's clock, or this machine's where the user has no right to ask for it."""
    try:
        return await server_time_ms(client, keys)
    except StoreRefused:
        return round(time.time() * 1000)


def _named(flat: Sequence[Any]) -> dict[str, Any]:
    """Return a flat reply of names and values as a dict."""
    return {flat[i].decode(): flat[i + 1] for i in range(0, len(flat), 2)}
