"""Log probabilities: asked for in vLLM's words, and read from its chunks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from dynamo_redis.engines.openai.dialects import Dialect
from dynamo_redis.engines.openai.request import completion_body
from dynamo_redis.engines.openai.wire import CompletionReader
from dynamo_redis.errors import InvalidRequest

REQUEST = {"token_ids": [1], "output_options": {"logprobs": 2}}


class NoTokens:
    """No text is encoded: the engine sends token ids."""

    def encode(self, text: str) -> list[int]:
        raise AssertionError

    def encode_bytes(self, text: str) -> list[int]:
        raise AssertionError

    def decode(self, token_ids: Sequence[int]) -> str:
        raise AssertionError


def test_vllm_is_asked_for_token_ids() -> None:
    body = completion_body(REQUEST, model="m", dialect="vllm", prompt=[1], dp_rank=None)
    assert body["logprobs"] == 2
    assert body["return_tokens_as_token_ids"] is True


@pytest.mark.parametrize("dialect", ["sglang", "llamacpp", "openai"])
def test_other_servers_refuse_logprobs(dialect: Dialect) -> None:
    with pytest.raises(InvalidRequest, match="logprobs"):
        completion_body(REQUEST, model="m", dialect=dialect, prompt=[1], dp_rank=None)


def chunk(ids: list[int], logprobs: Any, reason: str | None = None) -> bytes:
    choice = {"index": 0, "text": "x", "token_ids": ids, "logprobs": logprobs, "finish_reason": reason}
    return json.dumps({"choices": [choice]}).encode()


def test_items_have_logprobs_of_their_tokens() -> None:
    reader = CompletionReader(NoTokens(), frozenset({9}))
    first = {
        "tokens": ["token_id:5"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{"token_id:6": -1, "token_id:5": -0.5, "odd": -3}],
    }
    assert reader.feed(chunk([5], first)) == {
        "token_ids": [5],
        "log_probs": [-0.5],
        "top_logprobs": [
            [{"token_id": 5, "logprob": -0.5, "rank": 1}, {"token_id": 6, "logprob": -1, "rank": 2}]
        ],
    }
    last = {"token_logprobs": [-0.25, -0.125], "top_logprobs": [{}, {}]}
    assert reader.feed(chunk([7, 9], last, "stop")) is None
    assert reader.finish() == {
        "token_ids": [7],
        "log_probs": [-0.25],
        "top_logprobs": [[]],
        "finish_reason": "stop",
    }


@pytest.mark.parametrize("odd", [{"token_logprobs": "no"}, {"token_logprobs": [None]}, {}, [1]])
def test_odd_logprobs_are_left_out(odd: Any) -> None:
    assert CompletionReader(NoTokens(), frozenset()).feed(chunk([5], odd)) == {"token_ids": [5]}
