"""Predictions of the workers' blocks: within TTL and bound, and never a block without those before it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_redis.router.base import Matched, Worker
from dynamo_redis.router.index.predicted_index import PredictedIndex

A, B = Worker(1), Worker(2)
PROMPTS = [[1, 2, 3, 4], [1, 2, 30, 40], [5, 6]]


def test_prediction_lasts_for_the_ttl() -> None:
    index = PredictedIndex(ttl_s=10.0)
    index.predict(A, [1, 2, 3], 0.0)
    assert index.find([1, 2, 9]) == {A: Matched(2)}
    assert index.expire(9.9) == 0
    assert index.expire(10.0) == 3
    assert index.find([1, 2, 9]) == {}
    assert index.workers() == []


def test_a_block_that_is_sent_again_stays() -> None:
    index = PredictedIndex(ttl_s=10.0)
    index.predict(A, [1, 2, 3], 0.0)
    index.predict(A, [1, 2, 7], 6.0)
    assert index.expire(12.0) == 1
    assert index.find([1, 2, 7, 8]) == {A: Matched(3)}
    assert index.find([1, 2, 3]) == {A: Matched(2)}


def test_past_the_bound_the_oldest_predictions_are_given_up() -> None:
    index = PredictedIndex(max_blocks=10, prune_target_ratio=0.6)
    for number in range(4):
        index.predict(A, [10 * number, 10 * number + 1, 10 * number + 2], number)
    assert index.block_count == 6
    assert index.find([10]) == {}
    assert index.find([20, 21, 22]) == {A: Matched(3)}


def test_prompt_above_the_bound_is_predicted_up_to_it() -> None:
    index = PredictedIndex(max_blocks=5)
    index.predict(A, list(range(9)), 0.0)
    assert index.find(list(range(9))) == {A: Matched(5)}


def test_a_worker_that_is_gone_should_hold_nothing() -> None:
    index = PredictedIndex()
    index.predict(A, [1, 2], 0.0)
    index.predict(B, [1], 0.0)
    assert index.block_counts() == {A: 2, B: 1}
    index.remove(A)
    assert index.block_counts() == {B: 1}
    assert index.find([1, 2]) == {B: Matched(1)}
    assert index.block_count == 1
    index.predict(A, [1], 1.0)
    index.expire(1000.0)
    assert index.block_count == 0


def test_a_prompt_that_is_sent_over_and_over_takes_no_more_room() -> None:
    index = PredictedIndex()
    for number in range(1000):
        index.predict(A, range(100), number / 1000)
    assert index.block_count == 100
    assert sum(len(prediction.hashes) for prediction in index._log) < 5000


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.floats(0, 5),
            st.sampled_from([A, B]),
            st.sampled_from(PROMPTS),
            st.integers(0, 4),
            st.sampled_from(["predict", "predict", "remove", "expire"]),
        ),
        max_size=30,
    )
)
def test_it_is_a_deadline_for_each_worker_and_block(
    steps: list[tuple[float, Worker, list[int], int, str]],
) -> None:
    index = PredictedIndex(ttl_s=8.0)
    until: dict[tuple[Worker, int], float] = {}
    now = 0.0
    for later, worker, prompt, length, what in steps:
        now += later
        if what == "predict":
            index.predict(worker, prompt[:length], now)
            until |= dict.fromkeys([(worker, block) for block in prompt[:length]], now + 8.0)
        elif what == "remove":
            index.remove(worker)
            until = {key: ends_at for key, ends_at in until.items() if key[0] != worker}
        index.expire(now)
        until = {key: ends_at for key, ends_at in until.items() if ends_at > now}
        assert index.block_count == len(until)
        for prompt_asked in PROMPTS:
            found = index.find(prompt_asked)
            for each in (A, B):
                count = 0
                while count < len(prompt_asked) and (each, prompt_asked[count]) in until:
                    count += 1
                assert found.get(each, Matched(0)).device == count
