"""Completion requests in the form of each kind of server."""

from __future__ import annotations

from typing import Any

import pytest

from dynamo_redis.engines.openai.dialects import Dialect
from dynamo_redis.engines.openai.request import completion_body, hidden_stop_ids, prompt_ids
from dynamo_redis.errors import InvalidRequest
from dynamo_redis.models.llm_protocol import SamplingOptions, StopConditions

REQUEST = {
    "model": "demo",
    "token_ids": [1, 2],
    "stop_conditions": {
        "max_tokens": 5,
        "min_tokens": 2,
        "stop": ["END"],
        "stop_token_ids_hidden": [9],
        "ignore_eos": False,
    },
    "sampling_options": {
        "n": 1,
        "temperature": 0.0,
        "top_p": 0.9,
        "top_k": 3,
        "repetition_penalty": 1.1,
        "seed": 0,
        "frequency_penalty": None,
    },
    "eos_token_ids": [7],
}
STANDARD = {
    "model": "m",
    "prompt": [1, 2],
    "stream": True,
    "stream_options": {"include_usage": True},
    "max_tokens": 5,
    "stop": ["END"],
    "temperature": 0.0,
    "top_p": 0.9,
    "seed": 0,
}
FURTHER = {"top_k": 3, "min_tokens": 2, "ignore_eos": False, "stop_token_ids": [9]}


@pytest.mark.parametrize(
    ("dialect", "more"),
    [
        ("vllm", FURTHER | {"repetition_penalty": 1.1, "return_token_ids": True}),
        ("sglang", FURTHER | {"repetition_penalty": 1.1, "return_token_ids": True, "data_parallel_rank": 1}),
    ],
)
def test_each_kind_of_server_gets_its_own_names(dialect: Dialect, more: dict[str, Any]) -> None:
    body = completion_body(REQUEST, model="m", dialect=dialect, prompt=[1, 2], dp_rank=1)
    assert body == STANDARD | more


def test_invalid_requests_are_refused() -> None:
    with pytest.raises(InvalidRequest):
        prompt_ids({"token_ids": [True]})
    with pytest.raises(InvalidRequest):
        completion_body({"stop_conditions": 3}, model="m", dialect="vllm", prompt=[1], dp_rank=None)
    with pytest.raises(InvalidRequest):
        hidden_stop_ids({"eos_token_ids": 3})


def body(dialect: Dialect, *, token_room: int | None = None, **options: Any) -> dict[str, Any]:
    request = {"sampling_options": options.pop("sampling", {}), "stop_conditions": options.pop("stop", {})}
    return completion_body(
        request, model="m", dialect=dialect, prompt=[1], dp_rank=None, token_room=token_room
    )


def test_neutral_options_are_left_out() -> None:
    sampling = {"n": 1, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "seed": None, "top_p": 0.5}
    stop = {"ignore_eos": False, "min_tokens": 0, "stop": []}
    sent = body("openai", sampling=sampling, stop=stop)
    assert sent.keys() == {"model", "prompt", "stream", "stream_options", "top_p"}


@pytest.mark.parametrize(
    ("dialect", "options"),
    [
        ("openai", {"sampling": {"top_k": 3}}),
        ("openai", {"stop": {"ignore_eos": True}}),
        ("openai", {"stop": {"stop_token_ids_hidden": [3]}}),
        ("openai", {"sampling": {"guided_decoding": {"regex": "a+"}}}),
        ("llamacpp", {"stop": {"min_tokens": 3}}),
        ("llamacpp", {"sampling": {"guided_decoding": {"regex": "a+"}}}),
        ("sglang", {"sampling": {"guided_decoding": {"whitespace_pattern": " "}}}),
        ("vllm", {"sampling": {"n": 2}}),
        ("vllm", {"sampling": {"an_option_of_tomorrow": 1}}),
        ("sglang", {"stop": {"max_thinking_tokens": 1}}),
    ],
)
def test_unsupported_options_are_refused_by_name(dialect: Dialect, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        body(dialect, **options)
    ((_, given),) = options.items()
    name = next(iter(given)).removesuffix("_hidden")
    assert name in str(caught.value)
    assert ("response_format" in str(caught.value)) == (name == "guided_decoding")


def test_every_option_of_sampling_reaches_vllm() -> None:
    sampling = {
        "temperature": 0.1,
        "top_p": 0.2,
        "top_k": 3,
        "min_p": 0.4,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.6,
        "repetition_penalty": 1.7,
        "seed": 8,
        "logit_bias": {"9": 1.0},
        "allowed_token_ids": [10],
        "bad_words": ["bad"],
        "include_stop_str_in_output": True,
    }
    sent = body("vllm", sampling=sampling)
    assert sent.items() >= sampling.items()


def test_vllm_gets_every_option_of_the_protocol() -> None:
    apart = {"n", "guided_decoding", "stop_token_ids_hidden"}
    for name in set(SamplingOptions.__annotations__) - apart:
        assert 7 in body("vllm", sampling={name: 7}).values(), name
    for name in set(StopConditions.__annotations__) - apart:
        assert 7 in body("vllm", stop={name: 7}).values(), name
    assert body("vllm", stop={"max_thinking_tokens": 7})["thinking_token_budget"] == 7


SCHEMA = {"type": "object"}


@pytest.mark.parametrize(
    ("dialect", "guided", "sent"),
    [
        ("vllm", {"json": SCHEMA}, {"structured_outputs": {"json": SCHEMA}, "guided_json": SCHEMA}),
        ("vllm", {"choice": ["a"]}, {"structured_outputs": {"choice": ["a"]}, "guided_choice": ["a"]}),
        ("sglang", {"json": SCHEMA}, {"json_schema": '{"type": "object"}'}),
        ("sglang", {"regex": "a+"}, {"regex": "a+"}),
        ("sglang", {"choice": ["a.", "b"]}, {"regex": r"(a\.|b)"}),
        ("sglang", {"grammar": "g"}, {"ebnf": "g"}),
        ("llamacpp", {"json": SCHEMA}, {"json_schema": SCHEMA}),
        ("llamacpp", {"grammar": "g"}, {"grammar": "g"}),
        ("llamacpp", {"choice": ["a", 'b"']}, {"grammar": 'root ::= "a" | "b\\""'}),
    ],
)
def test_guided_decoding_has_the_servers_names(
    dialect: Dialect, guided: dict[str, Any], sent: dict[str, Any]
) -> None:
    asked = body(dialect, sampling={"guided_decoding": guided})
    assert asked.items() >= sent.items()


def test_request_without_max_tokens_gets_the_room() -> None:
    assert "max_tokens" not in body("openai")
    assert body("vllm", token_room=100)["max_tokens"] == 100
    assert body("sglang", token_room=100)["max_tokens"] == 99
    assert body("vllm", token_room=100, stop={"max_tokens": 7})["max_tokens"] == 7
