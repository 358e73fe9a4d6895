"""Each event counts once, however batches are repeated and lost, and a worker's answer repairs every loss."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from dynamo_redis.events.kv_dump import KvDump
from dynamo_redis.events.kv_publisher import KvPublisher
from dynamo_redis.router.base import Worker
from dynamo_redis.router.index import ledger as ledger_module
from dynamo_redis.router.index.ledger import DumpReader, Ledger, Outcome, Standing
from dynamo_redis.router.index.prefix_index import KvIndex
from dynamo_redis.wire.event import EventBatch, PublisherId
from dynamo_redis.wire.kv_event import DEVICE, KvEvent, cleared, removed, stored
from dynamo_redis.wire.topics import KV_EVENTS

WORKER = Worker(7, 0)


def batch(first: int, *events: KvEvent, epoch: int = 1, rank: int = 0) -> EventBatch:
    wire = [event.to_wire() for event in events]
    return EventBatch(KV_EVENTS, PublisherId(7, epoch, rank), first, 0, wire)


def blocks(ledger: Ledger, worker: Worker = WORKER) -> set[int]:
    if worker not in ledger.index.workers():
        return set()
    return ledger.index.blocks_of(worker)[DEVICE]


def head(kind: str, next_sequence: int, *, epoch: int = 1, rank: int = 0) -> dict[str, Any]:
    return {"epoch": epoch, "dp_rank": rank, "kind": kind, "next_sequence": next_sequence}


def answered(ledger: Ledger, *items: dict[str, Any]) -> bool:
    """Ask, and apply an answer of these items; return whether to ask again."""
    reader = ledger.begin_ask(7)
    for item in items:
        reader.apply(item)
    return reader.finish()


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(KvIndex())


@pytest.fixture
def exact(ledger: Ledger) -> Ledger:
    """Two events of rank 0 are known."""
    ledger.apply(batch(0, stored([1]), stored([2])))
    assert not answered(ledger, head("range", 2))
    return ledger


# --------------------------------------------------------------------------- exactly once


def test_batches_are_applied_in_their_order(exact: Ledger) -> None:
    assert exact.apply(batch(2, stored([3]), removed([1]))) is Outcome.APPLIED
    assert blocks(exact) == {2, 3}
    assert exact.exact() == {PublisherId(7, 1, 0): 4}


def test_a_repetition_changes_nothing(exact: Ledger) -> None:
    exact.apply(batch(2, removed([1])))
    assert exact.apply(batch(0, stored([1]), stored([2]))) is Outcome.REPEATED
    assert blocks(exact) == {2}


def test_of_a_batch_that_is_half_repeated_the_rest_is_applied(exact: Ledger) -> None:
    exact.apply(batch(2, removed([1])))
    assert exact.apply(batch(1, stored([2]), removed([1]), stored([3]))) is Outcome.APPLIED
    assert blocks(exact) == {2, 3}


def test_batch_without_events_has_the_next_sequence(exact: Ledger) -> None:
    assert exact.apply(batch(2)) is Outcome.REPEATED
    assert exact.apply(batch(1)) is Outcome.REPEATED
    assert exact.apply(batch(3)) is Outcome.MISSING


def test_a_gap_makes_the_instance_lost_until_it_has_answered(exact: Ledger) -> None:
    assert exact.apply(batch(3, stored([4]))) is Outcome.MISSING
    assert exact.standing(7) is Standing.LOST
    assert exact.apply(batch(2, stored([3]))) is Outcome.IGNORED
    assert not exact.exact()
    assert not answered(exact, head("range", 4), {"batch": batch(2, stored([3]), stored([4])).to_bytes()})
    assert blocks(exact) == {1, 2, 3, 4}
    assert exact.standing(7) is Standing.EXACT


def test_unknown_publisher_above_sequence_0_is_a_gap(ledger: Ledger) -> None:
    assert ledger.apply(batch(1, stored([1]))) is Outcome.MISSING
    assert blocks(ledger) == set()


def test_of_a_batch_with_something_else_in_it_nothing_is_applied(exact: Ledger) -> None:
    strange = batch(2, stored([3]))
    strange.events.append(["no event"])
    assert exact.apply(strange) is Outcome.MISSING
    assert blocks(exact) == {1, 2}


# --------------------------------------------------------------------------- epochs


def test_a_new_epoch_empties_the_worker_and_asks_it(exact: Ledger) -> None:
    assert exact.apply(batch(0, stored([9]), epoch=2)) is Outcome.MISSING
    assert blocks(exact) == set()
    assert not answered(
        exact, head("range", 1, epoch=2), {"batch": batch(0, stored([9]), epoch=2).to_bytes()}
    )
    assert blocks(exact) == {9}


def test_an_epoch_that_has_passed_does_not_come_back(exact: Ledger) -> None:
    exact.apply(batch(0, epoch=2))
    answered(exact, head("dump", 0, epoch=2))
    assert exact.apply(batch(2, stored([3]), epoch=1)) is Outcome.REPEATED
    assert blocks(exact) == set()
    exact.lose(7)
    answered(exact, head("dump", 0, epoch=2))
    assert exact.apply(batch(2, stored([3]), epoch=1)) is Outcome.REPEATED


def test_answer_of_an_old_epoch_makes_it_count_again(exact: Ledger) -> None:
    """A late batch of an epoch that was not known any more looks like a new start."""
    again = Ledger(KvIndex())
    answered(again, head("dump", 0, epoch=2))
    assert again.apply(batch(0, stored([1]), epoch=1)) is Outcome.MISSING
    assert not answered(again, head("dump", 1, epoch=2), {"batch": batch(1, stored([5]), epoch=2).to_bytes()})
    assert again.apply(batch(2, stored([3]), epoch=1)) is Outcome.REPEATED
    assert again.apply(batch(1, stored([6]), epoch=2)) is Outcome.APPLIED
    assert blocks(again) == {5, 6}


def test_a_late_batch_of_a_rank_that_is_no_more_changes_nothing(exact: Ledger) -> None:
    exact.apply(batch(0, stored([5]), rank=1))
    answered(exact, head("range", 2))
    assert exact.apply(batch(0, stored([5]), stored([6]), rank=1)) is Outcome.REPEATED
    assert blocks(exact, Worker(7, 1)) == set()


# --------------------------------------------------------------------------- answers


def test_batches_during_an_ask_are_held_and_applied_once(exact: Ledger) -> None:
    reader = exact.begin_ask(7)
    assert reader.have == [[1, 0, 2]]
    assert exact.apply(batch(2, stored([3]))) is Outcome.HELD
    assert exact.apply(batch(3, removed([3]))) is Outcome.HELD
    reader.apply(head("dump", 3))
    reader.apply({"batch": batch(3, stored([1, 2, 3])).to_bytes()})
    assert not reader.finish()
    assert blocks(exact) == {1, 2}


def test_gap_in_held_batches_asks_again(exact: Ledger) -> None:
    reader = exact.begin_ask(7)
    exact.apply(batch(5, stored([5])))
    reader.apply(head("range", 2))
    assert reader.finish()
    assert exact.standing(7) is Standing.LOST


def test_more_than_can_be_held_asks_again(exact: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "HELD_EVENTS_COUNT", 10)
    reader = exact.begin_ask(7)
    for first in range(2, 40):
        exact.apply(batch(first, stored([first])))
    reader.apply(head("range", 2))
    assert reader.finish()


def test_an_ask_that_fails_drops_the_blocks(exact: Ledger) -> None:
    reader = exact.begin_ask(7)
    assert blocks(exact) == {1, 2}, "one ask long they stay"
    reader.fail()
    assert blocks(exact) == set()
    assert exact.standing(7) is Standing.LOST
    assert exact.begin_ask(7).have == []


def test_a_rank_that_the_worker_has_no_more_is_dropped(exact: Ledger) -> None:
    exact.apply(batch(0, stored([5]), rank=1))
    assert not answered(exact, head("range", 2))
    assert blocks(exact, Worker(7, 1)) == set()
    assert blocks(exact) == {1, 2}


def test_answer_of_a_forgotten_instance_changes_nothing(exact: Ledger) -> None:
    reader = exact.begin_ask(7)
    exact.forget(7)
    reader.fail()
    assert exact.standing(7) is None


@pytest.mark.parametrize(
    "items",
    [
        ["no map"],
        [{"epoch": 1}],
        [{"batch": batch(0).to_bytes()}],
        [{"batch": b"none"}],
        [head("dump", 2), {"batch": 5}],
        [head("all", 2)],
        [head("range", 2, epoch=3)],
        [head("range", 2, rank=4)],
        [head("range", 5)],
        [head("range", 5), {"batch": batch(3, stored([3])).to_bytes()}],
        [head("range", 3), {"batch": batch(2, stored([3]), rank=1).to_bytes()}],
        [head("dump", 3), {"batch": batch(2, stored([3]), epoch=4).to_bytes()}],
        [head("dump", -1)],
        [head("dump", 1) | {"epoch": True}],
    ],
)
def test_malformed_answer_is_refused(exact: Ledger, items: list[Any]) -> None:
    with pytest.raises(ValueError):
        answered(exact, *items)


# --------------------------------------------------------------------------- snapshots


def test_restored_ledger_drops_workers_not_known_exactly(exact: Ledger) -> None:
    exact.apply(EventBatch(KV_EVENTS, PublisherId(8, 1, 0), 0, 0, [stored([5]).to_wire()]))
    exact.apply(EventBatch(KV_EVENTS, PublisherId(8, 1, 0), 5, 0, [stored([6]).to_wire()]))
    again = Ledger(KvIndex())
    again.restore(exact.index, exact.exact())
    assert again.index.workers() == [WORKER]
    assert again.apply(batch(1, stored([2]), stored([3]))) is Outcome.APPLIED
    assert blocks(again) == {1, 2, 3}


# --------------------------------------------------------------------------- everything, at random


class _Process:
    """One start of a worker: what it published, and in which batches it was sent."""

    def __init__(self, epoch: int, rng: random.Random) -> None:
        self.id = PublisherId(7, epoch, 0)
        self.publisher = KvPublisher(None, block_size=1, ring_count=rng.choice([2, 8, 100]))
        self.dump = KvDump({self.id: self.publisher})
        self.sent = 0
        self.held: list[int] = []
        self._rng = rng
        self._next = 0

    def live(self) -> None:
        if self.held and self._rng.random() < 0.4:
            victim = self.held.pop(self._rng.randrange(len(self.held)))
            self.publisher.removed([victim])
        elif self._rng.random() < 0.05:
            self.publisher.cleared()
            self.held.clear()
        else:
            self._next += 1
            self.held.append(self._next)
            self.publisher.stored([self._next], [self._next], None)

    def send(self) -> EventBatch | None:
        """Return the events that have not been sent yet, as a batch; forgotten events leave a gap."""
        first, self.sent = self.sent, self.publisher.next_sequence
        events = self.publisher.events_from(first)
        return None if not events else EventBatch(KV_EVENTS, self.id, first, 0, [e.to_wire() for e in events])


def _items(process: _Process, reader: DumpReader) -> Iterator[Any]:
    generator = process.dump.generate({"have": reader.have})
    while True:
        step = generator.__anext__()
        try:
            while True:
                step.send(None)
        except StopIteration as item:
            yield item.value
        except StopAsyncIteration:
            return


@pytest.mark.parametrize("seed", range(100))
def test_an_answer_at_the_end_makes_index_and_cache_equal(seed: int) -> None:
    rng = random.Random(seed)
    ledger, process = Ledger(KvIndex()), _Process(1, rng)
    under_way: list[EventBatch] = []  # in the stream, in order; may be repeated
    for step in range(200):
        process.live()
        chance = rng.random()
        if chance < 0.4 and (sent := process.send()) is not None and rng.random() < 0.9:
            under_way += [sent] * rng.choice([1, 1, 1, 2])
        if chance > 0.97:
            process = _Process(step + 2, rng)
        if rng.random() < 0.5 and under_way:
            ledger.apply(under_way.pop(0))
        if ledger.standing(7) is Standing.LOST and rng.random() < 0.3:
            _ask(ledger, process, under_way, rng)
    while under_way:
        ledger.apply(under_way.pop(0))
    if (last := process.send()) is not None:
        ledger.apply(last)
    while _ask(ledger, process, under_way, rng):
        pass
    expected = {block for tier in (DEVICE,) for block in process.publisher.blocks(tier)}
    assert blocks(ledger) == expected
    assert ledger.standing(7) is Standing.EXACT


def _ask(ledger: Ledger, process: _Process, under_way: list[EventBatch], rng: random.Random) -> bool:
    """Ask the worker, while its cache changes and batches come; return whether to ask again."""
    reader = ledger.begin_ask(7)
    for item in _items(process, reader):
        reader.apply(item)
        if under_way and rng.random() < 0.5:
            process.live()
            ledger.apply(under_way.pop(0))
    if rng.random() < 0.1:
        reader.fail()
        return True
    return reader.finish()


def test_a_clear_empties_the_worker(exact: Ledger) -> None:
    exact.apply(batch(2, cleared()))
    assert blocks(exact) == set()
