"""Watches: one stream of changes fanned out to prefixes. Knows no Redis; the in-memory twin uses it too.

A `Fanout` holds a `PrefixView` for each watched prefix: its records, as of a position in the change log.
A `QueueWatch` reads one view. What it has handed out is kept, so that after lost history, or when its queue
overflowed, the difference between that and the view is all it needs: it is worked out when the consumer
comes for it, and whatever happened in between is in it. Everything here runs on one event loop.

Bounds: `QUEUE_EVENTS_COUNT` events a watch (overflow: the queue is dropped, the consumer gets the
difference, marked as a resync); `BUFFER_CHANGES_COUNT` changes while a view is being loaded (overflow: the
load starts over).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Self

from dynamo_redis.errors import StoreError
from dynamo_redis.store.base import Delete, DeleteCause, Put, Record, Revision, Snapshot, WatchBatch
from dynamo_redis.store.change_log import Change, Position, order

QUEUE_EVENTS_COUNT: Final = 4096
BUFFER_CHANGES_COUNT: Final = 10_000


class PrefixView:
    """The records under a prefix, and the watches that follow them. `position` is None until loaded."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.records: dict[str, Record] = {}
        self.position: Position | None = None
        self.watches: list[QueueWatch] = []
        self._buffer: list[Change] = []
        self._overran = False

    def begin_load(self) -> None:
        """Keep the changes that arrive from now on: a snapshot is about to be read."""
        self._buffer.clear()
        self._overran = False

    def finish_load(self, snapshot: Snapshot, position: Position) -> bool:
        """Take a snapshot, and the changes since. False: too many arrived meanwhile, load again."""
        if self._overran:
            return False
        self._install(snapshot, position)
        for change in self._buffer:
            self._apply(change)
        self._buffer.clear()
        for watch in self.watches:
            watch.loaded()
        return True

    def replace(self, snapshot: Snapshot, position: Position, reason: str) -> None:
        """Take the place of what was known, after history was lost."""
        was_loaded = self.position is not None
        self._install(snapshot, position)
        self._buffer.clear()
        for watch in self.watches:
            if was_loaded:
                watch.resync(reason)
            else:
                watch.loaded()

    def follow(self, changes: Sequence[Change]) -> None:
        """Apply log entries in order and pass them on to the watches."""
        if self.position is None:
            self._overran = self._overran or len(self._buffer) + len(changes) > BUFFER_CHANGES_COUNT
            if not self._overran:
                self._buffer += changes
            return
        events = tuple(event for change in changes if (event := self._apply(change)) is not None)
        if events:
            batch = WatchBatch(events, changes[-1].revision)
            for watch in self.watches:
                watch.offer(batch)

    def _install(self, snapshot: Snapshot, position: Position) -> None:
        self.records = {record.key: record for record in snapshot.records}
        self.position = position

    def _apply(self, change: Change) -> Put | Delete | None:
        assert self.position is not None
        if order(change.revision) <= order(self.position.revision):
            return None  # the snapshot has it
        self.position = Position(self.position.incarnation, change.revision, change.operation)
        event = change.event if change.key.startswith(self.prefix) else None
        if isinstance(event, Put):
            self.records[change.key] = event.record
        elif event is not None and self.records.pop(change.key, None) is None:
            return None  # it had ended by its lease's deadline before it was reaped: never shown
        return event


class QueueWatch:
    """A watch on one prefix; see `base.Watch`. Made by `Fanout.watch`."""

    def __init__(self, view: PrefixView, on_close: Callable[[QueueWatch], None], *, after: bool) -> None:
        self.view = view
        self._on_close = on_close
        self._reported: dict[str, Record] = {}
        self._queue: deque[WatchBatch] = deque()
        self._queued_count = 0
        self._history: WatchBatch | None = None
        self._awaits_history = after
        self._state_due = not after
        self._reason: str | None = None
        self._error: StoreError | None = None
        self.closed = False
        self._wake = asyncio.Event()

    # ------------------------------------------------------------------ from the fanout

    def loaded(self) -> None:
        """The view holds its first state."""
        self._wake.set()

    def join(self) -> Position:
        """Begin at the view's present position; what came before it is for `begin_with`."""
        assert self.view.position is not None
        self._reported = dict(self.view.records)
        self._queue.clear()
        self._queued_count = 0
        return self.view.position

    def offer(self, batch: WatchBatch) -> None:
        """New changes. Dropped when a difference is due anyway, which will hold them."""
        if self._state_due:
            return
        if self._queued_count + len(batch.events) > QUEUE_EVENTS_COUNT:
            self.resync(f"slow consumer: more than {QUEUE_EVENTS_COUNT} events behind")
            return
        self._queue.append(batch)
        self._queued_count += len(batch.events)
        self._wake.set()

    def resync(self, reason: str) -> None:
        """Drop what is queued: the consumer gets the difference instead."""
        self._queue.clear()
        self._queued_count = 0
        if not self._state_due:
            self._state_due, self._reason = True, reason
        self._wake.set()

    def begin_with(self, changes: Sequence[Change], revision: Revision) -> None:
        """The changes between the start revision and the `revision` joined at."""
        events = (change.event for change in changes if change.key.startswith(self.view.prefix))
        self._history = WatchBatch(tuple(event for event in events if event is not None), revision)
        self._awaits_history = False
        self._wake.set()

    def fail(self, error: StoreError) -> None:
        """Raise this at the next iteration, and end."""
        self._error = error
        self._wake.set()

    # ------------------------------------------------------------------ to the consumer

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> WatchBatch:
        while True:
            if self._error is not None and not self.closed:
                await self.aclose()
                raise self._error
            if self.closed:
                raise StopAsyncIteration
            batch = self._take()
            if batch is not None:
                return batch
            self._wake.clear()
            await self._wake.wait()

    def _take(self) -> WatchBatch | None:
        if self.view.position is None or self._awaits_history:
            return None
        if self._history is not None:
            batch, self._history = self._history, None
        elif self._state_due:
            return self._take_difference(self.view.position.revision)
        elif self._queue:
            batch = self._queue.popleft()
            self._queued_count -= len(batch.events)
        else:
            return None
        for event in batch.events:
            if isinstance(event, Put):
                self._reported[event.record.key] = event.record
            else:
                self._reported.pop(event.key, None)
        return batch

    def _take_difference(self, revision: Revision) -> WatchBatch:
        known, now = self._reported, self.view.records
        gone = (Delete(key, revision, DeleteCause.RESYNC) for key in sorted(known.keys() - now.keys()))
        changed = (
            Put(now[key]) for key in sorted(now) if key not in known or known[key].value != now[key].value
        )
        batch = WatchBatch((*gone, *changed), revision, self._reason)
        self._reported = dict(now)
        self._state_due, self._reason = False, None
        return batch

    async def aclose(self) -> None:
        """End the watch: an iteration that waits ends as well. Idempotent."""
        if not self.closed:
            self.closed = True
            self._on_close(self)
            self._wake.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()


class Fanout:
    """All views of a process."""

    def __init__(self) -> None:
        self.views: dict[str, PrefixView] = {}

    def watch(self, prefix: str, *, after: bool = False) -> QueueWatch:
        """A new watch, on a view that may still have to be loaded. `after`: it starts with history."""
        view = self.views.get(prefix)
        if view is None:
            view = self.views[prefix] = PrefixView(prefix)
        watch = QueueWatch(view, self._forget, after=after)
        view.watches.append(watch)
        if view.position is not None:
            watch.loaded()
        return watch

    def follow(self, changes: Sequence[Change]) -> None:
        """Pass log entries on to every view."""
        for view in self.views.values():
            view.follow(changes)

    def _forget(self, watch: QueueWatch) -> None:
        watch.view.watches.remove(watch)
        if not watch.view.watches and self.views.get(watch.view.prefix) is watch.view:
            del self.views[watch.view.prefix]

    async def aclose(self) -> None:
        """End every watch."""
        for view in list(self.views.values()):
            for watch in list(view.watches):
                await watch.aclose()
