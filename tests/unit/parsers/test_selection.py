"""Parsers are chosen by their names, and by chat templates."""

import pytest

from dynamo_redis.parsers.detection import detect_reasoning_parser, detect_tool_parser
from dynamo_redis.parsers.reasoning import REASONING_FORMATS
from dynamo_redis.parsers.select import marker_texts, reasoning_format, tool_format
from dynamo_redis.parsers.tool_formats import TOOL_FORMATS

TEMPLATES = {
    "{% for t in tools %}<tool_call>{{ t }}</tool_call>": "hermes",
    "<tool_call>\n<function=example_function_name>": "qwen3_coder",
    "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>": "glm45",
    "{{ '[TOOL_CALLS]' }}": "mistral",
    "{{'<｜tool▁calls▁begin｜>'}}": "deepseek_v3",
    'in the format {"name": function name, "parameters": dictionary of argument name}.': "llama3_json",
    "[func_name1(params_name1=params_value1)]": "pythonic",
    "{{ messages[0].content }}": None,
}


@pytest.mark.parametrize(("template", "name"), TEMPLATES.items())
def test_tool_parsers_are_found_by_the_template(template: str, name: str | None) -> None:
    assert detect_tool_parser(template) == name
    assert tool_format("auto", template) is (TOOL_FORMATS[name] if name else None)


def test_reasoning_parsers_are_found_by_the_template() -> None:
    assert reasoning_format(None, "{{ content.split('</think>')[-1] }}") is REASONING_FORMATS["basic"]
    assert detect_reasoning_parser("{{ '[THINK]' }}") == "mistral"
    assert detect_reasoning_parser("no markers") is None


def test_names_go_before_the_template() -> None:
    assert tool_format("mistral", "<tool_call>") is TOOL_FORMATS["mistral"]
    assert tool_format("none", "<tool_call>") is None
    assert reasoning_format("none", "<think>") is None
    with pytest.raises(KeyError):
        tool_format("no such", "")


@pytest.mark.parametrize(
    ("name", "prompt_end", "inside"),
    [
        ("qwen3", "<|im_start|>assistant\n", False),
        ("qwen3", "<|im_start|>assistant\n<think>\n", True),
        ("qwen3", "<think>\n\n</think>\n\n", False),
        ("deepseek_r1", "<｜Assistant｜>", True),
        ("deepseek_r1", "<｜Assistant｜><think>\n", True),
        ("deepseek_r1", "<｜Assistant｜></think>", False),
    ],
)
def test_the_prompt_tells_whether_reasoning_has_begun(name: str, prompt_end: str, inside: bool) -> None:
    assert REASONING_FORMATS[name].begins_inside(prompt_end) is inside


def test_literals_of_both_parsers_have_a_text() -> None:
    found = marker_texts(TOOL_FORMATS["mistral"], REASONING_FORMATS["mistral"])
    assert found == {"[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "[THINK]", "[/THINK]"}
    assert marker_texts(None, None) == frozenset()
