"""Readers of one event stream on Redis: a consumer group, and a tail without one.

Each has a connection of its own, for blocking reads. With each read a group also reads the floor. A floor
after the last entry read means that the stream's ceiling may have trimmed unread entries. The group reads the
number of breaks, too. If it has changed, unknown entries were deleted by hand. Scripts detect that, among
them the one that sends each reader's sign of life.

After a failover to a server that lacked some entries, entries may come again, or with lower ids. They are
passed on, since publishers number their events.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from dynamo_redis.backoff import Backoff
from dynamo_redis.errors import SchemaMismatch, StoreError, StreamLost, StreamTrimmed
from dynamo_redis.store.event_base import (
    BEGINNING,
    GROUP_TTL_S,
    Entry,
    EntryId,
    StreamName,
    entry_order,
    just_before,
)
from dynamo_redis.store.keys import StreamKeys
from dynamo_redis.store.redis.base import StoreClient
from dynamo_redis.store.redis.blocking import Argument, pack, pack_word
from dynamo_redis.store.redis.page_size import PageSize
from dynamo_redis.store.scripts import Script, load_script

SCHEMA: Final = "1"
BLOCK_LIMIT_S: Final = 2.0
BEAT_S: Final = GROUP_TTL_S / 3
CHECK_S: Final = 1.0
"""Shortest time between two checks, by a reader without new entries, whether its group still exists."""
READ_COUNT: Final = 1024
READ_BYTES: Final = 4 << 20
"""Most entries of a read, and its approximate size."""
_CONSUMER: Final = "reader"

_CREATE = load_script("stream_create", "stream_prelude")
_SEEK = load_script("stream_seek", "stream_prelude")
_BEAT = load_script("stream_beat", "stream_prelude")

SILENCE_MS = round(3 * GROUP_TTL_S * 1000)
"""Time without a sign of life after which a group is removed."""


async def stream_script(
    client: StoreClient, script: Script, keys: StreamKeys, args: Sequence[Argument]
) -> list[Any]:
    """Run a stream's script until it is complete; return the rest of its `ok` answer.

    Raises StreamLost, StreamTrimmed, StoreError.
    """
    answer: bytes
    rest: list[Any]
    answer, *rest = await client.script(script, keys.all, args)
    more: list[Any] = []
    while answer == b"again":  # rest: a floor, now outdated, and names of groups
        more += rest[1:]
        answer, *rest = await client.script(script, keys.all, args)
    rest += more
    if answer == b"schema":
        raise _schema_mismatch(keys.stream, rest[0])
    if answer == b"lost":
        raise StreamLost(f"the event stream {keys.stream.path}, or the reader's group in it, is gone")
    if answer == b"trimmed":
        raise StreamTrimmed(f"{keys.stream.path} has been trimmed up to {rest[0].decode()}")
    return rest


def check_schema(stream: StreamName, found: bytes | None) -> None:
    """Raise SchemaMismatch if a stream has another schema version; `found` is None where it has no head."""
    if found is not None and found.partition(b".")[0] != SCHEMA.encode():
        raise _schema_mismatch(stream, found)


def _schema_mismatch(stream: StreamName, found: bytes) -> SchemaMismatch:
    """Return the error for a stream with this schema version."""
    return SchemaMismatch(
        f"the event stream {stream.path}",
        found.decode("utf-8", "replace"),
        SCHEMA,
        remedy=f"upgrade the older side, or `dynamo-redis events rm {stream.path}`",
    )


class _Reader(ABC):
    """Base of both readers: reads on a connection of its own, and waits after failures."""

    def __init__(self, client: StoreClient, keys: StreamKeys) -> None:
        self._client = client
        self._keys = keys
        self._connection = client.blocking(keys.events)
        self._page = PageSize(READ_COUNT, page_bytes=READ_BYTES)
        self._backoff = Backoff()
        self._failed = False

    async def read(self, *, count: int, block_s: float) -> list[Entry]:
        """As `EventGroup.read` and `EventTail.read`.

        After a StoreUnavailable the next call waits, longer each time, and then asks for fewer entries."""
        if self._failed:
            await self._client.pause(self._backoff.next_s())
        try:
            entries = await self._read(min(count, self._page.count), min(block_s, BLOCK_LIMIT_S))
        except StoreError:
            self._failed = True
            self._page.failed()
            raise
        if entries:
            self._page.took(len(entries), sum(len(entry.content) for entry in entries))
        self._failed = False
        self._backoff.reset()
        return entries

    @abstractmethod
    async def _read(self, count: int, block_s: float) -> list[Entry]:
        """Read up to `count` entries, waiting up to `block_s` for the first. Raises StoreError."""

    async def aclose(self) -> None:
        """Close the connection. Never waits for the server."""
        await self._connection.aclose()


class RedisEventGroup(_Reader):
    """`EventGroup` on a consumer group. For one task; a cancelled read loses nothing."""

    def __init__(self, client: StoreClient, keys: StreamKeys, name: str) -> None:
        super().__init__(client, keys)
        self.name: Final = name
        self._last = BEGINNING
        self._unanswered = False
        """True if sent entries may not have arrived: then they are pending in the group."""
        self._applied: list[EntryId] = []
        self._breaks = 0
        self._floor = b""
        self._beat_at = 0.0
        self._look = pack("HMGET", keys.meta, "floor", "breaks")

    async def create(self) -> EntryId:
        """As `EventGroup.create`."""
        end, breaks = await self._script(_CREATE)
        self._begin(EntryId(end.decode()), breaks)
        return self._last

    async def seek(self, position: EntryId) -> None:
        """As `EventGroup.seek`. Raises StreamTrimmed also for a position that is no entry and not the
        floor."""
        (breaks,) = await self._script(_SEEK, position)
        self._begin(position, breaks)

    def _begin(self, position: EntryId, breaks: int) -> None:
        self._last, self._breaks = position, breaks
        self._failed = self._unanswered = False
        self._applied.clear()
        self._beat_at = asyncio.get_running_loop().time()

    async def acknowledge(self, entry_ids: Sequence[EntryId]) -> None:
        """As `EventGroup.acknowledge`; sent with the next `read`."""
        self._applied += entry_ids

    async def _read(self, count: int, block_s: float) -> list[Entry]:
        now = asyncio.get_running_loop().time()
        if now - self._beat_at >= BEAT_S:
            await self._beat()
        if self._unanswered:
            entries = await self._fetch(count, 0.0, self._last)
            if entries:
                return entries
        self._unanswered = True
        entries = await self._fetch(count, block_s, ">")
        self._unanswered = False
        if not entries and asyncio.get_running_loop().time() - self._beat_at >= CHECK_S:
            await self._beat()
        return entries

    async def _fetch(self, count: int, block_s: float, after: str) -> list[Entry]:
        """Read entries never sent to this group (`>`), or those after an id that were sent and not
        acknowledged."""
        applied = tuple(self._applied)
        commands = []
        if applied:
            words = b"".join(map(pack_word, applied))
            commands.append(pack("XACK", self._keys.events, self.name, more_count=len(applied)) + words)
        place = ("STREAMS", self._keys.events, after)
        group = ("GROUP", self.name, _CONSUMER)
        commands.append(pack("XREADGROUP", *group, "COUNT", count, *_wait(block_s), *place))
        commands.append(self._look)
        *_, reply, (floor, breaks) = await self._connection.execute_all(commands, block_s=block_s)
        del self._applied[: len(applied)]
        self._check(floor, breaks)
        entries: list[Entry] = []
        for entry_id, fields in reply[0][1] if reply else ():
            if fields is None:
                raise StreamTrimmed(f"{self._keys.stream.path}: entries were deleted unread")
            entries.append(parse_entry(entry_id, fields))
        if entries:
            self._last = entries[-1].entry_id
        return entries

    def _check(self, floor: bytes | None, breaks: bytes | int | None) -> None:
        """Check that no unread entry was dropped. Raises StreamTrimmed."""
        if int(breaks or 0) != self._breaks:
            raise StreamTrimmed(f"{self._keys.stream.path}: entries were deleted by hand, or its head")
        if floor is not None and floor != self._floor:
            if entry_order(EntryId(floor.decode())) > entry_order(self._last):
                raise StreamTrimmed(f"{self._keys.stream.path}: what follows {self._last} was trimmed unread")
            self._floor = floor

    async def _beat(self) -> None:
        """Send a sign of life, and remove silent groups. Raises StreamLost, StreamTrimmed."""
        floor, breaks = await self._script(_BEAT, SILENCE_MS)
        self._beat_at = asyncio.get_running_loop().time()
        self._check(floor, breaks)

    async def _script(self, script: Script, *args: Argument) -> list[Any]:
        return await stream_script(self._client, script, self._keys, [self.name, *args])

    async def aclose(self) -> None:
        """As `EventGroup.aclose`."""
        await super().aclose()
        with suppress(StoreError):
            await self._client.pipeline(
                [
                    ("XGROUP", "DESTROY", self._keys.events, self.name),
                    ("ZREM", self._keys.groups, self.name),
                ]
            )


class RedisEventTail(_Reader):
    """`EventTail` by XREAD. For one task."""

    def __init__(
        self, client: StoreClient, keys: StreamKeys, after: EntryId | None, max_age_s: float
    ) -> None:
        super().__init__(client, keys)
        self._after = after
        self._max_age_s = max_age_s

    async def _read(self, count: int, block_s: float) -> list[Entry]:
        if self._after is None:
            self._after = just_before(await self._time_ms() - round(self._max_age_s * 1000))
        elif self._failed:
            # After a failover the stream may end before the last entry read, and continue from there.
            last = await self._client.execute("XREVRANGE", self._keys.events, "+", "-", "COUNT", 1)
            if last:
                self._after = min(self._after, EntryId(last[0][0].decode()), key=entry_order)
        place = ("STREAMS", self._keys.events, self._after)
        command = pack("XREAD", "COUNT", count, *_wait(block_s), *place)
        reply = await self._connection.execute(command, block_s=block_s)
        entries = [parse_entry(*raw) for raw in reply[0][1]] if reply else []
        if entries:
            self._after = entries[-1].entry_id
        return entries

    async def _time_ms(self) -> int:
        return await server_time_ms(self._client, self._keys)


async def server_time_ms(client: StoreClient, keys: StreamKeys) -> int:
    """Return the clock of a stream's server. Raises StoreError."""
    seconds, microseconds = map(int, await client.execute("TIME", beside=keys.events))
    return seconds * 1000 + microseconds // 1000


def _wait(block_s: float) -> tuple[str, int] | tuple[()]:
    """Return the BLOCK words of a read: none for no wait, since BLOCK 0 would wait for ever."""
    block_ms = round(block_s * 1000)
    return ("BLOCK", block_ms) if block_ms > 0 else ()


def parse_entry(entry_id: bytes, fields: Sequence[bytes]) -> Entry:
    """Read an entry; its content is empty if another program wrote it."""
    content = fields[1] if fields[0] == b"c" else b""
    return Entry(EntryId(entry_id.decode()), content)
