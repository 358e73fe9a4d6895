"""Reading a request's prompt, and the weights of its choice."""

from __future__ import annotations

from typing import Any

import pytest

from dynamo_redis.errors import InvalidRequest
from dynamo_redis.events.block_hashes import chain, local_hashes, lora_seed
from dynamo_redis.router.base import CostWeights
from dynamo_redis.router.prompts import block_hashes, prompt_size, token_ids_of, weights_of

DEFAULT = CostWeights(overlap_score_credit=0.5, temperature=0.1)


def test_blocks_are_named_as_the_workers_name_them() -> None:
    tokens = list(range(40))
    assert block_hashes(tokens, 16) == chain(local_hashes(tokens, 16))
    seed = lora_seed("mine")
    assert block_hashes(tokens, 16, "mine") == chain(local_hashes(tokens, 16, seed=seed), seed=seed)
    assert block_hashes(tokens[:15], 16) == []


def test_blocks_of_other_images_are_others() -> None:
    requests: list[dict[str, Any]] = [
        {},
        {"cache_salt": "a"},
        {"media_digest": "1"},
        {"media_digest": "2"},
        {"media_digest": "1", "cache_salt": "a"},
        {"media_digest": "a", "cache_salt": "1"},
        {"cache_salt": "1\0"},
        {"cache_salt": "1\0a"},
    ]
    prompt = {"token_ids": list(range(32))}
    names = {tuple(prompt_size(prompt | request, 16)[0]) for request in requests}
    assert len(names) == len(requests)
    for wrong in ({"media_digest": 5}, {"media_digest": "1", "cache_salt": 5}):
        with pytest.raises(InvalidRequest, match="must be a string"):
            prompt_size(prompt | wrong, 16)


def test_embeddings_count_as_load_without_blocks() -> None:
    assert prompt_size({"token_ids": [[1] * 20, [2] * 5]}, 4) == ([], 25)
    hashes, count = prompt_size({"token_ids": [1] * 20}, 4)
    assert (hashes, count) == (block_hashes([1] * 20, 4), 20)
    with pytest.raises(InvalidRequest, match="token_ids"):
        prompt_size({"token_ids": [[1], 2]}, 4)


@pytest.mark.parametrize(
    "request_", [None, [], {}, {"token_ids": "text"}, {"token_ids": 3}, {"token_ids": b"1"}]
)
def test_a_request_without_a_prompt_is_refused(request_: Any) -> None:
    with pytest.raises(InvalidRequest, match="token_ids"):
        token_ids_of(request_)


@pytest.mark.parametrize("tokens", [["a"], [-1], [1 << 32], [1.5], [None]])
def test_wrong_token_ids_are_refused(tokens: list[Any]) -> None:
    with pytest.raises(InvalidRequest, match="token_ids"):
        block_hashes(tokens * 16, 16)


@pytest.mark.parametrize(
    ("override", "weights"),
    [
        (None, DEFAULT),
        ({}, DEFAULT),
        ({"overlap_score_weight": 2}, CostWeights(overlap_score_credit=2.0, temperature=0.1)),
        ({"overlap_score_credit": 0}, CostWeights(overlap_score_credit=0.0, temperature=0.1)),
        ({"router_temperature": 0.7}, CostWeights(overlap_score_credit=0.5, temperature=0.7)),
        ({"prefill_load_scale": 4.0, "router_temperature": None}, CostWeights(0.5, 0.75, 0.25, 4.0, 0.1)),
    ],
)
def test_a_request_brings_weights_of_its_own(override: Any, weights: CostWeights) -> None:
    assert weights_of({"router_config_override": override}, DEFAULT) == weights


@pytest.mark.parametrize(
    "override",
    [[1], {"nonsense": 1}, {"overlap_score_weight": "1"}, {"router_temperature": -1}]
    + [{"prefill_load_scale": value} for value in (float("inf"), float("nan"))],
)
def test_weights_that_make_no_sense_are_refused(override: Any) -> None:
    with pytest.raises(InvalidRequest, match="router_config_override"):
        weights_of({"router_config_override": override}, DEFAULT)


def test_an_adapter_is_named_by_a_string() -> None:
    wrong: Any = 3
    with pytest.raises(InvalidRequest, match="lora_name"):
        block_hashes([1] * 16, 16, wrong)
