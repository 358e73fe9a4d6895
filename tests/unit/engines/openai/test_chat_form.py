"""Chats with images: the body for each kind of server, and the items of its deltas."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from dynamo_redis.engines.openai.dialects import Dialect
from dynamo_redis.engines.openai.request import chat_completion_body
from dynamo_redis.engines.openai.wire import DONE, CompletionReader
from dynamo_redis.errors import EngineFailed, InvalidRequest


def chat_body(dialect: Dialect, *names: str, **request: Any) -> dict[str, Any]:
    chat = dict.fromkeys(("messages", *names), b"[]")
    given = {"token_ids": [1], "chat": chat, **request}
    body, fields = chat_completion_body(given, model="m", dialect=dialect, dp_rank=None)
    assert fields == chat
    assert "prompt" not in body
    return body


def test_vllm_leaves_calls_in_the_text() -> None:
    body = chat_body("vllm", "tools", "documents", "chat_template_kwargs", stop_conditions={"max_tokens": 5})
    assert (body["tool_choice"], body["return_token_ids"], body["max_tokens"]) == ("none", True, 5)
    assert "tool_choice" not in chat_body("vllm")


def test_others_leave_reasoning_in_the_text() -> None:
    assert chat_body("sglang", "tools")["separate_reasoning"] is False
    body = chat_body("llamacpp", "tools")
    assert (body["reasoning_format"], body["parse_tool_calls"]) == ("none", False)


@pytest.mark.parametrize(
    ("dialect", "name"),
    [
        ("openai", "chat_template_kwargs"),
        ("openai", "continue_final_message"),
        ("sglang", "documents"),
        ("llamacpp", "continue_final_message"),
        ("llamacpp", "add_special_tokens"),
    ],
)
def test_unknown_field_of_a_chat_is_refused(dialect: Dialect, name: str) -> None:
    with pytest.raises(InvalidRequest, match=name):
        chat_body(dialect, name)


@pytest.mark.parametrize("chat", [5, {}, {"messages": "[]"}, {"tools": b"[]"}])
def test_wrong_chat_is_refused(chat: Any) -> None:
    with pytest.raises(InvalidRequest, match="chat"):
        chat_completion_body({"token_ids": [1], "chat": chat}, model="m", dialect="vllm", dp_rank=None)


@pytest.mark.parametrize("dialect", ["sglang", "llamacpp"])
def test_schema_goes_as_response_format(dialect: Dialect) -> None:
    body = chat_body(dialect, sampling_options={"guided_decoding": {"json": {"type": "object"}}})
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert "json_schema" not in body


def test_logprobs_are_asked_for_in_chat_form() -> None:
    body = chat_body("vllm", output_options={"logprobs": 2})
    assert (body["logprobs"], body["top_logprobs"]) == (True, 2)


class Letters:
    """One token a letter."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def encode_bytes(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))


def items_of(*choices: dict[str, Any]) -> list[Any]:
    reader = CompletionReader(Letters(), frozenset({9}))
    events = [json.dumps({"choices": [{"index": 0, **choice}]}).encode() for choice in choices]
    return [*reader.items([*events, DONE]), reader.finish()]


def test_text_of_deltas_becomes_tokens() -> None:
    items = items_of(
        {"delta": {"role": "assistant", "content": ""}},
        {"delta": {"content": "ab"}},
        {"delta": {"content": None, "tool_calls": [], "reasoning_content": None}},
        {"delta": {"content": "c"}},
        {"delta": {}, "finish_reason": "stop"},
    )
    assert [token for item in items for token in item["token_ids"]] == [97, 98, 99]
    assert items[-1]["finish_reason"] == "stop"


def test_whole_message_is_read_as_a_delta() -> None:
    items = items_of({"message": {"role": "assistant", "content": "ab"}, "finish_reason": "length"})
    assert items == [{"token_ids": [97, 98], "finish_reason": "length"}]


def test_token_ids_count_also_without_a_text() -> None:
    items = items_of(
        {"delta": {}, "token_ids": [1, 2]},
        {"delta": {"tool_calls": [{"index": 0}]}, "token_ids": [3]},
        {"delta": {"reasoning": "x"}, "token_ids": [4, 9], "finish_reason": "tool_calls"},
    )
    assert [item["token_ids"] for item in items] == [[1, 2], [3], [4]]


@pytest.mark.parametrize(
    "delta",
    [
        {"tool_calls": [{"index": 0}]},
        {"reasoning_content": "Hm"},
        {"reasoning": "Hm"},
        {"function_call": {"name": "f"}},
    ],
)
def test_answer_that_the_engine_parsed_is_an_error(delta: Any) -> None:
    with pytest.raises(EngineFailed, match="parser"):
        items_of({"delta": delta})


def test_logprobs_of_a_chat_name_token_ids() -> None:
    top = [{"token": "token_id:5", "logprob": -0.5}, {"token": "token_id:6", "logprob": -1.5}]
    content = [{"token": "token_id:5", "logprob": -0.5, "top_logprobs": top}]
    [item] = items_of(
        {
            "delta": {"content": "x"},
            "token_ids": [5],
            "logprobs": {"content": content},
            "finish_reason": "stop",
        }
    )
    assert item["log_probs"] == [-0.5]
    assert [each["token_id"] for each in item["top_logprobs"][0]] == [5, 6]
    for odd in ({"content": 5}, {"content": [5]}, {"content": None}):
        [item] = items_of({"delta": {}, "token_ids": [5], "logprobs": odd, "finish_reason": "stop"})
        assert "log_probs" not in item
