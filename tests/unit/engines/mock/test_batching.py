"""Continuous batching, step by step, without a clock."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Any, Protocol

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_redis.config import MockEngineSettings
from dynamo_redis.engines.base import BlocksRemoved, KvEvent, KvEventSink
from dynamo_redis.engines.mock.batching import Batch, Sequence, StepPlan, step_duration_s
from dynamo_redis.engines.mock.kv_cache import BlockCache
from dynamo_redis.errors import Overloaded
from dynamo_redis.events.block_hashes import chain, local_hashes

BLOCK = 4


class Oracle(Protocol):
    """The `oracle` fixture."""

    stored: set[int]

    def __call__(self, event: KvEvent) -> None: ...


def _sequence(tokens: SequenceOf[int]) -> Sequence:
    return Sequence(
        tokens=array("I", tokens), prompt_count=len(tokens), hashes=chain(local_hashes(tokens, BLOCK))
    )


def _batch(total_blocks: int = 64, events: KvEventSink | None = None, **limits: int) -> Batch[Sequence]:
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "max_num_waiting": 8} | limits
    return Batch(BlockCache(total_blocks, BLOCK, events), **sizes)


def _step(batch: Batch[Sequence]) -> tuple[StepPlan[Sequence], list[Sequence]]:
    step = batch.plan()
    assert step is not None
    return step, batch.complete(step)


def test_empty_batch_plans_no_step() -> None:
    assert _batch().plan() is None


def test_long_prompt_is_chunked_while_others_decode() -> None:
    batch = _batch(max_num_batched_tokens=10)
    talker, reader = _sequence(range(5)), _sequence(range(100, 120))
    batch.submit(talker)
    _, due = _step(batch)
    assert due == [talker]
    talker.tokens.append(1)
    batch.submit(reader)

    chunks = []
    while reader.computed_count < reader.prompt_count:
        step, due = _step(batch)
        chunks.append((step.decode_count, step.prefill_token_count))
        assert talker in due
        talker.tokens.append(1)
    assert chunks == [(1, 9), (1, 9), (1, 2)]


def test_known_prefix_is_skipped_but_its_last_token() -> None:
    batch = _batch()
    first, again = _sequence(range(8)), _sequence(range(8))
    batch.submit(first)
    _step(batch)
    batch.remove(first)
    batch.submit(again)
    step, due = _step(batch)

    assert (first.cached_count, again.cached_count) == (0, 4)
    assert step.prefill_token_count == 4
    assert due == [again]


def test_max_num_seqs_run_and_the_rest_wait_in_order() -> None:
    batch = _batch(max_num_seqs=2, max_num_waiting=2)
    sequences = [_sequence([n] * 3) for n in range(4)]
    for sequence in sequences:
        batch.submit(sequence)
    with pytest.raises(Overloaded):
        batch.submit(_sequence([9]))

    _, due = _step(batch)
    assert due == sequences[:2]
    batch.remove(sequences[0])
    for sequence in due:
        sequence.tokens.append(1)
    _, due = _step(batch)
    assert due == [sequences[1], sequences[2]]


def test_newest_sequence_is_preempted_and_resumes() -> None:
    batch = _batch(total_blocks=4)
    old, new = _sequence(range(7)), _sequence(range(50, 57))
    for sequence in (old, new):
        batch.submit(sequence)
    _, due = _step(batch)
    for _ in range(2):  # both fill their second block, and there is no third
        old.tokens.append(1)
        new.tokens.append(1)
        _, due = _step(batch)
    assert due == [old]
    assert (batch.preemption_count, batch.running_count, batch.waiting_count) == (1, 1, 1)

    batch.remove(old)
    step, due = _step(batch)
    assert due == [new]
    assert new.cached_count == 0  # as found by the first admission
    assert step.prefill_token_count < len(new.tokens)  # its own blocks were still stored


def test_preempted_sequence_resumes_before_later_ones() -> None:
    batch = _batch(total_blocks=4)
    old, new, later = _sequence(range(7)), _sequence(range(50, 57)), _sequence([99])
    for sequence in (old, new):
        batch.submit(sequence)
    _step(batch)
    batch.submit(later)
    for _ in range(2):
        old.tokens.append(1)
        new.tokens.append(1)
        _step(batch)
    assert (new.state, later.state) == ("waiting", "waiting")
    assert batch.sequences() == [old, new, later]


def test_removed_sequence_frees_its_blocks_within_a_step() -> None:
    batch = _batch()
    sequence = _sequence(range(20))
    batch.submit(sequence)
    step = batch.plan()
    assert step is not None
    assert batch.cache.active_count == 5
    batch.remove(sequence)
    assert batch.cache.active_count == 0
    assert batch.complete(step) == []
    assert batch.plan() is None
    batch.remove(sequence)


def test_blocked_sequence_waits_for_a_release_of_blocks() -> None:
    batch = _batch(total_blocks=4)
    holder, large = _sequence(range(5)), _sequence(range(100, 112))
    batch.submit(holder)
    _step(batch)
    batch.submit(large)
    holder.tokens.append(1)
    _step(batch)
    before = batch.cache.release_count
    holder.tokens.append(1)
    _step(batch)
    assert batch.cache.release_count == before
    batch.remove(holder)
    _, due = _step(batch)
    assert due == [large]


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_history_keeps_the_cache_consistent(
    make_oracle: Callable[[], Oracle], data: st.DataObject
) -> None:
    """Submit, step, cancel and clear in any order: counts and events are right, and all sequences end."""
    oracle = make_oracle()
    total = data.draw(st.integers(4, 12), label="blocks")
    batch = _batch(total, oracle, max_num_seqs=4, max_num_batched_tokens=data.draw(st.integers(4, 24)))
    goals: dict[Sequence, int] = {}
    prompts = st.lists(st.integers(0, 1), min_size=1, max_size=total * BLOCK // 2)
    for _ in range(data.draw(st.integers(1, 40))):
        match data.draw(st.sampled_from(("submit", "step", "step", "step", "cancel", "clear"))):
            case "submit" if len(goals) < 10:
                sequence = _sequence(data.draw(prompts))
                goals[sequence] = data.draw(st.integers(1, total * BLOCK - sequence.prompt_count))
                batch.submit(sequence)
            case "step":
                _advance(batch, goals)
            case "cancel" if goals:
                sequence = data.draw(st.sampled_from(list(goals)))
                del goals[sequence]
                batch.remove(sequence)
            case "clear":
                batch.cache.clear()
        _check_books(batch, oracle)
    for _ in range(20_000):
        if not goals:
            break
        _advance(batch, goals)
        _check_books(batch, oracle)
    assert not goals, "a sequence never ended"
    assert batch.cache.active_count == 0


def _advance(batch: Batch[Sequence], goals: dict[Sequence, int]) -> None:
    step = batch.plan()
    assert (step is None) == (not goals)
    for sequence in batch.complete(step) if step else ():
        sequence.tokens.append(1)
        if sequence.generated_count >= goals[sequence]:
            del goals[sequence]
            batch.remove(sequence)


def _check_books(batch: Batch[Sequence], oracle: Oracle) -> None:
    cache = batch.cache
    tables = [sequence.blocks for sequence in batch.sequences()]
    held = {block for table in tables for block in table.stored}
    assert cache.active_count == len(held) + sum(table.private_count for table in tables)
    assert cache.active_count + cache.idle_count <= cache.total_blocks
    assert cache.stored() == oracle.stored
    assert all(
        sequence.blocks.block_count == 0 for sequence in batch.sequences() if sequence.state == "waiting"
    )


def test_step_duration_follows_its_work() -> None:
    step: StepPlan[Any] = StepPlan([], prefill_token_count=1000, decode_count=100)
    assert step_duration_s(step, MockEngineSettings()) == pytest.approx(0.008 + 0.003 + 0.05)
    assert step_duration_s(step, MockEngineSettings(speedup_ratio=10)) == pytest.approx(0.0061)
    assert step_duration_s(step, MockEngineSettings(speedup_ratio=0)) == 0


def test_step_reports_its_evictions_as_one_event() -> None:
    told: list[KvEvent] = []
    batch = _batch(total_blocks=6, events=told.append)
    old = _sequence(range(100, 124))
    batch.submit(old)
    _step(batch)
    batch.remove(old)
    told.clear()
    for first in (0, 50):
        batch.submit(_sequence(range(first, first + 8)))
    _step(batch)
    removed = [event for event in told if isinstance(event, BlocksRemoved)]
    assert [len(event.block_hashes) for event in removed] == [4]
    assert told[0] is removed[0], "before what is stored in their room"
