"""Watches that treat the change log as one line without breaks, which it is not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from dynamo_redis.backoff import Backoff
from dynamo_redis.errors import StoreError
from dynamo_redis.store.base import Delete, DeleteCause, Put, Record, Revision, WatchBatch
from dynamo_redis.store.redis.blocking import pack
from dynamo_redis.store.redis.client import Argument, RedisClient
from dynamo_redis.store.registry.change_log import Change
from dynamo_redis.store.registry.scripts_api import KeyValue, parse_changes
from dynamo_redis.store.scripts import Script

BLOCK_S = 1.0


class NaiveWatch:
    """The state of a prefix, then all entries that XREAD returns behind the last id; also after a reconnect.

    It checks neither the entries' predecessors nor, after a break, the registry's revision.
    """

    def __init__(self, kv: KeyValue, prefix: str) -> None:
        self._kv = kv
        self._prefix = prefix
        self._connection = kv.client.blocking(kv.keys.log)
        self._state: dict[str, Record] = {}
        self._at = Revision("")

    async def __aiter__(self) -> AsyncIterator[WatchBatch]:
        yield await self._load(None)
        backoff = Backoff(cap_s=0.1)
        while True:
            try:
                changes = await self._read()
            except StoreError:
                await asyncio.sleep(backoff.next_s())
                continue
            if not self._connects(changes):
                yield await self._load("the log was trimmed")
            elif changes:
                yield self._follow(changes)

    async def aclose(self) -> None:
        """Close its connections."""
        await self._connection.aclose()
        await self._kv.client.aclose()

    def _connects(self, changes: Sequence[Change]) -> bool:
        return True

    async def _read(self) -> list[Change]:
        command = pack("XREAD", "BLOCK", round(BLOCK_S * 1000), "STREAMS", self._kv.keys.log, self._at)
        reply = await self._connection.execute(command, block_s=BLOCK_S)
        return parse_changes(reply[0][1]) if reply else []

    async def _load(self, reason: str | None) -> WatchBatch:
        snapshot, _ = await self._kv.snapshot(self._prefix)
        before, self._state = self._state, {record.key: record for record in snapshot.records}
        self._at = snapshot.revision
        gone = (
            Delete(key, snapshot.revision, DeleteCause.RESYNC) for key in sorted(before.keys() - self._state)
        )
        changed = (
            Put(record)
            for key, record in self._state.items()
            if key not in before or before[key].value != record.value
        )
        return WatchBatch((*gone, *changed), snapshot.revision, reason)

    def _follow(self, changes: Sequence[Change]) -> WatchBatch:
        self._at = changes[-1].revision
        events = []
        for change in changes:
            event = change.event
            if event is None or not change.key.startswith(self._prefix):
                continue
            events.append(event)
            if isinstance(event, Put):
                self._state[change.key] = event.record
            else:
                self._state.pop(change.key, None)
        return WatchBatch(tuple(events), self._at)


class CounterWatch(NaiveWatch):
    """Checks that each change names the revision before it, but not which process wrote that revision."""

    def _connects(self, changes: Sequence[Change]) -> bool:
        return not changes or changes[0].previous[0] == self._at


class CounterClient(RedisClient):
    """Runs the registry's scripts with a counter for revisions: 1-0, 2-0, 3-0, … in place of stream ids."""

    _STREAM_ID = "keep, '*',"
    _COUNTER = "keep, (string.match(REV, '^%d+') + 1) .. '-0',"

    async def script(self, script: Script, keys: Sequence[Argument], args: Sequence[Argument] = ()) -> Any:
        """Run a script like `RedisClient.script`."""
        counting = Script.of(script.name, script.source.replace(self._STREAM_ID, self._COUNTER))
        assert counting.sha != script.sha or "XADD" not in script.source, "the scripts have changed"
        return await super().script(counting, keys, args)
