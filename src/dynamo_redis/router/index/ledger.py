"""What has been applied of each publisher, exactly once, and of whom something may be missing. Pure.

Publishers number their events. A batch that begins where the last one ended is applied; what lies below is a
repetition; one that begins above shows a gap. Then the publisher's *instance* is lost: its batches are
ignored, since nothing but its worker's own answer can heal it, and that will have all that was published
before. While it is asked, batches are held, for they may be newer than the answer:

    HEARD   batches are applied; what was before the first is not known     ask → ASKED    gap → LOST
    EXACT   every block is known                                            ask → ASKED    gap → LOST
    LOST    batches are ignored                                             ask → ASKED
    ASKED   batches are held                            answer → EXACT      none → LOST

A gap leaves the worker's blocks for as long as one ask takes. An ask that fails drops them: a worker that
cannot say what it holds is taken to hold nothing.

Epochs that a worker has left behind are remembered, so that a late batch of theirs changes nothing. Its own
word is the last one: an epoch that was believed past counts again if it is the one a worker answers with.
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
"""Events of one instance that are held while it is asked. Past that it is asked once more."""

_RETIRED_COUNT: Final = 8
_U63_END: Final = 1 << 63

_ANSWER: Final = "a worker's answer to this router"


class Standing(Enum):
    """How far an instance is known."""

    HEARD = "heard"
    EXACT = "exact"
    LOST = "lost"
    ASKED = "asked"


class Outcome(Enum):
    """What became of a batch."""

    APPLIED = "applied"
    REPEATED = "repeated"
    HELD = "held"
    IGNORED = "ignored"  # its instance is lost: the answer to come has it
    MISSING = "missing"  # something before it is missing, or it cannot be read: ask the instance


@dataclass(slots=True)
class _Rank:
    """How far one data-parallel rank has been applied: of which epoch (None: there is no such rank now), and
    up to which sequence (None: what is known of it does not count)."""

    epoch: int | None = None
    next_sequence: int | None = 0
    retired: deque[int] = field(default_factory=lambda: deque(maxlen=_RETIRED_COUNT))

    def restart(self, epoch: int | None) -> None:
        if epoch != self.epoch:
            if epoch is not None and epoch in self.retired:
                self.retired.remove(epoch)
            if self.epoch is not None:
                self.retired.append(self.epoch)
            self.epoch = epoch
        self.next_sequence = 0


@dataclass(slots=True)
class _Instance:
    standing: Standing = Standing.HEARD
    ranks: dict[int, _Rank] = field(default_factory=dict)
    held: list[EventBatch] = field(default_factory=list)
    held_count: int = 0
    overflowed: bool = False

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
    """Applies batches to an index. One event loop, no waiting.

    `applied_count` and `repeated_count` count events.
    """

    def __init__(self, index: KvIndex) -> None:
        self.index = index
        self.applied_count = 0
        self.repeated_count = 0
        self._instances: dict[int, _Instance] = {}

    # ----------------------------------------------------------------- what is known

    def standing(self, instance_id: int) -> Standing | None:
        """How far an instance is known; None if nothing was ever heard of it."""
        known = self._instances.get(instance_id)
        return None if known is None else known.standing

    def instance_ids(self) -> list[int]:
        """All of whom something was heard."""
        return list(self._instances)

    def exact(self) -> dict[PublisherId, int]:
        """The next sequence of each publisher of which every block is known."""
        return {
            PublisherId(instance_id, rank.epoch, dp_rank): rank.next_sequence
            for instance_id, known in self._instances.items()
            if known.standing is Standing.EXACT
            for dp_rank, rank in known.ranks.items()
            if rank.epoch is not None and rank.next_sequence is not None
        }

    # ----------------------------------------------------------------- what is heard

    def take(self, batch: EventBatch) -> Outcome:
        """Apply a batch, or hold it, or find that it cannot be: then its instance is lost from now on."""
        instance_id = batch.publisher.instance_id
        known = self._instances.get(instance_id)
        if known is None:
            known = self._instances[instance_id] = _Instance()
        if known.standing is Standing.ASKED:
            known.hold(batch)
            return Outcome.HELD
        if known.standing is Standing.LOST:
            return Outcome.IGNORED
        return self._apply(known, batch)

    def _apply(self, known: _Instance, batch: EventBatch) -> Outcome:
        instance_id, epoch, dp_rank = batch.publisher
        worker = Worker(instance_id, dp_rank)
        rank = known.ranks.setdefault(dp_rank, _Rank())
        if epoch in rank.retired:
            self.repeated_count += len(batch.events)
            return Outcome.REPEATED
        if rank.epoch is None:
            rank.restart(epoch)
        elif rank.epoch != epoch:
            # The process was started anew, with all of its ranks: it will say where they are.
            self.index.remove(worker)
            rank.restart(epoch)
            known.standing = Standing.LOST
            return Outcome.MISSING
        return self._continue(known, worker, rank, batch)

    def _continue(self, known: _Instance, worker: Worker, rank: _Rank, batch: EventBatch) -> Outcome:
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

    def begin_ask(self, instance_id: int) -> Answer:
        """An instance is asked now: hold what comes of it. What was held for an earlier ask is forgotten,
        since the answer will have it."""
        known = self._instances.setdefault(instance_id, _Instance())
        known.standing = Standing.ASKED
        known.release()
        known.overflowed = False
        return Answer(self, instance_id, known)

    def lose(self, instance_id: int) -> None:
        """Nobody can say what an instance holds: it is lost, and its blocks count no more."""
        known = self._instances.get(instance_id)
        if known is not None:
            known.standing = Standing.LOST
            known.release()
            for dp_rank, rank in known.ranks.items():
                self.index.remove(Worker(instance_id, dp_rank))
                rank.next_sequence = None

    def is_current(self, instance_id: int, known: _Instance) -> bool:
        """Whether that is what is known of the instance, and not of one that was forgotten."""
        return self._instances.get(instance_id) is known

    def forget(self, instance_id: int) -> None:
        """An instance is no more."""
        known = self._instances.pop(instance_id, None)
        if known is not None:
            for dp_rank in known.ranks:
                self.index.remove(Worker(instance_id, dp_rank))

    # ----------------------------------------------------------------- snapshots

    def restore(self, index: KvIndex, publishers: Mapping[PublisherId, int]) -> None:
        """Begin with a snapshot's index. Blocks of workers that it has no publisher of are dropped: they were
        in doubt when it was taken."""
        self.index = index
        self._instances.clear()
        for publisher, next_sequence in publishers.items():
            known = self._instances.setdefault(publisher.instance_id, _Instance(Standing.EXACT))
            known.ranks[publisher.dp_rank] = _Rank(publisher.epoch, next_sequence)
        for worker in index.workers():
            known_instance = self._instances.get(worker.instance_id)
            if known_instance is None or worker.dp_rank not in known_instance.ranks:
                index.remove(worker)


class Answer:
    """A worker's answer to being asked what it holds, item by item, into a ledger.

    For each rank comes `{"epoch", "dp_rank", "kind", "next_sequence", …}`, then its `{"batch"}` items: of a
    `range` what followed the caller's next sequence, of a `dump` the rank's blocks as stored events.
    `take` and `finish` raise InvalidRecord for what is no such answer; then call `fail`.
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
        """What to say in the request: what is known of each rank, as [epoch, dp_rank, next_sequence]."""

    def take(self, item: Any) -> None:
        """The answer's next item."""
        if not isinstance(item, dict):
            raise InvalidRecord(_ANSWER, "no map")
        if not self._ledger.is_current(self.instance_id, self._known):
            raise InvalidRecord(_ANSWER, "the worker has been forgotten meanwhile")
        if "batch" in item:
            self._take_batch(EventBatch.from_bytes(item["batch"]))
        else:
            self._end_rank()
            self._begin_rank(item)

    def finish(self) -> bool:
        """The answer is whole. Apply what was held; answers whether the instance must be asked again."""
        self._end_rank()
        known = self._known
        if not self._ledger.is_current(self.instance_id, known):
            return False
        for dp_rank in self._missing:  # it has them no more
            self._ledger.index.remove(Worker(self.instance_id, dp_rank))
            known.ranks[dp_rank].restart(None)
        known.standing = Standing.LOST if known.overflowed else Standing.EXACT
        for batch in known.release():
            if known.standing is Standing.EXACT:
                self._ledger._apply(known, batch)
        return known.standing is not Standing.EXACT

    def fail(self) -> None:
        """There is no answer, or not a whole one: the instance is lost, and its blocks count no more."""
        if self._ledger.is_current(self.instance_id, self._known):
            self._ledger.lose(self.instance_id)

    def _begin_rank(self, head: dict[Any, Any]) -> None:
        epoch, dp_rank, next_sequence = (
            _number(head, name) for name in ("epoch", "dp_rank", "next_sequence")
        )
        kind = head.get("kind")
        if kind not in ("range", "dump"):
            raise InvalidRecord(_ANSWER, "neither a rank nor a batch")
        rank = self._known.ranks.setdefault(dp_rank, _Rank())
        self._worker = Worker(self.instance_id, dp_rank)
        if kind == "dump":
            self._ledger.index.remove(self._worker)
            rank.restart(epoch)
        elif rank.epoch != epoch or rank.next_sequence is None:
            raise InvalidRecord(_ANSWER, f"rank {dp_rank} answers with a range of what is not known")
        self._missing.discard(dp_rank)
        self._rank, self._is_dump, self._next_sequence = rank, kind == "dump", next_sequence

    def _take_batch(self, batch: EventBatch) -> None:
        rank, worker = self._rank, self._worker
        if rank is None or batch.publisher != (worker.instance_id, rank.epoch, worker.dp_rank):
            raise InvalidRecord(_ANSWER, "a batch of another rank than the one before it")
        if self._is_dump:
            self._ledger.index.apply(worker, read_kv_events(batch.events))
        elif self._ledger._continue(self._known, worker, rank, batch) is Outcome.MISSING:
            raise InvalidRecord(_ANSWER, f"rank {worker.dp_rank} answers with a range that has holes")

    def _end_rank(self) -> None:
        rank = self._rank
        if rank is None:
            return
        if not self._is_dump and rank.next_sequence != self._next_sequence:
            raise InvalidRecord(
                _ANSWER, f"rank {self._worker.dp_rank} answers with a range that is not whole"
            )
        rank.next_sequence = self._next_sequence
        self._rank = None


def _number(head: dict[Any, Any], name: str) -> int:
    """A field of an answer that numbers something. Raises InvalidRecord."""
    found = head.get(name)
    if type(found) is not int or not 0 <= found < _U63_END:
        raise InvalidRecord(_ANSWER, f"its {name} is {found!r}, not a number of 63 bits")
    return found
