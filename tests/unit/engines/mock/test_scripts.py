"""Answers that a request prescribes to the mock engine: by a text in its prompt, or by a JSON schema."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.engines.mock.instances import instance_text
from dynamo_redis.engines.mock.scripts import Scripts
from dynamo_redis.engines.model_tokens import load_tokenizer
from dynamo_redis.errors import InvalidRequest
from dynamo_redis.models.directory import read_model_directory

TOKENIZER = load_tokenizer(read_model_directory(DEMO_MODEL_PATH))
TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def answer(prompt: str, guided: object = None) -> str | None:
    ids = TOKENIZER.encode(prompt, add_special_tokens=False).ids
    found = Scripts(TOKENIZER).answer(ids, guided)
    return None if found is None else TOKENIZER.decode(found, skip_special_tokens=False)


def test_last_message_prescribes_its_answer() -> None:
    assert answer(TURN.format("Hi <mock_answer>a <b> ł</mock_answer>")) == "a <b> ł"
    long = "x " * 500
    assert answer(TURN.format(f"<mock_answer>{long}</mock_answer>")) == long
    assert answer(TURN.format("<mock_answer>a</mock_answer>") + "<think>\n\n</think>\n\n") == "a"


def test_other_prompts_prescribe_nothing() -> None:
    told = TURN.format("<mock_answer>a</mock_answer>")
    result = TURN.format("<tool_response>3 degrees, and rain later on</tool_response>")
    for prompt in (told + "It is an answer.<|im_end|>\n" + result, "Hi", "a</mock_answer>", "<mock_answer>a"):
        assert answer(prompt) is None


SCHEMAS: list[Any] = [
    {"type": "object"},
    {"type": "object", "properties": {"city": {"type": "string"}, "n": {"type": "integer"}}},
    {"properties": {"a": {"type": "boolean"}, "b": {}}, "required": ["a"]},
    {"type": "array", "minItems": 2, "items": {"anyOf": [{"type": "null"}, {"type": "string"}]}},
    {"type": "string", "minLength": 9, "maxLength": 9},
    {"type": "integer", "minimum": 2.5, "maximum": 3},
    {"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 2},
    {"type": ["integer", "null"], "maximum": -1},
    {"enum": ["x", "y"]},
    {"const": {"a": [1]}},
    {"$ref": "#/$defs/p", "$defs": {"p": {"type": "object", "properties": {"q": {"type": "string"}}}}},
]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_instances_fit_their_schema(schema: Any) -> None:
    jsonschema.validate(json.loads(instance_text(schema)), schema)
    assert answer("Hi", {"json": schema}) == instance_text(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "a+"},
        {"type": "text"},
        {"type": "array", "minItems": "two"},
        {"$ref": "#/$defs/none"},
        {"$ref": "#/$defs/p", "$defs": {"p": {"$ref": "#/$defs/p"}}},
        {"type": "array", "minItems": 10**9, "items": {"type": "array", "minItems": 10**9}},
        {"properties": 3},
    ],
)
def test_schemas_that_it_cannot_keep_to_are_refused(schema: Any) -> None:
    with pytest.raises(InvalidRequest, match="mock engine"):
        answer("Hi", {"json": schema})


@pytest.mark.parametrize("guided", [{"regex": "a"}, {"json": "a"}, "json", {"choice": ["a"]}])
def test_other_forms_are_refused(guided: object) -> None:
    with pytest.raises(InvalidRequest, match="response_format"):
        answer("Hi", guided)
