"""Bodies of requests: accepted fields, and the field that a refusal names."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from dynamo_redis.frontend.http.errors import ApiError
from dynamo_redis.frontend.openai import ChatBody, TextBody, read_body

TOOLS: Any = [{"type": "function", "function": {"name": "f"}}]
TWO_DEFINITIONS: Any = [
    {"function": {"name": name, "parameters": {"type": "object", "$defs": {"Item": {"type": kind}}}}}
    for name, kind in (("f", "string"), ("g", "integer"))
]
NAMED: Any = {"type": "function", "function": {"name": "f"}}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"model": "m", "prompt": "Hi"}


def refusal(kind: Any, content: bytes | dict[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read_body(kind, content if isinstance(content, bytes) else json.dumps(content).encode())
    assert caught.value.status == 400
    assert "\n" not in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": "Hi"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "messages[0].content[0].type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
            "messages[0].content[0].text",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
        ({"model": 7}, "model"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "0"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["x" * 2000]}, "stop[0]"),
        ({"stop": 5}, "stop"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 3}}, "stream_options.include_usage"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"ignore_eos": "x"}, "ignore_eos"),
        ({"nvext": {"ignore_eos": "x"}}, "nvext.ignore_eos"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logit_bias": {"five": 1}}, "logit_bias.five"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"min_tokens": 5, "max_completion_tokens": 4}, "min_tokens"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        (
            {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}},
            "chat_template_kwargs.reasoning_effort",
        ),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function.name"),
        ({"tools": TOOLS, "tool_choice": NAMED | {"function": {"name": "g"}}}, "tool_choice.function.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": 1}}, "tool_choice.function.name"),
        ({"tools": TOOLS, "tool_choice": "required", "guided_regex": "a"}, "tool_choice"),
        (
            {"tools": [{"function": {"name": "f", "parameters": 1}}], "tool_choice": "required"},
            "tools[0].function.parameters",
        ),
        ({"tools": TWO_DEFINITIONS, "tool_choice": "required"}, "tools[1].function.parameters.$defs"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
    ],
)
def test_a_wrong_field_of_a_chat_is_named(change: dict[str, Any], param: str) -> None:
    assert refusal(ChatBody, {**CHAT, **change}).param == param


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["x"] * 1000}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"messages": []}, "messages"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
    ],
)
def test_a_wrong_field_of_a_text_completion_is_named(change: dict[str, Any], param: str) -> None:
    assert refusal(TextBody, {**TEXT, **change}).param == param


@pytest.mark.parametrize("field", ["model", "messages"])
def test_a_missing_field_is_named(field: str) -> None:
    error = refusal(ChatBody, {name: value for name, value in CHAT.items() if name != field})
    assert error.param == field
    assert field in error.message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model": "m", "messages": [{"role": "user", "content": "\xff\xfe"}]}',
        b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "m", "messages": ' + b"[" * 100_000,
        b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    ],
    ids=["empty", "cut", "list", "null", "utf-8", "surrogate", "deep", "nan"],
)
def test_invalid_json_is_refused(content: bytes) -> None:
    refusal(ChatBody, content)


def test_null_is_absent() -> None:
    absent = dict.fromkeys(("max_tokens", "stop", "n", "seed", "tools", "stream", "logprobs", "of_tomorrow"))
    body = read_body(ChatBody, json.dumps({**CHAT, **absent}).encode())
    assert body.stops == []
    assert body.wanted_tokens is None
    assert not body.includes_usage


def test_messages_and_tools_are_unchanged() -> None:
    """The template writes them out, so the order of their keys and unknown keys matter."""
    tool = {
        "zeta": 1,
        "type": "function",
        "function": {"strict": True, "parameters": {"b": 1, "a": 2}, "name": "f"},
    }
    message = {"name": "Ada", "content": "Hi", "role": "user", "custom": [1]}
    body = read_body(ChatBody, json.dumps({"model": "m", "messages": [message], "tools": [tool]}).encode())
    assert json.dumps(body.messages) == json.dumps([message])
    assert json.dumps(body.tools) == json.dumps([tool])


def test_the_newer_name_of_the_token_limit_wins() -> None:
    limits = {"max_tokens": 5, "max_completion_tokens": 7}
    assert read_body(ChatBody, json.dumps({**CHAT, **limits}).encode()).wanted_tokens == 7
    assert read_body(TextBody, json.dumps({**TEXT, "max_tokens": 5}).encode()).wanted_tokens == 5


def test_whole_numbers_are_fine_where_fractions_are() -> None:
    assert read_body(ChatBody, json.dumps({**CHAT, "temperature": 1}).encode()).temperature == 1.0


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (ChatBody, {**CHAT, "messages": [1] * 100}),
        (ChatBody, {**CHAT, "messages": [{"role": "user", "content": [1] * 100}]}),
        (ChatBody, {**CHAT, "messages": [{"role": "assistant", "tool_calls": [1] * 100}]}),
        (ChatBody, {**CHAT, "tools": [1] * 100}),
        (ChatBody, {**CHAT, "documents": [1] * 100}),
        (ChatBody, {**CHAT, "allowed_token_ids": [-1] * 100}),
        (ChatBody, {**CHAT, "stop_token_ids": [-1] * 100}),
        (ChatBody, {**CHAT, "bad_words": [1] * 100}),
        (TextBody, {**TEXT, "prompt": [0] + [-1] * 100}),
        (TextBody, {**TEXT, "prompt": [[-1, -1]] * 100}),
        (TextBody, {**TEXT, "prompt": ["x"] + [1] * 100}),
    ],
)
def test_first_wrong_item_ends_the_check(kind: Any, content: dict[str, Any]) -> None:
    """Errors for all items, with only the first one reported, would take a tenth of a second."""
    cause = refusal(kind, content).__cause__
    assert isinstance(cause, ValidationError)
    assert cause.error_count() == 1


def test_refusal_repeats_no_long_key() -> None:
    assert len(refusal(ChatBody, {**CHAT, "logit_bias": {"k" * 100_000: 1}}).body_bytes()) < 1000


@pytest.mark.parametrize(
    ("tools", "choice"),
    [
        (TWO_DEFINITIONS, "auto"),
        (TWO_DEFINITIONS, NAMED),
        ([TWO_DEFINITIONS[0], {"function": {**TWO_DEFINITIONS[0]["function"], "name": "g"}}], "required"),
    ],
)
def test_definitions_of_tools_that_do_not_meet_are_taken(tools: Any, choice: Any) -> None:
    read_body(ChatBody, json.dumps({**CHAT, "tools": tools, "tool_choice": choice}).encode())
