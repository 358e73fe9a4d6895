"""The prefix index, against a plain model: a set for each worker and tier, walked block by block."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dynamo_redis.router.base import Matched, Worker
from dynamo_redis.router.index import prefix_index as index_module
from dynamo_redis.router.index.prefix_index import KvIndex
from dynamo_redis.router.index.snapshot import IndexSnapshot, decode_snapshot, encode_snapshot
from dynamo_redis.store.event_base import BEGINNING
from dynamo_redis.wire.kv_event import DEVICE, DISK, HOST, TIERS, cleared, removed, stored

Blocks = dict[int, set[int]]

LENGTH = 12
TRUNK = list(range(5))
PROMPTS = [
    TRUNK + list(range(100, 107)),
    TRUNK[:3] + list(range(200, 209)),
    list(range(300, 312)),
]
"""Prompts of twelve blocks, two of which begin alike."""

WORKERS = [Worker(1), Worker(2), Worker(2, 1), Worker(1 << 63), Worker(5)]


def walked(truth: dict[Worker, Blocks], prompt: Sequence[int]) -> dict[Worker, Matched]:
    """Return the match of each worker: on its device, then on its host, then on its disk."""
    found = {}
    for worker, held in truth.items():
        counts, position = [], 0
        for tier in (DEVICE, HOST, DISK):
            began = position
            while position < len(prompt) and prompt[position] in held[tier]:
                position += 1
            counts.append(position - began)
        if position:
            found[worker] = Matched(*counts)
    return found


def nothing() -> Blocks:
    return {tier: set() for tier in TIERS}


class Index(RuleBasedStateMachine):
    """Workers that say what engines say, and an index that hears it."""

    def __init__(self) -> None:
        super().__init__()
        self.index = KvIndex()
        self.truth: dict[Worker, Blocks] = {}

    workers = st.sampled_from(WORKERS)
    prompts = st.sampled_from(PROMPTS)
    lengths = st.integers(0, LENGTH)

    @rule(worker=workers, prompt=prompts, length=lengths, twice=st.booleans())
    def reads(self, worker: Worker, prompt: list[int], length: int, twice: bool) -> None:
        """A prompt is read as far as that; engines name what they hold already, too."""
        events = [stored(prompt[:length])] * (1 + twice)
        self.index.apply(worker, events)
        self.truth.setdefault(worker, nothing())[DEVICE].update(prompt[:length])

    @rule(worker=workers, prompt=prompts, length=lengths)
    def gives_up_an_end(self, worker: Worker, prompt: list[int], length: int) -> None:
        """Blocks go, and all that follow them, in whichever prompt."""
        held = self.truth.setdefault(worker, nothing())[DEVICE]
        gone = prompt[length:]
        for other in PROMPTS:
            where = [position for position, block in enumerate(other) if block in gone]
            gone = gone + other[where[0] :] if where else gone
        self.index.apply(worker, [removed(reversed(gone))])
        held.difference_update(gone)

    @rule(worker=workers, prompt=prompts, position=st.integers(0, LENGTH - 1))
    def gives_up_one_inside(self, worker: Worker, prompt: list[int], position: int) -> None:
        self.index.apply(worker, [removed([prompt[position]], inside=True)])
        self.truth.setdefault(worker, nothing())[DEVICE].discard(prompt[position])

    @rule(
        worker=workers,
        tier=st.sampled_from([HOST, DISK]),
        blocks=st.lists(st.sampled_from([block for prompt in PROMPTS for block in prompt]), max_size=9),
        keep=st.booleans(),
    )
    def moves_below(self, worker: Worker, tier: int, blocks: list[int], keep: bool) -> None:
        """Other tiers hold whatever they like."""
        held = self.truth.setdefault(worker, nothing())[tier]
        self.index.apply(worker, [stored(blocks, tier) if keep else removed(blocks, tier)])
        held.update(blocks) if keep else held.difference_update(blocks)

    @rule(worker=workers)
    def clears(self, worker: Worker) -> None:
        self.index.apply(worker, [cleared()])
        self.truth[worker] = nothing()

    @rule(worker=workers)
    def goes(self, worker: Worker) -> None:
        self.index.remove(worker)
        self.truth.pop(worker, None)

    @rule(count=st.integers(1, 20))
    def is_swept(self, count: int) -> None:
        self.index.sweep(count)

    @rule(tier=st.sampled_from(TIERS))
    def is_restored(self, tier: int) -> None:
        content = b"".join(encode_snapshot(IndexSnapshot((BEGINNING,), {}, self.index)))
        restored = decode_snapshot(content).index
        for worker in WORKERS:
            assert restored.blocks_of(worker) == self.index.blocks_of(worker)
        self.index = restored

    @invariant()
    def finds_what_is_there(self) -> None:
        for prompt in PROMPTS:
            for part in (prompt, prompt[:4], prompt[:1], []):
                assert self.index.find(part) == walked(self.truth, part)

    @invariant()
    def counts_what_is_there(self) -> None:
        assert set(self.index.workers()) == self.truth.keys()
        assert self.index.block_counts() == {
            worker: sum(map(len, held.values())) for worker, held in self.truth.items()
        }

    def teardown(self) -> None:
        """When all are gone, so is their memory."""
        for worker in WORKERS:
            assert self.index.blocks_of(worker) == self.truth.get(worker, nothing())
            self.index.remove(worker)
        while self.index.sweep(3):
            pass
        assert self.index.block_count == 0
        assert self.index.find(PROMPTS[0]) == {}


class BoundedIndex(RuleBasedStateMachine):
    """An index too small for what it hears: it finds less than there is, never more, and keeps its bound."""

    @initialize(bound=st.integers(1, 25), ratio=st.sampled_from([0.0, 0.5, 0.8, 1.0]))
    def begins(self, bound: int, ratio: float) -> None:
        self.bound = bound
        self.index = KvIndex(max_blocks=bound, prune_target_ratio=ratio)
        self.truth: dict[Worker, Blocks] = {worker: nothing() for worker in WORKERS}

    workers, prompts = Index.workers, Index.prompts

    @rule(worker=workers, prompt=prompts, length=Index.lengths)
    def reads(self, worker: Worker, prompt: list[int], length: int) -> None:
        self.index.apply(worker, [stored(prompt[:length])])
        self.truth[worker][DEVICE].update(prompt[:length])

    @rule(worker=workers, prompt=prompts, tier=st.sampled_from([HOST, DISK]), begin=Index.lengths)
    def moves_below(self, worker: Worker, prompt: list[int], tier: int, begin: int) -> None:
        self.index.apply(worker, [stored(prompt[begin:], tier)])
        self.truth[worker][tier].update(prompt[begin:])

    @rule(worker=workers, prompt=prompts, position=st.integers(0, LENGTH - 1))
    def gives_up_one_inside(self, worker: Worker, prompt: list[int], position: int) -> None:
        self.index.apply(worker, [removed([prompt[position]], inside=True)])
        self.truth[worker][DEVICE].discard(prompt[position])

    @rule(worker=workers)
    def goes(self, worker: Worker) -> None:
        self.index.remove(worker)
        self.truth[worker] = nothing()

    @rule(count=st.integers(1, 20))
    def is_swept(self, count: int) -> None:
        self.index.sweep(count)

    @invariant()
    def keeps_its_bound(self) -> None:
        assert self.index.block_count <= self.bound

    @invariant()
    def finds_no_more_than_there_is(self) -> None:
        for prompt in PROMPTS:
            there = walked(self.truth, prompt)
            for worker, matched in self.index.find(prompt).items():
                assert matched.device <= there[worker].device
                assert sum(matched) <= sum(there[worker])

    @invariant()
    def counts_what_it_remembers(self) -> None:
        for worker, count in self.index.block_counts().items():
            assert count == sum(map(len, self.index.blocks_of(worker).values()))


TestIndex = Index.TestCase
TestIndex.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestBoundedIndex = BoundedIndex.TestCase
TestBoundedIndex.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


def test_each_worker_s_end_is_found_however_many_there_are() -> None:
    """Ends at every position, of many and of one, in prompts of every length around the leaps."""
    index = KvIndex()
    prompt = list(range(1000, 1100))
    truth = {}
    for number in range(150):
        worker, end = Worker(number), (number * 7) % 101 if number < 101 else 40
        index.apply(worker, [stored(prompt[:end])])
        truth[worker] = nothing() | {DEVICE: set(prompt[:end])}
    for length in range(101):
        assert index.find(prompt[:length]) == walked(truth, prompt[:length])


def test_an_answer_is_the_caller_s_own() -> None:
    index = KvIndex()
    for number in range(40):
        index.apply(Worker(number), [stored([1, 2, 3])])
    index.find([1, 2, 3]).clear()
    assert len(index.find([1, 2, 3])) == 40


def test_hole_ends_a_match() -> None:
    """Galloping over a hole would find the end that lies behind it."""
    index = KvIndex()
    blocks = list(range(10, 74))
    index.apply(Worker(1), [stored(blocks), removed([blocks[3]], inside=True)])
    index.apply(Worker(2), [stored(blocks)])
    assert index.find(blocks) == {Worker(1): Matched(3), Worker(2): Matched(64)}
    index.apply(Worker(1), [stored([blocks[3]])])
    assert index.find(blocks)[Worker(1)] == Matched(64)


def test_a_hole_is_over_when_all_is_cleared() -> None:
    index = KvIndex()
    index.apply(Worker(1), [stored([1, 2, 3]), removed([2], inside=True), cleared(), stored([1, 2])])
    assert index.find([1, 2, 3]) == {Worker(1): Matched(2)}
    assert index.copy_state().holed == 0


def test_other_tiers_go_on_where_the_device_ends() -> None:
    index = KvIndex()
    index.apply(Worker(1), [stored([1, 2]), stored([2, 3, 4], HOST), stored([5, 7], DISK)])
    index.apply(Worker(2), [stored([1, 2], DISK), stored([3], DEVICE)])
    index.apply(Worker(3), [stored([2], HOST)])
    assert index.find([1, 2, 3, 4, 5, 6, 7]) == {Worker(1): Matched(2, 2, 1), Worker(2): Matched(0, 0, 2)}


def test_repetitions_and_unknown_removals_are_harmless() -> None:
    index = KvIndex()
    index.apply(Worker(1), [stored([1, 2])])
    index.apply(Worker(2), [stored([2, 2, 2]), stored([2, 3, 3]), removed([1, 9, 3, 3])])
    assert (index.repeated_count, index.unknown_count) == (4, 3)
    assert index.block_counts() == {Worker(1): 2, Worker(2): 1}
    assert index.find([1, 2]) == {Worker(1): Matched(2)}


def test_a_slot_has_no_new_worker_before_its_blocks_are_swept() -> None:
    """Else the new one would hold what the old one did."""
    index = KvIndex()
    index.apply(Worker(1), [stored([1, 2, 3])])
    index.remove(Worker(1))
    index.apply(Worker(2), [stored([7])])
    assert index.find([1, 2, 3]) == {}
    assert index.block_count == 4
    while index.sweep(1):
        pass
    assert index.block_count == 1
    index.apply(Worker(3), [stored([8])])
    assert index.find([1, 2, 3]) == {}
    assert len(index.copy_state().workers) == 2, "the slot is used again"


def test_cached_match_names_no_removed_worker() -> None:
    """Matches are cached by set, and a set may name another worker once a slot is used again."""
    index = KvIndex()
    for number in (1, 2, 3):
        index.apply(Worker(number), [stored([1, 2])])
    assert index.find([1, 2]).keys() == {Worker(1), Worker(2), Worker(3)}
    index.remove(Worker(2))
    while index.sweep(10):
        pass
    index.apply(Worker(4), [stored([1, 2])])
    assert index.find([1, 2]).keys() == {Worker(1), Worker(3), Worker(4)}


def test_workers_that_come_and_go_leave_no_slots_behind() -> None:
    """Without calls of `sweep`: sets of workers stay narrow."""
    index = KvIndex()
    for number in range(1000):
        index.apply(Worker(number), [stored([number, number + 1])])
        index.remove(Worker(number))
        index.apply(Worker(-1), [cleared(), stored([5])])
    assert len(index.copy_state().workers) < 200


def test_sweeping_goes_in_steps() -> None:
    index = KvIndex()
    index.apply(Worker(1), [stored(range(100))])
    index.remove(Worker(1))
    steps = 1
    while index.sweep(10):
        steps += 1
        assert index.block_count >= 100 - 10 * steps
    assert index.block_count == 0
    assert steps in (10, 11)
    assert index.sweep(10) is False


def test_of_a_full_index_shared_and_young_blocks_are_kept() -> None:
    """The system prompt of all is old, and worth more than the end of one chat."""
    index = KvIndex(max_blocks=10, prune_target_ratio=0.6)
    for number in (1, 2):
        index.apply(Worker(number), [stored([1, 2, 3])])
    index.apply(Worker(1), [stored([50, 51], HOST), stored([10, 11, 12, 13, 14])])
    assert index.forgotten_count == 0
    index.apply(Worker(2), [stored([20])])
    while index.sweep(1):
        pass
    assert index.forgotten_count == 5
    assert index.blocks_of(Worker(1)) == {DEVICE: {1, 2, 3, 13, 14}, HOST: set(), DISK: set()}
    assert index.blocks_of(Worker(2)) == {DEVICE: {1, 2, 3, 20}, HOST: set(), DISK: set()}


def test_shared_blocks_stay_without_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass over all blocks is then as long as it takes others to come."""
    monkeypatch.setattr(index_module, "_STEP_COUNT", 3)
    index = KvIndex(max_blocks=100, prune_target_ratio=0.5)
    for number in (1, 2):
        index.apply(Worker(number), [stored(range(10))])
    for block in range(1000, 3000):
        index.apply(Worker(1), [stored([block])])
    assert index.find(list(range(10))) == {Worker(1): Matched(10), Worker(2): Matched(10)}
    assert index.block_count <= 100


def test_if_all_are_shared_some_of_these_are_forgotten() -> None:
    index = KvIndex(max_blocks=10, prune_target_ratio=0.5)
    for number in (1, 2):
        index.apply(Worker(number), [stored(range(11))])
    assert index.block_count <= 10
    while index.sweep(1):
        pass
    assert index.block_count == 5
    assert index.find(list(range(11))) == {Worker(1): Matched(11), Worker(2): Matched(11)}, "ends imply"


def test_removed_workers_are_swept_before_blocks_are_forgotten() -> None:
    index = KvIndex(max_blocks=10)
    index.apply(Worker(1), [stored([1, 2, 3])])
    index.apply(Worker(2), [stored(range(100, 107))])
    index.remove(Worker(2))
    index.apply(Worker(3), [stored([4])])
    while index.sweep(1):
        pass
    assert (index.forgotten_count, index.block_count) == (0, 4)


def test_forgotten_beginning_is_implied_by_later_blocks() -> None:
    """A chat that goes on is found, though its first blocks are the oldest of all."""
    index = KvIndex(max_blocks=6, prune_target_ratio=0.5)
    chat = list(range(20, 30))
    for block in chat:
        index.apply(Worker(1), [stored([block])])
    assert index.find([chat[0]]) == {}
    assert index.find([*chat, 99]) == {Worker(1): Matched(10)}


@pytest.mark.parametrize("hashes", [[0], [(1 << 64) - 1], [0, (1 << 64) - 1]])
def test_any_64_bits_name_a_block(hashes: list[int]) -> None:
    index = KvIndex()
    index.apply(Worker(0), [stored(hashes)])
    assert index.find(hashes) == {Worker(0): Matched(len(hashes))}
