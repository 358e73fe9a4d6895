"""The stored form of a model card."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dynamo_redis.errors import InvalidRecord, SchemaMismatch
from dynamo_redis.models.card import FileReference, ModelCard, RuntimeConfig

CARD = ModelCard(
    display_name="Qwen/Qwen3-0.6B",
    slug="qwen_qwen3-0_6b",
    context_length=40960,
    kv_cache_block_size=16,
    runtime_config=RuntimeConfig(total_kv_blocks=100),
    files={"config.json": FileReference(url="redis-object://models/a/config.json", sha256="0", size_bytes=1)},
)


def test_card_is_read_as_it_was_written() -> None:
    assert ModelCard.from_bytes(CARD.to_bytes()) == CARD


def test_fields_of_a_later_release_are_kept() -> None:
    stored = json.loads(CARD.to_bytes()) | {"future": {"a": 1}}
    card = ModelCard.from_bytes(json.dumps(stored).encode())
    assert json.loads(card.to_bytes())["future"] == {"a": 1}


def test_unknown_version_is_refused_with_a_remedy() -> None:
    stored = json.loads(CARD.to_bytes()) | {"version": 2}
    with pytest.raises(SchemaMismatch, match="version 2, this release reads 1: upgrade"):
        ModelCard.from_bytes(json.dumps(stored).encode())


@pytest.mark.parametrize("stored", [b"", b"null", b"[]", b"{}", b"\xff", b'{"version": 1}'])
def test_invalid_card_is_refused(stored: bytes) -> None:
    with pytest.raises(InvalidRecord, match="not a model card"):
        ModelCard.from_bytes(stored)


def test_parsers_and_modalities_tell_versions_apart() -> None:
    def fingerprint(**options: Any) -> str:
        config = CARD.runtime_config.model_copy(update=options)
        return CARD.model_copy(update={"runtime_config": config}).fingerprint

    assert fingerprint() == CARD.fingerprint
    found = {
        fingerprint(),
        fingerprint(tool_call_parser="x"),
        fingerprint(reasoning_parser="x"),
        fingerprint(tool_call_parser="y"),
        fingerprint(modalities=["image"]),
        fingerprint(modalities=["image", "audio"]),
    }
    assert len(found) == 6
    assert fingerprint(modalities=["audio", "image"]) in found


def test_matryoshka_tells_versions_of_a_model_apart() -> None:
    cards = [
        CARD.model_copy(update={"runtime_config": RuntimeConfig(total_kv_blocks=100, matryoshka=value)})
        for value in (None, True, False)
    ]
    assert cards[0].fingerprint == CARD.fingerprint
    assert len({card.fingerprint for card in cards}) == 3
