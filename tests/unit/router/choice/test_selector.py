"""The cost of a choice, term by term, and the worker chosen."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_redis.router.base import CostWeights, Matched, Worker, WorkerChoice
from dynamo_redis.router.choice.load_book import LoadBook
from dynamo_redis.router.choice.selector import NOTHING, Selector

W = [Worker(number // 2, number % 2) for number in range(6)]


def book_of(loads: Mapping[Worker, tuple[int, int]]) -> LoadBook:
    book = LoadBook()
    for number, (worker, (tokens, blocks)) in enumerate(loads.items()):
        book.add("router", str(number), worker, prefill_tokens=tokens, blocks=blocks, deadline=1.0)
    return book


def chosen(
    loads: Mapping[Worker, tuple[int, int]],
    matched: Mapping[Worker, Matched],
    *,
    active: Mapping[Worker, int] | None = None,
    seed: int = 0,
    weights: CostWeights | None = None,
    tokens: int = 160,
    candidates: list[Worker] = W[:3],
) -> WorkerChoice:
    return Selector(random.Random(seed)).select(
        candidates,
        matched,
        book_of(loads),
        token_count=tokens,
        block_size=16,
        weights=weights or CostWeights(),
        active=active or {},
        explain=True,
    )


weight = st.floats(0, 4)
worker_loads = st.dictionaries(st.sampled_from(W), st.tuples(st.integers(0, 9999), st.integers(0, 999)))
matches = st.dictionaries(
    st.sampled_from(W), st.builds(Matched, st.integers(0, 99), st.integers(0, 9), st.integers(0, 9))
)


actives = st.dictionaries(st.sampled_from(W), st.integers(1, 99))


@given(
    loads=worker_loads,
    matched=matches,
    active=actives,
    tokens=st.integers(0, 5000),
    block_size=st.integers(1, 512),
    weights=st.builds(CostWeights, weight, weight, weight, weight),
)
def test_the_cost_is_the_formula(
    loads: dict[Worker, tuple[int, int]],
    matched: dict[Worker, Matched],
    active: dict[Worker, int],
    tokens: int,
    block_size: int,
    weights: CostWeights,
) -> None:
    """Term by term as docs/router.md has it."""
    choice = Selector(random.Random(1)).select(
        W,
        matched,
        book_of(loads),
        token_count=tokens,
        block_size=block_size,
        weights=weights,
        active=active,
        explain=True,
    )
    costs = {}
    for worker in W:
        active_tokens, active_blocks = loads.get(worker, (0, 0))
        held = matched.get(worker, Matched(0))
        prefill_blocks = (active_tokens + tokens) / block_size
        credit = (
            weights.overlap_score_credit * held.device
            + weights.host_credit * held.host
            + weights.disk_credit * held.disk
        )
        decode_blocks = active_blocks + -(-tokens // block_size) - active.get(worker, 0)
        costs[worker] = weights.prefill_load_scale * max(prefill_blocks - credit, 0) + decode_blocks
    assert {each.worker: each.cost for each in choice.costs} == costs
    assert choice.cost == costs[choice.worker] == min(costs.values())
    assert choice.matched == matched.get(choice.worker, NOTHING)
    for each in choice.costs:
        assert each.matched == matched.get(each.worker, NOTHING)
        active_tokens, active_blocks = loads.get(each.worker, (0, 0))
        assert each.prefill_blocks == (active_tokens + tokens) / block_size
        assert each.decode_blocks == active_blocks + -(-tokens // block_size) - active.get(each.worker, 0)


def test_worked_example_of_the_documents() -> None:
    """The example at the top of docs/router.md."""
    loads = {W[0]: (320, 40), W[1]: (0, 45)}
    matched = {W[0]: Matched(8), W[1]: Matched(4, 2), W[2]: Matched(2)}
    active = {W[0]: 8, W[1]: 4}
    choice = chosen(loads, matched, active=active)
    assert [each.cost for each in choice.costs] == [64.0, 55.5, 18.0]
    assert choice.worker == W[2]
    idle = chosen({}, matched)
    assert [each.cost for each in idle.costs] == [12.0, 14.5, 18.0]
    assert idle.worker == W[0]
    of_two = chosen(loads, matched, active=active, candidates=W[:2])
    assert (of_two.worker, of_two.cost) == (W[1], 55.5)


@pytest.mark.parametrize("running", [1, 2, 5, 20, 90])
def test_a_warm_worker_stays_attractive(running: int) -> None:
    """Chats of a system prompt of 400 blocks, all on the worker that holds it, which counts it once."""
    warm, cold = W[:2]
    loads = {warm: (0, 400 + 4 * running)}
    choice = chosen(loads, {warm: Matched(400)}, active={warm: 400}, tokens=404 * 16, candidates=[warm, cold])
    assert [each.cost for each in choice.costs] == [408 + 4 * running, 808]
    assert choice.worker == warm


def test_match_decides_between_equal_loads() -> None:
    assert chosen({}, {W[1]: Matched(5)}).worker == W[1]
    assert chosen({}, {W[1]: Matched(5), W[2]: Matched(3, 3)}).worker == W[2]


def test_without_credit_load_alone_decides() -> None:
    weights = CostWeights(overlap_score_credit=0, host_credit=0, disk_credit=0)
    loads = {W[0]: (0, 2), W[1]: (0, 1), W[2]: (0, 2)}
    assert chosen(loads, {W[0]: Matched(10)}, weights=weights).worker == W[1]


def test_ties_are_drawn_evenly_and_repeatably() -> None:
    drawn = Counter(chosen({W[0]: (0, 1)}, {}, seed=seed).worker for seed in range(400))
    assert drawn.keys() == {W[1], W[2]}
    assert min(drawn.values()) > 120
    assert chosen({}, {}, seed=7).worker == chosen({}, {}, seed=7).worker


def test_temperature_draws_by_softmax_of_scaled_costs() -> None:
    """Costs 20, 30 and 40 at temperature 0.5: chances as 1 : e^-1 : e^-2."""
    loads = {W[1]: (0, 10), W[2]: (0, 20)}
    weights = CostWeights(temperature=0.5)
    selector, book = Selector(random.Random(5)), book_of(loads)
    drawn = Counter(
        selector.select(W[:3], {}, book, token_count=160, block_size=16, weights=weights).worker
        for _ in range(4000)
    )
    for worker, share in zip(W, (0.665, 0.245, 0.090), strict=False):
        assert drawn[worker] / 4000 == pytest.approx(share, abs=0.04)


def test_a_temperature_over_equal_costs_draws_evenly() -> None:
    weights = CostWeights(temperature=1.0)
    drawn = Counter(chosen({}, {}, seed=seed, weights=weights).worker for seed in range(300))
    assert min(drawn[worker] for worker in W[:3]) > 60


def test_choice_without_candidates_is_refused() -> None:
    with pytest.raises(ValueError, match="no worker"):
        chosen({}, {}, candidates=[])


def test_choice_has_costs_only_on_request() -> None:
    choice = Selector(random.Random(1)).select(
        W, {}, LoadBook(), token_count=1, block_size=16, weights=CostWeights()
    )
    assert choice.costs == ()
