"""Event streams on Redis: Redis Streams with a consumer group a reader, trimmed by rules, and pub/sub topics.

The keys of a stream share one hash tag, `{prefix/<namespace>/<component>/<topic>/<shard>}`:

    {tag}:events   stream: the entries
    {tag}:sizes    list: for each entry its number of events and bytes
    {tag}:meta     hash: sums of the sizes, the floor (the last entry that was trimmed), breaks, a clock
    {tag}:groups   zset: each group's last sign of life, on that clock

Entries are appended in a transaction with their sizes. A script would take a server three times as long,
since it copies each entry several times more. Every other change of more than one key is a script
(`scripts/stream_*.lua`). Only two of these drop entries, and both record the floor. `trim` drops entries that
no reader needs any more. `bound` runs when the answer to an append shows that the stream is over its ceiling,
so that publishers alone cannot fill a server.

All scripts check that there are as many entries as sizes. If not, entries were deleted by hand. That is a
break, which every reader detects (`readers.py`).
"""

from __future__ import annotations

import asyncio
import builtins
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Self

from dynamo_redis.config import EventSettings, StoreSettings
from dynamo_redis.errors import SchemaMismatch, StoreRefused, StreamLost
from dynamo_redis.store.event_base import (
    EntryId,
    EventGroup,
    EventTail,
    GroupInfo,
    NewEntry,
    StreamInfo,
    StreamName,
    TopicSubscription,
)
from dynamo_redis.store.keys import StreamKeys, stream_of_key, stream_pattern
from dynamo_redis.store.redis.base import StoreClient
from dynamo_redis.store.redis.blocking import Argument
from dynamo_redis.store.redis.opening import open_client
from dynamo_redis.store.redis.subscription import ChannelSubscription
from dynamo_redis.store.scripts import load_script
from dynamo_redis.store.streams.readers import (
    SILENCE_MS,
    RedisEventGroup,
    RedisEventTail,
    server_time_ms,
    stream_script,
)

log = logging.getLogger(__name__)

AGE_STEP: Final = 1 / 60
"""Extra lifetime of entries in a stream with a maximum age, as a part of that age."""

_OPEN = load_script("stream_open", "stream_prelude")
_BOUND = load_script("stream_bound", "stream_prelude")
_TRIM = load_script("stream_trim", "stream_prelude")
_KEEP = load_script("stream_keep", "stream_prelude")
_INFO = load_script("stream_info", "stream_prelude")


class RedisEventStreams:
    """`EventStreams` on one Redis or Valkey. `aclose` closes the client; readers are closed by their
    owners."""

    def __init__(self, client: StoreClient, prefix: str, settings: EventSettings) -> None:
        self._client = client
        self._prefix = prefix
        self._settings = settings
        self._keys_of: dict[StreamName, StreamKeys] = {}
        self._opened: set[StreamName] = set()
        self._bounded_at: dict[StreamName, float] = {}

    @classmethod
    def from_settings(cls, store: StoreSettings, events: EventSettings) -> Self:
        """Return streams with a client of their own, not yet connected. Raises ConfigError if no server is
        configured."""
        url, timeout_s = store.require_url(), store.command_timeout_s
        name, login = "dynamo-redis-events", store.login()
        client = open_client(url, timeout_s=timeout_s, client_name=name, login=login)
        return cls(client, store.prefix, events)

    # ------------------------------------------------------------------ streams

    async def append(
        self, stream: StreamName, entries: Sequence[NewEntry], *, max_age_s: float | None = None
    ) -> None:
        """As `EventStreams.append`; all entries or none, though a lost answer leaves unknown which."""
        if not entries:
            return
        keys = self._keys(stream)
        if stream not in self._opened:
            await stream_script(self._client, _OPEN, keys, ())
            self._opened.add(stream)
        event_count = sum(entry.event_count for entry in entries)
        byte_count = sum(len(entry.content) for entry in entries)
        commands: list[Sequence[Argument]] = [
            *(("XADD", keys.events, "*", "c", entry.content) for entry in entries),
            ("RPUSH", keys.sizes, *(b"%d %d" % (entry.event_count, len(entry.content)) for entry in entries)),
            ("HINCRBY", keys.meta, "events", event_count),
            ("HINCRBY", keys.meta, "bytes", byte_count),
        ]
        *_, event_sum, byte_sum = await self._client.pipeline(commands, transaction=True)
        is_over = (
            event_sum > self._settings.event_stream_events_count
            or byte_sum > self._settings.event_stream_size_bytes
        )
        is_due = is_over
        if not is_over and max_age_s is not None:
            is_new = event_sum <= event_count  # its keys have no expiry yet
            now = asyncio.get_running_loop().time()
            is_aged = now - self._bounded_at.get(stream, float("-inf")) >= max_age_s * AGE_STEP
            if is_aged:
                self._bounded_at[stream] = now
            is_due = is_aged or is_new
        if is_due:
            limits = (self._settings.event_stream_events_count, int(self._settings.event_stream_size_bytes))
            age_ms = "" if max_age_s is None else max(1, round(max_age_s * 1000))
            await stream_script(self._client, _BOUND, keys, (*limits, age_ms))

    def group(self, stream: StreamName, name: str) -> EventGroup:
        """As `EventStreams.group`."""
        return RedisEventGroup(self._client, self._keys(stream), name)

    def tail(self, stream: StreamName, *, after: EntryId | None = None, max_age_s: float = 0.0) -> EventTail:
        """As `EventStreams.tail`."""
        return RedisEventTail(self._client, self._keys(stream), after, max_age_s)

    async def time_ms(self, stream: StreamName) -> int:
        """As `EventStreams.time_ms`."""
        return await server_time_ms(self._client, self._keys(stream))

    async def trim(self, stream: StreamName, snapshot: EntryId) -> EntryId:
        """As `EventStreams.trim`. Raises StreamLost if there is no stream."""
        answer = await stream_script(self._client, _TRIM, self._keys(stream), [snapshot, SILENCE_MS])
        floor, *removed = map(bytes.decode, answer)
        if removed:
            log.info("%s: readers silent for long are removed: %s", stream.path, ", ".join(removed))
        return EntryId(floor)

    async def keep_if_wanted(self, stream: StreamName) -> bool:
        """As `EventStreams.keep_if_wanted`."""
        (is_wanted,) = await stream_script(self._client, _KEEP, self._keys(stream), [SILENCE_MS])
        return bool(is_wanted)

    async def info(self, stream: StreamName) -> StreamInfo | None:
        """As `EventStreams.info`."""
        try:
            answer = await stream_script(self._client, _INFO, self._keys(stream), ())
        except StreamLost:
            return None
        entry_count, event_count, size_bytes, last, floor, *groups = answer
        return StreamInfo(
            stream,
            entry_count,
            event_count,
            size_bytes,
            EntryId(last.decode()),
            EntryId(floor.decode()),
            tuple(
                GroupInfo(name.decode("utf-8", "replace"), EntryId(position.decode()), lag, silent_ms / 1000)
                for name, position, lag, silent_ms in zip(
                    *(groups[part::4] for part in range(4)), strict=True
                )
            ),
        )

    async def list(self, *, on_left_out: Callable[[str], None] | None = None) -> builtins.list[StreamInfo]:
        """As `EventStreams.list`. Streams of another schema, or with an overwritten key, are left out.

        Raises StoreRefused if no stream can be read."""
        leave_out = on_left_out or partial(log.warning, "left out: %s")
        keys = {key async for key in self._client.scan(stream_pattern(self._prefix))}
        streams = sorted(
            filter(None, (stream_of_key(self._prefix, key) for key in keys)),
            key=lambda name: (name.namespace, name.component, name.topic, name.shards_count, name.shard),
        )
        found: builtins.list[StreamInfo] = []
        refusal: StoreRefused | None = None
        for stream in streams:
            try:
                info = await self.info(stream)
            except (SchemaMismatch, StoreRefused) as exc:
                refusal = exc if isinstance(exc, StoreRefused) else refusal
                leave_out(f"{stream.path}: {exc} (`dynamo-redis events rm {stream.path}` removes it)")
                continue
            if info is not None:
                found.append(info)
        if refusal is not None and not found:
            raise refusal
        return found

    async def delete(self, stream: StreamName) -> bool:
        """As `EventStreams.delete`."""
        return bool(await self._client.execute("UNLINK", *self._keys(stream).all))

    # ------------------------------------------------------------------ topics

    async def publish(self, topic: StreamName, message: bytes) -> int:
        """As `EventStreams.publish`."""
        return int(await self._client.execute("PUBLISH", self._keys(topic).messages, message))

    async def subscribe(self, topic: StreamName) -> TopicSubscription:
        """As `EventStreams.subscribe`."""
        return _ChannelTopic(await self._client.subscribe_channel(self._keys(topic).messages))

    # ------------------------------------------------------------------ lifetime

    def _keys(self, stream: StreamName) -> StreamKeys:
        keys = self._keys_of.get(stream)
        if keys is None:
            keys = self._keys_of[stream] = StreamKeys(self._prefix, stream)
        return keys

    async def aclose(self) -> None:
        """Close the connections. Never raises for a dead server."""
        await self._client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()


class _ChannelTopic:
    """`TopicSubscription` on a subscribed connection."""

    def __init__(self, subscription: ChannelSubscription) -> None:
        self._subscription = subscription

    async def next(self, timeout_s: float) -> bytes | None:
        message = await self._subscription.next_message(timeout_s)
        return message and message[1]

    async def aclose(self) -> None:
        await self._subscription.aclose()
