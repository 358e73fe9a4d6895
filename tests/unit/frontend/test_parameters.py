"""Parameters besides a body's fields: refused by name, or harmless. docs/parameters.md lists all of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from anthropic.types import MessageCountTokensParams
from anthropic.types.beta.message_create_params import (
    MessageCreateParamsBase as BetaMessageCreateParamsBase,
)
from anthropic.types.message_create_params import MessageCreateParamsBase
from openai.types.chat import completion_create_params as openai_chat
from openai.types.completion_create_params import CompletionCreateParamsBase
from openai.types.embedding_create_params import EmbeddingCreateParams
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from typing_extensions import get_type_hints

from dynamo_redis.frontend import guided, parameters
from dynamo_redis.frontend.anthropic_body import CountBody, MessagesBody
from dynamo_redis.frontend.embedding_body import EmbeddingBody
from dynamo_redis.frontend.http.errors import ApiError
from dynamo_redis.frontend.openai import ChatBody, TextBody, read_body
from dynamo_redis.frontend.options import CompletionOptions, Extensions, StreamOptions
from dynamo_redis.frontend.responses_body import ResponsesBody

PAGE = Path(__file__).parents[3] / "docs" / "parameters.md"
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"model": "m", "prompt": "Hi"}


def read(change: dict[str, Any], kind: type[CompletionOptions] = ChatBody) -> CompletionOptions:
    return read_body(kind, json.dumps({**(CHAT if kind is ChatBody else TEXT), **change}).encode())


def refusal(change: dict[str, Any], kind: type[CompletionOptions] = ChatBody) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(change, kind)
    assert caught.value.status == 400
    assert "\n" not in caught.value.message
    return caught.value


def refused() -> Iterator[tuple[type[CompletionOptions], str, parameters.Refusal]]:
    """Return every refused parameter: the body, the path of names, and the refusal."""
    for kind in (ChatBody, TextBody):
        for name, why in kind.further_parameters.refused.items():
            yield kind, name, why
    for at, table in (
        ("nvext", parameters.NVEXT),
        ("stream_options", parameters.STREAM_OPTIONS),
        ("structured_outputs", parameters.STRUCTURED_OUTPUTS),
        ("response_format", parameters.RESPONSE_FORMAT),
    ):
        for name, why in table.refused.items():
            yield ChatBody, f"{at}.{name}", why


def setting(path: str, value: object) -> dict[str, Any]:
    """Return the part of a body that sets the parameter at a path to a value."""
    outer, _, inner = path.rpartition(".")
    return {path: value} if not outer else {"stream": True, outer: {inner: value}}


@pytest.mark.parametrize(("kind", "path", "why"), list(refused()))
def test_refused_parameter_is_named(kind: Any, path: str, why: parameters.Refusal) -> None:
    error = refusal(setting(path, "wanted"), kind)
    assert (error.param, error.code) == (path, "unsupported_parameter")
    assert why.reason in error.message
    for value in (None, *why.neutral):
        read(setting(path, value), kind)


def test_neutral_values_are_told_apart() -> None:
    assert refusal({"echo": 0}).param == "echo"
    assert refusal({"use_beam_search": 0}).param == "use_beam_search"


@pytest.mark.parametrize("kind", [ChatBody, TextBody])
def test_harmless_parameters_are_taken(kind: Any) -> None:
    for name in kind.further_parameters.harmless:
        read({name: "anything"}, kind)


@pytest.mark.parametrize(
    ("change", "param", "meant"),
    [
        ({"max_token": 5}, "max_token", "max_tokens"),
        ({"maxTokens": 5}, "maxTokens", "max_tokens"),
        ({"temperatur": 1}, "temperatur", "temperature"),
        ({"nvext": {"ignore-eos": True}}, "nvext.ignore-eos", "nvext.ignore_eos"),
        (
            {"stream": True, "stream_options": {"included_usage": True}},
            "stream_options.included_usage",
            "stream_options.include_usage",
        ),
        ({"structured_outputs": {"jsno": {}}}, "structured_outputs.jsno", "structured_outputs.json"),
    ],
)
def test_misspelt_parameter_gets_a_hint(change: dict[str, Any], param: str, meant: str) -> None:
    error = refusal(change)
    assert (error.param, error.code) == (param, "unknown_parameter")
    assert f"Did you mean '{meant}'?" in error.message


def test_unknown_parameter_is_refused() -> None:
    assert refusal({"of_tomorrow": {"x": [1]}}).message == "Unknown parameter: 'of_tomorrow'."
    assert len(refusal({"x" * 10_000: 1}).message) < 200


@pytest.mark.parametrize(
    ("kind", "parameters_of_openai"),
    [(ChatBody, openai_chat.CompletionCreateParamsBase), (TextBody, CompletionCreateParamsBase)],
)
def test_every_parameter_of_openai_is_known(kind: Any, parameters_of_openai: Any) -> None:
    known = {*kind.model_fields, *kind.further_parameters.refused, *kind.further_parameters.harmless}
    assert set(get_type_hints(parameters_of_openai)) - known == set()


@pytest.mark.parametrize(
    ("kind", "parameters_of_client"),
    [
        (MessagesBody, MessageCreateParamsBase),
        (CountBody, MessageCountTokensParams),
        (MessagesBody, BetaMessageCreateParamsBase),
        (ResponsesBody, ResponseCreateParamsBase),
        (EmbeddingBody, EmbeddingCreateParams),
    ],
)
def test_parameters_of_other_apis_are_known(kind: Any, parameters_of_client: Any) -> None:
    known = {*kind.model_fields, *kind.further_parameters.refused, *kind.further_parameters.harmless}
    headers = {"betas"}
    assert set(get_type_hints(parameters_of_client)) - known - headers == set()


@pytest.mark.parametrize(
    ("kind", "heading"),
    [(MessagesBody, "Messages"), (ResponsesBody, "Responses"), (EmbeddingBody, "Embeddings")],
)
def test_page_lists_parameters_of_other_apis(kind: Any, heading: str) -> None:
    known = {*kind.model_fields, *kind.further_parameters.refused, *kind.further_parameters.harmless}
    assert known <= listed(heading)


# --------------------------------------------------------------------------- the page


def listed(heading: str) -> set[str]:
    """Read the names in the first column of the table below a heading of the page."""
    section = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if re.match(r"\| .*`", line)]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_page_lists_served_parameters() -> None:
    fields = {*ChatBody.model_fields, *TextBody.model_fields} - {
        "stream_options",
        "nvext",
        "structured_outputs",
    }
    inner = {f"nvext.{name}" for name in Extensions.model_fields}
    inner |= {f"stream_options.{name}" for name in StreamOptions.model_fields}
    inner |= {f"structured_outputs.{name}" for name in guided.ALL_STRUCTURED_FIELDS}
    assert listed("Done") == fields | inner


def test_page_lists_harmless_parameters() -> None:
    assert listed("Harmless") == {*parameters.CHAT.harmless, *parameters.TEXT.harmless}


def test_page_lists_refused_parameters() -> None:
    headers = {str(name, "ascii") for name in parameters.REFUSED_HEADERS}
    assert listed("Refused") == {path for _, path, _ in refused()} | headers


# --------------------------------------------------------------------------- to the worker


def test_sampling_parameters_reach_the_worker() -> None:
    wanted = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": 0.0,
        "frequency_penalty": -1.0,
        "repetition_penalty": 1.1,
        "logit_bias": {"5": -100.0},
        "allowed_token_ids": [5, 6],
        "bad_words": ["no"],
        "include_stop_str_in_output": True,
    }
    for kind in (ChatBody, TextBody):
        assert read(wanted, kind).sampling_options() == wanted
    assert read({}).sampling_options() == {}


def test_extensions_say_the_same_as_parameters() -> None:
    body = read({"nvext": {"top_k": 3, "repetition_penalty": 1.2, "max_thinking_tokens": 9}})
    assert body.sampling_options() == {"top_k": 3, "repetition_penalty": 1.2}
    assert body.thinking_budget() == 9
    assert read({"nvext": {"greed_sampling": True}}).sampling_options() == {"temperature": 0.0}
    for change, param in (
        ({"top_k": 4, "nvext": {"top_k": 3}}, "nvext.top_k"),
        ({"ignore_eos": False, "nvext": {"ignore_eos": True}}, "nvext.ignore_eos"),
        ({"include_stop_str_in_output": True, "no_stop_trim": False}, "no_stop_trim"),
        ({"temperature": 1.0, "nvext": {"greed_sampling": True}}, "nvext.greed_sampling"),
        ({"thinking_token_budget": 1, "nvext": {"max_thinking_tokens": 2}}, "nvext.max_thinking_tokens"),
    ):
        assert refusal(change).param == param


SCHEMA = {"type": "object", "properties": {"a": {"type": "number"}}}


@pytest.mark.parametrize(
    ("change", "form"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json": {"type": "object"}}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            {"json": SCHEMA},
        ),
        (
            {"response_format": {"type": "structural_tag", "structures": []}},
            {"structural_tag": {"type": "structural_tag", "structures": []}},
        ),
        ({"guided_json": SCHEMA}, {"json": SCHEMA}),
        ({"guided_json": json.dumps(SCHEMA)}, {"json": SCHEMA}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["yes", "no"]}, {"choice": ["yes", "no"]}),
        ({"guided_grammar": "root ::= 'a'"}, {"grammar": "root ::= 'a'"}),
        (
            {"guided_json": SCHEMA, "guided_whitespace_pattern": " ?"},
            {"json": SCHEMA, "whitespace_pattern": " ?"},
        ),
        ({"nvext": {"guided_choice": ["a"]}}, {"choice": ["a"]}),
        ({"structured_outputs": {"json": SCHEMA}}, {"json": SCHEMA}),
        ({"structured_outputs": {"json_object": True}}, {"json": {"type": "object"}}),
        ({"structured_outputs": {"structural_tag": '{"x": 1}'}}, {"structural_tag": {"x": 1}}),
        ({"json_schema": json.dumps(SCHEMA)}, {"json": SCHEMA}),
        ({"regex": "a+"}, {"regex": "a+"}),
        ({"ebnf": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
    ],
)
def test_every_way_of_asking_for_a_form_is_one(change: dict[str, Any], form: Any) -> None:
    for kind in (ChatBody, TextBody):
        assert read(change, kind).sampling_options().get("guided_decoding") == form


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "response_format.schema"),
        ({"response_format": {"type": "text", "json_schema": {}}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strct": True}}},
            "response_format.json_schema.strct",
        ),
        ({"guided_json": {"maximum": 10**30}}, "guided_json"),
        ({"guided_json": '{"maximum": 1' + "0" * 300 + "}"}, "guided_json"),
        ({"guided_json": '{"maximum": Infinity}'}, "guided_json"),
        ({"structured_outputs": {"json": {"maximum": float("inf")}}}, "structured_outputs.json"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": [1]}, "guided_json"),
        ({"guided_json": '{"a":' * 100_000}, "guided_json"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a", 1]}, "guided_choice[1]"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
        ({"guided_regex": "a", "guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_regex": "a", "nvext": {"guided_regex": "a"}}, "nvext.guided_regex"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object"),
    ],
)
def test_malformed_form_is_named(change: dict[str, Any], param: str) -> None:
    assert refusal(change).param == param


def test_effort_is_a_variable_of_the_template() -> None:
    body = read({"reasoning_effort": "none"})
    assert isinstance(body, ChatBody)
    assert body.template_variables() == {"reasoning_effort": "none", "enable_thinking": False}
    body = read({"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}})
    assert isinstance(body, ChatBody)
    assert body.template_variables() == {"reasoning_effort": "high", "enable_thinking": False}
