"""The ledger: applies each publisher's events to the index exactly once, and finds gaps. Pure.

Publishers number their events. A batch that begins where the last one ended is applied. Events with lower
numbers are repetitions. A batch that begins higher shows a gap: then the publisher's *instance* is lost. Its
batches are ignored, because only the worker's own answer can close the gap, and that answer has all events
that were published before it. While the worker is asked its batches are held, because they may be newer than
the answer:

    HEARD   batches are applied; events before the first one are unknown    ask → ASKED    gap → LOST
    EXACT   every block is known                                            ask → ASKED    gap → LOST
    LOST    batches are ignored                                             ask → ASKED
    ASKED   batches are held                            answer → EXACT      none → LOST

After a gap the worker's blocks stay until one ask has ended. If the ask fails they are dropped: a worker that
does not answer is taken to hold nothing.

The last epochs of a worker are remembered, so that a late batch of an old epoch changes nothing. The worker's
answer overrides that: if it has an epoch that was taken to be old, that epoch counts again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from dynamo_redis.errors import InvalidRecord
from dynamo_redis.router.base import Worker
from dynamo_redis.router.index.prefix_index import KvIndex
from dynamo_redis.wire.event import EventBatch, PublisherId
from dynamo_redis.wire.kv_event import read_kv_events

HELD_EVENTS_COUNT: Final = 16_384
"""Most events of one instance that are held while it is asked. Past that it is asked once more."""

_RETIRED_COUNT: Final = 8
_U63_END: Final = 1 << 63

_ANSWER: Final = "a worker's answer to this router"


class Standing(Enum):
    """How well an instance's blocks are known; see the top of this module."""

    HEARD = "heard"
    EXACT = "exact"
    LOST = "lost"
    ASKED = "asked"


class Outcome(Enum):
    """The result of applying a batch."""

    APPLIED = "applied"
    REPEATED = "repeated"
    HELD = "held"
    IGNORED = "ignored"  # its instance is lost: the answer to come has its events
    MISSING = "missing"  # events before it are missing, or it cannot be read: ask the instance


@dataclass(slots=True)
class _Rank:
    """The events applied of one data-parallel rank: their epoch (None: the worker has no such rank now), and
    the sequence that comes next (None: the rank's blocks were dropped)."""

    epoch: int | None = None
    next_sequence: int | None = 0
    retired: deque[int] = field(default_factory=lambda: deque(maxlen=_RETIRED_COUNT))

    def restart(self, epoch: int | None) -> None:
        """Begin at sequence 0 of an epoch."""
        if epoch != self.epoch:
            if epoch is not None and epoch in self.retired:
                self.retired.remove(epoch)
            if self.epoch is not None:
                self.retired.append(self.epoch)
            self.epoch = epoch
        self.next_sequence = 0


@dataclass(slots=True)
class _Instance:
    """The ranks of one instance, and the batches that are held while it is asked."""

    standing: Standing = Standing.HEARD
    ranks: dict[int, _Rank] = field(default_factory=dict)
    held: list[EventBatch] = field(default_factory=list)
    held_count: int = 0
    overflowed: bool = False
    """True if batches were dropped, because too many were to be held."""

    def hold(self, batch: EventBatch) -> None:
        self.held_count += 1 + len(batch.events)
        if self.held_count > HELD_EVENTS_COUNT:
            self.held.clear()
            self.overflowed = True
        else:
            self.held.append(batch)

    def release(self) -> list[EventBatch]:
        held, self.held = self.held, []
        self.held_count = 0
        return held


class Ledger:
    """Applies batches to an index, without waiting. For one event loop.

    `applied_count` and `repeated_count` count events.
    """

    def __init__(self, index: KvIndex) -> None:
        self.index = index
        self.applied_count = 0
        self.repeated_count = 0
        self.whole: set[int] = set()
        """Instances of which all blocks were known once, and have not been dropped since. Only read it."""
        self.whole_version = 0
        """Another number after each change of `whole`."""
        self._instances: dict[int, _Instance] = {}

    # ----------------------------------------------------------------- what is known

    def standing(self, instance_id: int) -> Standing | None:
        """Return how well an instance's blocks are known; None if no batch of it has come."""
        known = self._instances.get(instance_id)
        return None if known is None else known.standing

    def instance_ids(self) -> list[int]:
        """Return the ids of all instances of which a batch has come."""
        return list(self._instances)

    def exact(self) -> dict[PublisherId, int]:
        """Return the next sequence of each publisher of which every block is known."""
        return {
            PublisherId(instance_id, rank.epoch, dp_rank): rank.next_sequence
            for instance_id, known in self._instances.items()
            if known.standing is Standing.EXACT
            for dp_rank, rank in known.ranks.items()
            if rank.epoch is not None and rank.next_sequence is not None
        }

    # ----------------------------------------------------------------- batches

    def apply(self, batch: EventBatch) -> Outcome:
        """Apply a batch, or hold it. After MISSING its instance is lost."""
        instance_id = batch.publisher.instance_id
        known = self._instances.get(instance_id)
        if known is None:
            known = self._instances[instance_id] = _Instance()
        if known.standing is Standing.ASKED:
            known.hold(batch)
            return Outcome.HELD
        if known.standing is Standing.LOST:
            return Outcome.IGNORED
        return self._apply_to(known, batch)

    def _apply_to(self, known: _Instance, batch: EventBatch) -> Outcome:
        """Apply a batch of an instance that is not asked now, and not lost."""
        instance_id, epoch, dp_rank = batch.publisher
        worker = Worker(instance_id, dp_rank)
        rank = known.ranks.setdefault(dp_rank, _Rank())
        if epoch in rank.retired:
            self.repeated_count += len(batch.events)
            return Outcome.REPEATED
        if rank.epoch is None:
            rank.restart(epoch)
        elif rank.epoch != epoch:
            # The process was started anew, with all of its ranks: its answer will have their sequences.
            self.index.remove(worker)
            self._note_whole(instance_id, is_whole=False)
            rank.restart(epoch)
            known.standing = Standing.LOST
            return Outcome.MISSING
        return self._apply_next(known, worker, rank, batch)

    def _apply_next(self, known: _Instance, worker: Worker, rank: _Rank, batch: EventBatch) -> Outcome:
        """Apply those events of a batch, of the rank's present epoch, that have not been applied yet."""
        repeated = -1 if rank.next_sequence is None else rank.next_sequence - batch.first_sequence
        if repeated < 0:
            known.standing = Standing.LOST
            return Outcome.MISSING
        if repeated >= len(batch.events):
            self.repeated_count += len(batch.events)
            return Outcome.REPEATED
        try:
            events = read_kv_events(batch.events[repeated:] if repeated else batch.events)
        except InvalidRecord:
            known.standing = Standing.LOST
            return Outcome.MISSING
        self.index.apply(worker, events)
        rank.next_sequence = batch.next_sequence
        self.repeated_count += repeated
        self.applied_count += len(batch.events) - repeated
        return Outcome.APPLIED

    # ----------------------------------------------------------------- asking

    def begin_ask(self, instance_id: int) -> DumpReader:
        """Hold an instance's batches from now on, because it is asked; return the reader of its answer.

        Batches that were held for an earlier ask are dropped: the answer will have their events.
        """
        known = self._instances.setdefault(instance_id, _Instance())
        known.standing = Standing.ASKED
        known.release()
        known.overflowed = False
        return DumpReader(self, instance_id, known)

    def lose(self, instance_id: int) -> None:
        """Mark an instance as lost, and drop its blocks: no answer says which blocks it holds."""
        known = self._instances.get(instance_id)
        if known is not None:
            known.standing = Standing.LOST
            known.release()
            self._note_whole(instance_id, is_whole=False)
            for dp_rank, rank in known.ranks.items():
                self.index.remove(Worker(instance_id, dp_rank))
                rank.next_sequence = None

    def is_current(self, instance_id: int, known: _Instance) -> bool:
        """Return True unless the instance was forgotten since `known` was made."""
        return self._instances.get(instance_id) is known

    def forget(self, instance_id: int) -> None:
        """Forget an instance that has left, with its blocks."""
        known = self._instances.pop(instance_id, None)
        if known is not None:
            self._note_whole(instance_id, is_whole=False)
            for dp_rank in known.ranks:
                self.index.remove(Worker(instance_id, dp_rank))

    def _note_whole(self, instance_id: int, *, is_whole: bool) -> None:
        if is_whole:
            self.whole.add(instance_id)
        else:
            self.whole.discard(instance_id)
        self.whole_version += 1

    # ----------------------------------------------------------------- snapshots

    def restore(self, index: KvIndex, publishers: Mapping[PublisherId, int]) -> None:
        """Begin with a snapshot's index. Blocks of a worker without a publisher in it are dropped: they were
        not known exactly when the snapshot was taken."""
        self.index = index
        self._instances.clear()
        for publisher, next_sequence in publishers.items():
            known = self._instances.setdefault(publisher.instance_id, _Instance(Standing.EXACT))
            known.ranks[publisher.dp_rank] = _Rank(publisher.epoch, next_sequence)
        for worker in index.workers():
            known_instance = self._instances.get(worker.instance_id)
            if known_instance is None or worker.dp_rank not in known_instance.ranks:
                index.remove(worker)
        self.whole = set(self._instances)
        self.whole_version += 1


class DumpReader:
    """Reads a worker's answer from `kv_dump`, item by item, into a ledger.

    For each rank comes a head `{"epoch", "dp_rank", "kind", "next_sequence", …}`, then its `{"batch"}` items.
    Those of a `range` have the events from the caller's next sequence on; those of a `dump` have the rank's
    blocks, as stored events.
    `apply` and `finish` raise InvalidRecord for an answer that is not of this form; then call `fail`.
    """

    def __init__(self, ledger: Ledger, instance_id: int, known: _Instance) -> None:
        self._ledger = ledger
        self.instance_id = instance_id
        self._known = known
        self._missing = set(known.ranks)
        self._worker = Worker(instance_id)
        self._rank: _Rank | None = None
        self._is_dump = False
        self._next_sequence = 0
        self.have = [
            [rank.epoch, dp_rank, rank.next_sequence]
            for dp_rank, rank in known.ranks.items()
            if rank.epoch is not None and rank.next_sequence is not None
        ]
        """For the request: the events applied of each rank, as [epoch, dp_rank, next_sequence]."""

    def apply(self, item: Any) -> None:
        """Apply the answer's next item."""
        if not isinstance(item, dict):
            raise InvalidRecord(_ANSWER, "no map")
        if not self._ledger.is_current(self.instance_id, self._known):
            raise InvalidRecord(_ANSWER, "the worker has been forgotten meanwhile")
        if "batch" in item:
            batch, rank, worker = EventBatch.from_bytes(item["batch"]), self._rank, self._worker
            if rank is None or batch.publisher != (worker.instance_id, rank.epoch, worker.dp_rank):
                raise InvalidRecord(_ANSWER, "a batch of another rank than the one before it")
            if self._is_dump:
                self._ledger.index.apply(worker, read_kv_events(batch.events))
            elif self._ledger._apply_next(self._known, worker, rank, batch) is Outcome.MISSING:
                raise InvalidRecord(_ANSWER, f"rank {worker.dp_rank} answers with a range that has holes")
            return
        self._end_rank()
        epoch, dp_rank = _read_number(item, "epoch"), _read_number(item, "dp_rank")
        next_sequence = _read_number(item, "next_sequence")
        kind = item.get("kind")
        if kind not in ("range", "dump"):
            raise InvalidRecord(_ANSWER, "neither a rank nor a batch")
        rank = self._known.ranks.setdefault(dp_rank, _Rank())
        self._worker = Worker(self.instance_id, dp_rank)
        if kind == "dump":
            self._ledger._note_whole(self.instance_id, is_whole=False)
            self._ledger.index.remove(self._worker)
            rank.restart(epoch)
        elif rank.epoch != epoch or rank.next_sequence is None:
            raise InvalidRecord(_ANSWER, f"rank {dp_rank} answers with a range that was not asked for")
        self._missing.discard(dp_rank)
        self._rank, self._is_dump, self._next_sequence = rank, kind == "dump", next_sequence

    def finish(self) -> bool:
        """End an answer that is whole, and apply the batches that were held. Return True if the instance must
        be asked again."""
        self._end_rank()
        known = self._known
        if not self._ledger.is_current(self.instance_id, known):
            return False
        for dp_rank in self._missing:  # ranks that the worker no longer has
            self._ledger.index.remove(Worker(self.instance_id, dp_rank))
            known.ranks[dp_rank].restart(None)
        known.standing = Standing.LOST if known.overflowed else Standing.EXACT
        self._ledger._note_whole(self.instance_id, is_whole=True)
        for batch in known.release():
            if known.standing is Standing.EXACT:
                self._ledger._apply_to(known, batch)
        return known.standing is not Standing.EXACT

    def fail(self) -> None:
        """End an ask that has no answer, or not a whole one: the instance is lost, its blocks are dropped."""
        if self._ledger.is_current(self.instance_id, self._known):
            self._ledger.lose(self.instance_id)

    def _end_rank(self) -> None:
        """Check that the rank's range was whole, and note its next sequence."""
        rank = self._rank
        if rank is None:
            return
        if not self._is_dump and rank.next_sequence != self._next_sequence:
            raise InvalidRecord(
                _ANSWER, f"rank {self._worker.dp_rank} answers with a range that is not whole"
            )
        rank.next_sequence = self._next_sequence
        self._rank = None


def _read_number(head: dict[Any, Any], name: str) -> int:
    """Return a field that must be a number of 63 bits. Raises InvalidRecord."""
    found = head.get(name)
    if type(found) is not int or not 0 <= found < _U63_END:
        raise InvalidRecord(_ANSWER, f"its {name} is {found!r}, not a number of 63 bits")
    return found
