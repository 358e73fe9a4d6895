"""Reading of servers' descriptions of themselves and of their models."""

from __future__ import annotations

import json

import pytest

from dynamo_redis.engines.openai.models import ListedModel, ServerDetails, read_details, read_models


def models(*entries: object) -> list[ListedModel]:
    return read_models(json.dumps({"data": entries}).encode())


def test_entries_have_kind_and_context_length() -> None:
    assert models({"id": "m", "owned_by": "vllm", "max_model_len": 2048}) == [ListedModel("m", "vllm", 2048)]
    assert models({"id": "m", "owned_by": "me"}) == [ListedModel("m", "openai")]
    assert models({"id": "m", "owned_by": "llamacpp", "meta": {"n_ctx": 512, "n_ctx_train": 4096}}) == [
        ListedModel("m", "llamacpp", 512)
    ]


@pytest.mark.parametrize("length", [0, -1, True, "2048", 1 << 60, None, [1]])
def test_invalid_lengths_are_ignored(length: object) -> None:
    assert models({"id": "m", "max_model_len": length}) == [ListedModel("m", "openai")]


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"data": 3}', b'{"data": [3, {}, {"id": 5}]}', b"\xff"]
)
def test_answers_without_models_are_empty(content: bytes) -> None:
    assert read_models(content) == []


def test_details_of_each_server_are_read() -> None:
    assert read_details(b'{"page_size": 64, "context_length": null}') == ServerDetails(None, 64)
    assert read_details(b'{"default_generation_settings": {"n_ctx": 512}}') == ServerDetails(512, None)
    assert read_details(b"nonsense") == ServerDetails()
