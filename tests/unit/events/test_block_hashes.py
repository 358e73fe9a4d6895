"""Names of KV blocks, against the values of Dynamo 1.6.1."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pytest

from dynamo_redis.events.block_hashes import SEED, chain, local_hashes, lora_seed

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[2] / "vectors/block_hashes.json").read_text())


@pytest.mark.parametrize("vector", VECTORS["local"])
def test_local_hashes_are_those_of_dynamo(vector: dict[str, Any]) -> None:
    assert local_hashes(vector["tokens"], vector["block_size"]) == vector["hashes"]


@pytest.mark.parametrize("vector", VECTORS["sequence"])
def test_sequence_hashes_are_those_of_dynamo(vector: dict[str, Any]) -> None:
    assert chain(local_hashes(vector["tokens"], vector["block_size"]))[-1] == vector["hash"]


@pytest.mark.parametrize("vector", VECTORS["lora"])
def test_an_adapter_s_hashes_are_those_of_dynamo(vector: dict[str, Any]) -> None:
    seed = lora_seed(vector["lora_name"])
    assert local_hashes(vector["tokens"], vector["block_size"], seed=seed) == vector["hashes"]


def test_the_vectors_kept_here_are_all_there_are(shared: Path) -> None:
    content = json.loads((shared / "data/kv-events/hash_vectors.json").read_text())
    assert content["local_block_hashes"] == VECTORS["local"]
    assert content["sequence_hash_of_last_block"] == VECTORS["sequence"]


def test_a_partial_tail_has_no_name() -> None:
    assert local_hashes(range(15), 16) == []
    assert local_hashes(range(40), 16) == local_hashes(range(32), 16)


def test_a_chain_goes_on_from_its_parent() -> None:
    local = local_hashes(range(64), 16)
    whole = chain(local)
    assert chain(local[2:], whole[1]) == whole[2:]
    assert whole[0] == local[0]


def test_an_array_is_hashed_as_the_list_it_holds_and_not_changed() -> None:
    tokens = array("I", range(32))
    assert local_hashes(tokens, 16) == local_hashes(list(range(32)), 16)
    assert tokens == array("I", range(32))


def test_an_adapter_gives_the_same_tokens_other_names() -> None:
    seed = lora_seed("poet")
    assert seed != SEED
    assert local_hashes(range(16), 16, seed=seed) != local_hashes(range(16), 16)


@pytest.mark.parametrize("token", [-1, 1 << 32])
def test_a_token_that_is_no_u32_is_refused(token: int) -> None:
    with pytest.raises(OverflowError):
        local_hashes([token], 1)
