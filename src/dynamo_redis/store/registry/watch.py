"""Watches: one stream of changes, distributed to prefixes. Knows no Redis; the in-memory registry uses it
too.

A `Fanout` holds a `PrefixView` for each watched prefix: its records, as of a position in the change log. A
`QueueWatch` reads one view. When history was lost, or its queue overflowed, the watch remembers, for each key
that changes, the record that it last reported. Its consumer then needs only the difference between those
records and the view. The difference is computed when the consumer asks for it, so it includes all changes
until then. All calls are made on one event loop.

Bounds: `QUEUE_EVENTS_COUNT` events a watch (overflow: the queue is dropped, the consumer gets the
difference, marked as a resync); `BUFFER_CHANGES_COUNT` changes while a view is being loaded (overflow: the
load starts over). A long value counts as one event for each `EVENT_BYTES`, so memory is bounded as well.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Self

from dynamo_redis.errors import StoreError
from dynamo_redis.store.base import Delete, DeleteCause, Put, Record, Revision, Snapshot, WatchBatch
from dynamo_redis.store.registry.change_log import Change, Position, order

QUEUE_EVENTS_COUNT: Final = 4096
BUFFER_CHANGES_COUNT: Final = 10_000
EVENT_BYTES: Final = 4096

Before = Sequence[tuple[str, Record | None]]
"""Keys, each with its record before a change."""


def weight_of(change: Change) -> int:
    """Return the share of a bound that a change takes: 1, and 1 more for each `EVENT_BYTES` of its value."""
    return 1 if change.record is None else 1 + len(change.record.value) // EVENT_BYTES


@dataclass(slots=True)
class ViewUpdate:
    """Changes of one view, shared by its watches. Never modified."""

    batch: WatchBatch
    before: Before
    weight: int


class PrefixView:
    """The records under a prefix, and the watches that follow them. `position` is None until loaded."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.records: dict[str, Record] = {}
        self.watches: list[QueueWatch] = []
        self._snapshot: Position | None = None
        self._reached: Change | None = None  # the last change read since the snapshot
        self._buffer: list[Change] = []
        self._buffered = 0

    @property
    def position(self) -> Position | None:
        """Position in the log that the records correspond to; None until loaded."""
        if self._snapshot is None or self._reached is None:
            return self._snapshot
        return Position(self._snapshot.incarnation, self._reached.revision, self._reached.operation)

    @property
    def is_loaded(self) -> bool:
        """True once the records are loaded."""
        return self._snapshot is not None

    def begin_load(self) -> None:
        """Buffer the changes that arrive from now on, since a snapshot is about to be read."""
        self._buffer.clear()
        self._buffered = 0

    def keep(self, changes: Sequence[Change]) -> None:
        """Buffer changes, of any key, that arrive while the view is being loaded."""
        self._buffered += sum(map(weight_of, changes))
        if self._buffered <= BUFFER_CHANGES_COUNT:
            self._buffer += changes

    def finish_load(self, snapshot: Snapshot, position: Position) -> bool:
        """Install a snapshot, and apply the buffered changes after it.

        Return False if too many changes arrived meanwhile, or they are of another history: load again.
        """
        since = [change for change in self._buffer if order(change.revision) > order(position.revision)]
        connects = not since or since[0].previous == (position.revision, position.operation)
        if self._buffered > BUFFER_CHANGES_COUNT or not connects:
            return False
        self._install(snapshot, position)
        for change in since:
            self._apply(change)
            self._reached = change
        for watch in self.watches:
            watch.loaded()
        return True

    def replace(self, snapshot: Snapshot, position: Position, reason: str) -> None:
        """Replace the records by a snapshot, after history was lost."""
        was_loaded, known = self.is_loaded, self.records
        self._install(snapshot, position)
        for damaged in snapshot.invalid:  # the last readable record stays until its key is changed or deleted
            if damaged.key in known:
                self.records[damaged.key] = known[damaged.key]
        before = [
            (key, known.get(key))
            for key in known.keys() | self.records.keys()
            if _value(known.get(key)) != _value(self.records.get(key))
        ]
        for watch in self.watches:
            if was_loaded:
                watch.resync(reason, before)
            else:
                watch.loaded()

    def follow(self, changes: Sequence[Change], last: Change) -> None:
        """Apply the log's changes under the prefix, in order, and pass them on to the watches.

        `last` is the last change of any key that was read with them.
        """
        if self._reached is None:
            changes = [change for change in changes if self._is_news(change)]
        before: list[tuple[str, Record | None]] = []
        events: list[Put | Delete] = []
        weight = 0
        for change in changes:
            old = self.records.get(change.key)
            event = self._apply(change)
            if event is not None:
                before.append((change.key, old))
                events.append(event)
                weight += weight_of(change)
        if events:
            update = ViewUpdate(WatchBatch(tuple(events), last.revision), before, weight)
            for watch in self.watches:
                watch.offer(update)

    def reach(self, last: Change) -> None:
        """Note that all changes up to this one have been read."""
        if self._reached is not None or self._is_news(last):
            self._reached = last

    def _is_news(self, change: Change) -> bool:
        """Return whether a change is later than the snapshot, which may be ahead of the log's reader."""
        assert self._snapshot is not None
        return order(change.revision) > order(self._snapshot.revision)

    def _install(self, snapshot: Snapshot, position: Position) -> None:
        self.records = {record.key: record for record in snapshot.records}
        self._snapshot, self._reached = position, None
        self._buffer.clear()

    def _apply(self, change: Change) -> Put | Delete | None:
        event = change.event if change.key.startswith(self.prefix) else None
        if isinstance(event, Put):
            self.records[change.key] = event.record
        elif event is not None and self.records.pop(change.key, None) is None:
            return None  # its lease ended before it was reaped, so the key was never shown
        return event


def _value(record: Record | None) -> bytes | None:
    return None if record is None else record.value


class QueueWatch:
    """A watch on one prefix; see `base.Watch`. Made by `Fanout.watch`."""

    def __init__(self, view: PrefixView, on_close: Callable[[QueueWatch], None], *, after: bool) -> None:
        self.view = view
        self._on_close = on_close
        self._queue: deque[ViewUpdate] = deque()
        self._queued = 0
        self._history: WatchBatch | None = None
        self._awaits_history = after
        self._has_begun = after
        self._reported: dict[str, Record | None] | None = (
            None  # records last reported, if a difference is due
        )
        self._prune_at = 0
        self._reason: str | None = None
        self._error: StoreError | None = None
        self.closed = False
        self._wake = asyncio.Event()

    # ------------------------------------------------------------------ from the fanout

    def loaded(self) -> None:
        """Note that the view holds its first state."""
        self._wake.set()

    def join(self) -> Position:
        """Begin at the view's present position; `begin_with` gets the changes before it."""
        assert self.view.position is not None
        self._drop_queue()
        self._reported = self._reason = None
        return self.view.position

    def offer(self, update: ViewUpdate) -> None:
        """Queue new changes, unless a difference is due, which will include them."""
        if not self._has_begun:
            return
        if self._queue and self._queued + update.weight > QUEUE_EVENTS_COUNT:
            self.resync(f"slow consumer: {len(self._queue)} batches were waiting", ())
        if self._reported is not None:
            self._remember(update.before)
            return
        self._queue.append(update)
        self._queued += update.weight
        self._wake.set()

    def resync(self, reason: str, before: Before) -> None:
        """Drop the queue: the consumer gets the difference instead. `before`: further changes."""
        if not self._has_begun:
            return
        if self._reported is None:
            self._reported, self._prune_at, self._reason = {}, QUEUE_EVENTS_COUNT, reason
            for update in self._queue:
                self._remember(update.before)
            self._drop_queue()
        self._remember(before)
        self._wake.set()

    def _remember(self, before: Before) -> None:
        assert self._reported is not None
        for key, record in before:
            self._reported.setdefault(key, record)
        if len(self._reported) > self._prune_at:
            self._reported = {key: self._reported[key] for key in self._changed(self._reported)}
            self._prune_at = QUEUE_EVENTS_COUNT + 2 * len(self._reported)

    def _changed(self, reported: dict[str, Record | None]) -> list[str]:
        now = self.view.records
        return [key for key, record in reported.items() if _value(record) != _value(now.get(key))]

    def _drop_queue(self) -> None:
        self._queue.clear()
        self._queued = 0

    def begin_with(self, changes: Sequence[Change], revision: Revision) -> None:
        """Begin with the changes from the start revision to the `revision` of `join`."""
        events = (change.event for change in changes if change.key.startswith(self.view.prefix))
        self._history = WatchBatch(tuple(event for event in events if event is not None), revision)
        self._awaits_history = False
        self._wake.set()

    def fail(self, error: StoreError) -> None:
        """Raise an error at the next iteration, and end the watch."""
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
            batch = self._next_batch()
            if batch is not None:
                return batch
            self._wake.clear()
            await self._wake.wait()

    def _next_batch(self) -> WatchBatch | None:
        if self._awaits_history or not self.view.is_loaded:
            return None
        if self._history is not None:
            batch, self._history = self._history, None
            return batch
        if not self._has_begun:
            self._has_begun = True
            records = self.view.records
            return WatchBatch(tuple(Put(records[key]) for key in sorted(records)), self._revision)
        if self._reported is not None:
            revision, now = self._revision, self.view.records
            changed = sorted(self._changed(self._reported))
            gone = (Delete(key, revision, DeleteCause.RESYNC) for key in changed if key not in now)
            puts = (Put(now[key]) for key in changed if key in now)
            batch = WatchBatch((*gone, *puts), revision, self._reason)
            self._reported = self._reason = None
            return batch
        if self._queue:
            update = self._queue.popleft()
            self._queued -= update.weight
            return update.batch
        return None

    @property
    def _revision(self) -> Revision:
        assert self.view.position is not None
        return self.view.position.revision

    async def aclose(self) -> None:
        """End the watch, and an iteration that waits. Idempotent."""
        if not self.closed:
            self.closed = True
            self._on_close(self)
            self._wake.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()


class Fanout:
    """All views of a process. The cost of a change does not depend on the number of views of other
    prefixes."""

    def __init__(self) -> None:
        self.views: dict[str, PrefixView] = {}
        self._lengths: Counter[int] = Counter()  # of the prefixes

    def watch(self, prefix: str, *, after: bool = False) -> QueueWatch:
        """Return a new watch, on a view that may still have to be loaded. `after`: it begins with history."""
        if prefix not in self.views:
            self.views[prefix] = PrefixView(prefix)
            self._lengths[len(prefix)] += 1
        view = self.views[prefix]

        def forget(closed: QueueWatch) -> None:
            view.watches.remove(closed)
            if not view.watches and self.views.get(prefix) is view:
                del self.views[prefix]
                self._lengths[len(prefix)] -= 1
                if not self._lengths[len(prefix)]:
                    del self._lengths[len(prefix)]

        watch = QueueWatch(view, forget, after=after)
        view.watches.append(watch)
        if view.is_loaded:
            watch.loaded()
        return watch

    def follow(self, changes: Sequence[Change]) -> None:
        """Pass log entries on to the views."""
        last = changes[-1]
        concerned: dict[PrefixView, list[Change]] = {}
        for change in changes:
            for length in self._lengths:
                view = self.views.get(change.key[:length]) if length <= len(change.key) else None
                if view is not None and view.is_loaded:
                    concerned.setdefault(view, []).append(change)
        for view, its_changes in concerned.items():
            view.follow(its_changes, last)
        for view in self.views.values():
            if view.is_loaded:
                view.reach(last)
            else:
                view.keep(changes)

    async def aclose(self) -> None:
        """End every watch."""
        for view in list(self.views.values()):
            for watch in list(view.watches):
                await watch.aclose()
