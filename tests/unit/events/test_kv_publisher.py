"""A worker's KV events: after every report of the engine, a reader of them knows the blocks it holds."""

from __future__ import annotations

import logging
import random
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_redis.events import kv_publisher
from dynamo_redis.events.block_hashes import chain, local_hashes, lora_seed
from dynamo_redis.events.engine_blocks import TierIndex
from dynamo_redis.events.kv_publisher import DUMP_BLOCK_COUNT, KvPublisher
from dynamo_redis.wire.kv_event import (
    CLEARED,
    DEVICE,
    HOST,
    REMOVED,
    REMOVED_INSIDE,
    STORED,
    TIERS,
    KvEvent,
    read_kv_events,
)

BLOCK = 2


class Listener:
    """Numbers events as an `EventPublisher` does, and believes them."""

    def __init__(self) -> None:
        self.next_sequence = 0
        self.events: list[KvEvent] = []

    def publish(self, event: Any, /) -> int:
        self.events += read_kv_events([event])
        self.next_sequence += 1
        return self.next_sequence - 1


@dataclass(eq=True)
class Belief:
    """The state that follows from events: the blocks held on each tier, and the holes before others."""

    held: list[set[int]] = field(default_factory=lambda: [set() for _ in TIERS])
    holes: list[set[int]] = field(default_factory=lambda: [set() for _ in TIERS])

    def apply(self, events: Iterable[KvEvent]) -> Belief:
        for event in events:
            held, holes = self.held[event.tier], self.holes[event.tier]
            if event.kind == STORED:
                assert held.isdisjoint(event.hashes), "told as stored a second time"
                held.update(event.hashes)
                holes.difference_update(event.hashes)
            elif event.kind == CLEARED:
                self.__init__()  # type: ignore[misc]
            else:
                if event.kind == REMOVED:
                    assert held.issuperset(event.hashes), "told as removed without having been there"
                else:
                    holes.update(event.hashes)
                held.difference_update(event.hashes)
        return self

    def copy(self) -> Belief:
        return Belief([set(held) for held in self.held], [set(holes) for holes in self.holes])


# --------------------------------------------------------------------------- one step at a time


def _names(tokens: Sequence[int], parent: int | None = None) -> list[int]:
    return chain(local_hashes(tokens, BLOCK), parent)


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def rank(listener: Listener) -> KvPublisher:
    return KvPublisher(listener, block_size=BLOCK)


def test_engine_hashes_become_sequence_hashes(rank: KvPublisher, listener: Listener) -> None:
    rank.stored([b"a", b"b"], [1, 2, 3, 4], None)
    rank.stored([-1], [5, 6], b"b")
    first, second, third = _names([1, 2, 3, 4, 5, 6])
    rank.removed([(1 << 64) - 1])  # the same 64 bits as -1
    assert listener.events == [
        KvEvent(STORED, DEVICE, array("Q", [first, second])),
        KvEvent(STORED, DEVICE, array("Q", [third])),
        KvEvent(REMOVED, DEVICE, array("Q", [third])),
    ]
    assert list(rank.blocks()) == [first, second]


def test_an_adapters_blocks_have_names_of_their_own(rank: KvPublisher, listener: Listener) -> None:
    seed = lora_seed("french")
    rank.stored([1, 2], [1, 2, 3, 4], None, lora_name="french")
    rank.stored([3], [5, 6], 2, lora_name="french")
    expected = chain(local_hashes([1, 2, 3, 4, 5, 6], BLOCK, seed=seed), seed=seed)
    assert list(rank.blocks()) == expected
    assert not set(expected) & set(_names([1, 2, 3, 4, 5, 6]))


def test_content_under_two_hashes_is_published_once(rank: KvPublisher, listener: Listener) -> None:
    rank.stored([b"a"], [1, 2], None)
    rank.stored([b"b"], [1, 2], None)
    assert len(listener.events) == 1
    rank.removed([b"a"])
    assert rank.block_count == 1
    rank.removed([b"b"])
    assert [event.kind for event in listener.events] == [STORED, REMOVED]
    assert rank.block_count == 0


def test_block_reported_again_is_no_further_copy(rank: KvPublisher, listener: Listener) -> None:
    """As by vLLM's full reports, which name each block that a request found."""
    for _ in range(3):
        rank.stored([1, 2], [1, 2, 3, 4], None)
    assert len(listener.events) == 1
    rank.removed([2, 1])
    assert rank.block_count == 0
    assert Belief().apply(listener.events).held[DEVICE] == set()


def test_copy_that_outlives_a_removal_is_held_after_all(rank: KvPublisher, listener: Listener) -> None:
    """Two requests computed a prompt at once, each reports its copy, and one copy goes."""
    for _ in range(2):
        rank.stored([1, 2, 3], [1, 2, 3, 4, 5, 6], None)
    rank.removed([2, 1])
    names = _names([1, 2, 3, 4, 5, 6, 7, 8])
    assert set(rank.blocks()) == {names[2]}
    rank.stored([4], [7, 8], 3)  # behind the copy
    assert set(rank.blocks()) == set(names)
    assert Belief().apply(listener.events) == Belief().apply(rank.dump())
    rank.removed([4, 3])
    assert rank.block_count == 0


def test_block_that_was_stored_once_is_not_revived(rank: KvPublisher) -> None:
    rank.stored([1, 2], [1, 2, 3, 4], None)
    rank.removed([1])
    rank.stored([3], [5, 6], 2)
    assert set(rank.blocks()) == set(_names([1, 2, 3, 4, 5, 6])[1:])


def test_removal_before_held_blocks_is_announced(rank: KvPublisher, listener: Listener) -> None:
    first, second, third = _names([1, 2, 3, 4, 5, 6])
    rank.stored([1, 2, 3], [1, 2, 3, 4, 5, 6], None)
    rank.removed([2])
    rank.removed([3, 1])
    assert listener.events[1:] == [
        KvEvent(REMOVED_INSIDE, DEVICE, array("Q", [second])),
        KvEvent(REMOVED, DEVICE, array("Q", [third, first])),
    ]


def test_blocks_without_tokens_are_those_of_another_tier(rank: KvPublisher, listener: Listener) -> None:
    """vLLM's offloading connector reports them in this way."""
    first, second = _names([1, 2, 3, 4])
    rank.stored([1, 2], [1, 2, 3, 4], None)
    rank.stored([2, 7], [], None, tier=HOST)
    assert listener.events[1:] == [
        KvEvent(REMOVED_INSIDE, HOST, array("Q", [first])),  # the host has the second without the first
        KvEvent(STORED, HOST, array("Q", [second])),
    ]
    assert rank.left_out == {"unknown_block": 1}
    rank.removed([1, 2])
    assert (list(rank.blocks(DEVICE)), list(rank.blocks(HOST))) == ([], [second])
    rank.stored([8], [5, 6], 2)  # it follows what only the host has
    assert list(rank.blocks(DEVICE)) == _names([1, 2, 3, 4, 5, 6])[2:]


@pytest.mark.parametrize(
    ("hashes", "tokens", "parent", "reason"),
    [
        ([1], [1, 2], 99, "unknown_parent"),
        ([1, 2], [1, 2, 3], None, "block_size"),
        ([1], [1, 2, 3, 4], None, "block_size"),
        ([1], [1, -2], None, "bad_tokens"),
        ([1], [1, "x"], None, "bad_tokens"),
        ([1], [], None, "unknown_block"),
    ],
)
def test_unnamed_blocks_are_counted_and_logged_once(
    rank: KvPublisher,
    listener: Listener,
    caplog: pytest.LogCaptureFixture,
    hashes: list[int],
    tokens: list[int],
    parent: int | None,
    reason: str,
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            rank.stored(hashes, tokens, parent)
    assert rank.left_out == Counter({reason: 3 * len(hashes)})
    assert len(caplog.records) == 1
    assert listener.events == []


def test_a_hash_that_names_two_blocks_counts_for_the_first(rank: KvPublisher, listener: Listener) -> None:
    """An engine that names a block without what stands before it: no block may be believed for too long."""
    rank.stored([7], [1, 2], None)
    rank.stored([8, 7], [5, 6, 1, 2], None)
    assert rank.left_out == {"reused_hash": 1}
    rank.removed([7])
    assert list(rank.blocks()) == _names([5, 6])


def test_reset_withdraws_all_blocks(rank: KvPublisher, listener: Listener) -> None:
    rank.stored([1], [1, 2], None)
    rank.reset()
    assert (rank.block_count, listener.events[-1].kind) == (0, CLEARED)
    rank.removed([1])
    assert len(listener.events) == 2


def test_the_ring_is_bounded_by_events_and_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    few = KvPublisher(None, block_size=1, ring_count=3)
    for number in range(5):
        few.stored([number], [number], None)
    assert few.next_sequence == 5
    assert few.events_from(1) is None
    assert [list(event.hashes) for event in few.events_from(2) or ()] == [
        local_hashes([number], 1) for number in (2, 3, 4)
    ]
    assert few.events_from(5) == []
    assert few.events_from(6) is None
    assert few.events_from(-1) is None

    monkeypatch.setattr(kv_publisher, "RING_BLOCK_COUNT", 100)
    large = KvPublisher(None, block_size=1)
    for first in (0, 51):
        large.stored(range(first, first + 51), range(first, first + 51), None)
    assert large.events_from(0) is None
    assert len(large.events_from(1) or ()) == 1


def test_a_dump_is_of_the_moment_it_was_asked_for() -> None:
    rank = KvPublisher(None, block_size=1)
    count = 2 * DUMP_BLOCK_COUNT + 10
    rank.stored(range(count), range(count), None)
    held = set(rank.blocks())
    dump = rank.dump()
    first = next(dump)
    rank.cleared()
    rank.stored([count], [count], None)
    events = [first, *dump]
    assert max(len(event.hashes) for event in events) == DUMP_BLOCK_COUNT
    assert Belief().apply(events).held[DEVICE] == held


# --------------------------------------------------------------------------- a random life

Key = int | bytes


@dataclass
class ToyEngine:
    """An engine with few blocks, which does what real ones do, and what they should not. It reports blocks
    again as present; one that it did goes after those that follow it."""

    rank: KvPublisher
    held: list[set[Key]] = field(default_factory=lambda: [set() for _ in TIERS])
    again: list[set[Key]] = field(default_factory=lambda: [set() for _ in TIERS])
    content: dict[Key, tuple[int, ...]] = field(
        default_factory=dict
    )  # key → all tokens up to the block's end

    def keys(self, tier: int | None = None) -> list[Key]:
        tiers = TIERS if tier is None else (tier,)
        return sorted({key for t in tiers for key in self.held[t]}, key=str)

    def store(self, parent: Key | None, tokens: list[int], tier: int, *, digest: bool) -> None:
        start = () if parent is None else self.content[parent]
        keys: list[Key] = []
        for end in range(BLOCK, len(tokens) + 1, BLOCK):
            content = (*start, *tokens[:end])
            key: Key = str(content).encode() if digest else hash(content)
            self.content[key] = content
            keys.append(key)
        self.rank.stored(keys, tokens, parent, tier=tier)
        self._hold(keys, tier)

    def offload(self, keys: list[Key], tier: int) -> None:
        self.rank.stored(keys, [], None, tier=tier)
        self._hold(keys, tier)

    def _hold(self, keys: list[Key], tier: int) -> None:
        self.again[tier].update(self.held[tier].intersection(keys))
        self.held[tier].update(keys)

    def remove(self, keys: list[Key], tier: int) -> None:
        for key in self.again[tier].intersection(keys):
            content = self.content[key]
            keys = [k for k in self.held[tier] if self.content[k][: len(content)] == content] + keys
        self.rank.removed(keys, tier=tier)
        self.held[tier].difference_update(keys)
        self.again[tier].difference_update(keys)

    def clear(self) -> None:
        self.held = [set() for _ in TIERS]
        self.again = [set() for _ in TIERS]

    def truth(self) -> Belief:
        """By names that are computed from the tokens anew."""
        held = [{self._name(key) for key in keys} for keys in self.held]
        parents = [
            {_names(self.content[key])[-2] for key in keys if len(self.content[key]) > BLOCK}
            for keys in self.held
        ]
        return Belief(held, [parents[tier] - held[tier] for tier in TIERS])

    def _name(self, key: Key) -> int:
        return _names(self.content[key])[-1]


def _live_a_little(engine: ToyEngine, data: st.DataObject) -> None:
    action = data.draw(st.sampled_from(("store", "store", "store", "remove", "remove", "offload", "clear")))
    tier = data.draw(st.sampled_from((DEVICE, DEVICE, HOST)))
    keys = engine.keys()
    if action == "store":
        parent = data.draw(st.sampled_from([None, *keys]))
        tokens = data.draw(st.lists(st.integers(0, 1), min_size=BLOCK, max_size=3 * BLOCK))
        tokens = tokens[: len(tokens) // BLOCK * BLOCK]
        engine.store(parent, tokens, tier, digest=data.draw(st.booleans()))
    elif action == "remove" and engine.keys(tier):
        engine.remove(data.draw(st.lists(st.sampled_from(engine.keys(tier)), min_size=1, max_size=4)), tier)
    elif action == "offload" and keys:
        engine.offload(data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3, unique=True)), tier)
    elif action == "clear" and data.draw(st.integers(0, 4)) == 0:
        engine.clear()
        data.draw(st.sampled_from((engine.rank.cleared, engine.rank.reset)))()


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_reader_knows_the_cache_at_every_point(data: st.DataObject) -> None:
    listener = Listener()
    engine = ToyEngine(KvPublisher(listener, block_size=BLOCK, ring_count=6))
    belief = Belief()
    past = [belief.copy()]  # before each sequence
    for _ in range(data.draw(st.integers(1, 12))):
        seen_count = len(listener.events)
        _live_a_little(engine, data)
        truth = engine.truth()
        for event in listener.events[seen_count:]:
            past.append(belief.apply([event]).copy())
            if event.kind in (REMOVED, REMOVED_INSIDE):
                for name in event.hashes:
                    assert (name in truth.holes[event.tier]) == (event.kind == REMOVED_INSIDE)
        assert belief.held == truth.held
        assert all(told >= missing for told, missing in zip(belief.holes, truth.holes, strict=True))

        rank = engine.rank
        assert rank.next_sequence == len(listener.events) == len(past) - 1
        assert Belief().apply(rank.dump()) == truth
        for sequence, then in enumerate(past):
            events = rank.events_from(sequence)
            if rank.next_sequence - sequence > 6:
                assert events is None
            else:
                assert events is not None
                assert then.copy().apply(events) == belief


def test_copies_behind_a_shared_block_are_held_after_all(rank: KvPublisher) -> None:
    """Two copies go on behind one prompt; that one of them ends says nothing of what is before the other."""
    for _ in range(2):
        rank.stored([1, 2], [1, 2, 3, 4], None)
        rank.stored([4], [7, 8], 1)
    rank.stored([3], [5, 6], 2)
    rank.stored([5], [9, 9], 4)
    rank.removed([1, 2, 4])
    rank.removed([3])
    rank.stored([6], [1, 1], 5)
    assert set(rank.blocks()) == set(_names([1, 2, 7, 8, 9, 9, 1, 1]))


def test_uncertain_blocks_are_forgotten_with_their_followers() -> None:
    index, rng = TierIndex(), random.Random(5)
    for step in range(4000):
        start = rng.randrange(12)
        path = [start, *(100 * (start + 1) + n for n in range(rng.randrange(4)))]
        if rng.random() < 0.5:
            parents = [None, *path[:-1]]
            index.store(path, path, parents)
        else:
            index.remove(rng.sample(path, rng.randint(1, len(path))))
        before = Counter(parent for parent in index.uncertain.values() if parent is not None)
        assert index._before_uncertain == before
        for name in index.uncertain:
            assert name in index._followers or name in before, f"nothing follows {name} at step {step}"
