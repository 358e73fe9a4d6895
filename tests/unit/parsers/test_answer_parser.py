"""Answers, whole and in pieces, become content, reasoning and calls: by golden cases and random cuts."""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic_core import from_json

from dynamo_redis.parsers.answer_parser import AnswerParser
from dynamo_redis.parsers.deltas import CallArguments, CallBegin, Reasoning, Text
from dynamo_redis.parsers.reasoning import REASONING_FORMATS
from dynamo_redis.parsers.tool_formats import TOOL_FORMATS

GOLDEN = json.loads((Path(__file__).parents[2] / "vectors" / "parsed_answers.json").read_bytes())
CASES: list[dict[str, Any]] = GOLDEN["cases"]


@dataclass
class Parsed:
    """The joined deltas of an answer."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, str]] = field(default_factory=list)
    complete_count: int = 0


def parse(case: dict[str, Any], pieces: Iterable[str], *, streams: bool, is_cut: bool = False) -> Parsed:
    numbers = iter(range(1 << 30))
    parser = AnswerParser(
        TOOL_FORMATS.get(case["tool_parser"]),
        REASONING_FORMATS.get(case["reasoning_parser"]),
        starts_inside=case.get("starts_inside", False),
        tools=GOLDEN["tools"],
        most_calls=case.get("most_calls"),
        streams=streams,
        new_id=lambda: f"id-{next(numbers)}",
    )
    parsed = Parsed()
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    for delta in [*deltas, *parser.finish(is_cut=is_cut)]:
        match delta:
            case Text(text):
                assert text
                parsed.content += text
            case Reasoning(text):
                assert text
                parsed.reasoning += text
            case CallBegin(index, call_id, name):
                assert index == len(parsed.calls)
                parsed.calls.append({"id": call_id, "name": name, "arguments": ""})
            case CallArguments(index, text):
                assert index == len(parsed.calls) - 1
                parsed.calls[-1]["arguments"] += text
    parsed.complete_count = sum(_is_object(call["arguments"]) for call in parsed.calls)
    assert parser.has_calls is (parsed.complete_count > 0)
    return parsed


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def check(case: dict[str, Any], parsed: Parsed, *, streams: bool) -> None:
    wanted = case["streamed"] if streams and "streamed" in case else case
    assert parsed.content == wanted["content"]
    assert parsed.reasoning == case["reasoning"]
    assert [(call["name"], call["arguments"]) for call in parsed.calls] == [
        (call["name"], call["arguments"]) for call in wanted["calls"]
    ]
    for call, expected in zip(parsed.calls, wanted["calls"], strict=True):
        assert call["id"] == expected.get("id", call["id"])


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_answers_are_parsed_alike_at_each_split(case: dict[str, Any], streams: bool) -> None:
    text = case["text"]
    whole = parse(case, [text], streams=streams)
    check(case, whole, streams=streams)
    assert parse(case, text, streams=streams) == whole, "character by character"
    for at in range(len(text) + 1):
        assert parse(case, [text[:at], text[at:]], streams=streams) == whole, f"split at {at}"


def test_all_formats_have_golden_cases() -> None:
    aliases = {"qwen25": "hermes", "glm47": "glm45", "kimi_k25": "kimi_k2", "nemotron_nano": "qwen3_coder"}
    tested = {case["tool_parser"] for case in CASES}
    assert {aliases.get(name, name) for name in TOOL_FORMATS} <= tested
    markers = {
        (REASONING_FORMATS[name].begin, REASONING_FORMATS[name].starts_inside)
        for name in {case["reasoning_parser"] for case in CASES if case["reasoning_parser"]}
    }
    assert markers == {(one.begin, one.starts_inside) for one in REASONING_FORMATS.values()}


_PARTS = sorted({part for case in CASES for part in (case["text"], *case["text"].split("\n"))})


@st.composite
def _answers(draw: st.DrawFn) -> str:
    """Draw texts like those of models: parts of golden ones, cut anywhere and put together."""
    parts = draw(st.lists(st.sampled_from(_PARTS) | st.text('<[{"}]>\\:, \nax', max_size=6), max_size=4))
    cuts = [draw(st.integers(0, len(part))) for part in parts]
    return "".join(
        part[:cut] if draw(st.booleans()) else part[cut:] for part, cut in zip(parts, cuts, strict=True)
    )


@given(data=st.data(), answer=_answers(), tool=st.sampled_from(sorted(TOOL_FORMATS)), streams=st.booleans())
def test_random_answers_are_parsed_alike_in_pieces(
    data: st.DataObject, answer: str, tool: str, streams: bool
) -> None:
    reasoning = data.draw(st.sampled_from([None, "basic", "deepseek_r1"]))
    case = {"tool_parser": tool, "reasoning_parser": reasoning, "starts_inside": reasoning == "deepseek_r1"}
    whole = parse(case, [answer], streams=streams)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=8)))
    pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    assert parse(case, pieces, streams=streams) == whole
    if not streams:
        assert all(_is_object(call["arguments"]) for call in whole.calls)
    if not whole.calls and reasoning is None:
        assert whole.content == answer, "nothing is lost, and nothing is given twice"


def _without_malformed_calls() -> list[Any]:
    cases = [case for case in CASES if case["calls"] and "streamed" not in case]
    return [pytest.param(case, id=case["name"]) for case in cases]


@pytest.mark.parametrize("case", _without_malformed_calls())
def test_cut_calls_are_the_same_whole_and_streamed(case: dict[str, Any]) -> None:
    """A part of a call is given as far as it has come: JSON, but for its end."""
    for at in range(len(case["text"]) + 1):
        text = case["text"][:at]
        whole = parse(case, [text], streams=False, is_cut=True)
        pieces = [text[: at // 2], text[at // 2 :]]
        assert parse(case, pieces, streams=True, is_cut=True) == whole, f"cut at {at}"
        for call in whole.calls:
            from_json(call["arguments"] or "{}", allow_partial=True)


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("tool_parser", "text", "arguments"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "b c', '{"a": "b c'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "b\\u00', '{"a": "b'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": tr', '{"a": '),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": {', '{"a": {'),
        ("deepseek_v3", '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a"', '{"a"'),
        ("mistral", '[TOOL_CALLS]f{"a": 1', '{"a": 1'),
        ("qwen3_coder", "<function=f>\n<parameter=a>\nb c</para", '{"a": "b c</para'),
        ("qwen3_coder", "<function=f>\n<parameter=a>\nb c</parameter></fun", '{"a": "b c"'),
        ("glm45", "<tool_call>f\n<arg_key>a</arg_key><arg_val", ""),
    ],
)
def test_cut_call_is_given_as_far_as_it_came(
    tool_parser: str, text: str, arguments: str, streams: bool
) -> None:
    case = {"tool_parser": tool_parser, "reasoning_parser": None}
    parsed = parse(case, [text], streams=streams, is_cut=True)
    assert [(call["name"], call["arguments"]) for call in parsed.calls] == [("f", arguments)]
    assert parsed.content == ""


@given(text=st.text('<tool_call>{"name": f, arguments}[]', max_size=60))
@example('<tool_call>{"name": "f", "arguments": {"a": "b"')
def test_malformed_calls_are_content(text: str) -> None:
    case = {"tool_parser": "hermes", "reasoning_parser": None}
    parsed = parse(case, [text], streams=False)
    if not parsed.calls:
        assert parsed.content == text


def test_long_values_and_deep_nesting_are_content() -> None:
    case = {"tool_parser": "hermes", "reasoning_parser": None}
    deep = '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 100_000
    assert parse(case, [deep], streams=False).content == deep
    late = '<tool_call>{"arguments": {"a": "' + "x" * 500_000 + '"}, "name": "f"}</tool_call>'
    assert parse(case, [late], streams=False).content == late
    assert parse(case, [late[:300_000], late[300_000:]], streams=True).content == late


def test_many_markers_take_time_in_proportion() -> None:
    case = {"tool_parser": "hermes", "reasoning_parser": None}
    text = '<tool_call>{"name":"' * 20_000
    assert parse(case, [text], streams=False).content == text


@pytest.mark.parametrize(
    ("tool_parser", "begin", "end"),
    [
        ("qwen3_coder", "<function=f>\n<parameter=x>\n", "\n</parameter>\n</function>"),
        ("glm45", "<tool_call>f\n<arg_key>x</arg_key><arg_value>", "</arg_value></tool_call>"),
    ],
)
def test_long_parameters_take_time_in_proportion(tool_parser: str, begin: str, end: str) -> None:
    tools = {"f": {"properties": {"x": {"type": "array"}}}}
    parser = AnswerParser(TOOL_FORMATS[tool_parser], tools=tools)
    text = begin + "[" + "1," * 50_000 + "1]" + end
    started_s = time.process_time()
    deltas = [delta for at in range(0, len(text), 2) for delta in parser.feed(text[at : at + 2])]
    deltas += parser.finish()
    assert time.process_time() - started_s < 4
    arguments = "".join(delta.text for delta in deltas if isinstance(delta, CallArguments))
    assert len(json.loads(arguments)["x"]) == 50_001


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("tool_parser", "text"),
    [
        ("pythonic", r"[f(x='\ud800')]"),
        ("pythonic", r"[f(x={'\ud800': 1})]"),
        ("hermes", r'<tool_call>{"name": "f", "arguments": "{\"x\": \"\\ud800\"}"}</tool_call>'),
        ("hermes", r'<tool_call>{"name": "\ud800", "arguments": {}}</tool_call>'),
        ("qwen3_coder", r'<function=f><parameter=x>["\ud800"]</parameter></function>'),
        ("glm45", r'<tool_call>f<arg_key>x</arg_key><arg_value>["\ud800"]</arg_value></tool_call>'),
    ],
)
def test_half_characters_stay_escapes(tool_parser: str, text: str, streams: bool) -> None:
    tools = {"f": {"properties": {"x": {"type": "array"}}}}
    parser = AnswerParser(TOOL_FORMATS[tool_parser], tools=tools, streams=streams)
    deltas = [*parser.feed(text), *parser.finish()]
    assert r"\ud800" in "".join(delta.text for delta in deltas if not isinstance(delta, CallBegin))
    for delta in deltas:
        (delta.name if isinstance(delta, CallBegin) else delta.text).encode()


def test_text_without_markers_is_passed_on_as_it_comes() -> None:
    parser = AnswerParser(TOOL_FORMATS["hermes"], REASONING_FORMATS["basic"])
    assert parser.feed("Hi") == [Text("Hi")]
    assert parser.feed(" there\n") == [Text(" there\n")]
    assert parser.feed(" 1 <") == [Text(" 1 ")]
    assert parser.feed(" 2") == [Text("< 2")]
    assert list(parser.finish()) == []


def test_text_that_may_begin_a_marker_does_not_pass() -> None:
    parser = AnswerParser(TOOL_FORMATS["hermes"], REASONING_FORMATS["basic"])
    assert not parser.passes(["Hi"]), "it may begin with reasoning"
    parser.feed("Hi")
    assert parser.passes([" you", "", "!"])
    assert not parser.passes(["a", "<"])
    parser.feed("<tool")
    assert not parser.passes(["a"])
    thinker = AnswerParser(None, REASONING_FORMATS["basic"], starts_inside=True)
    thinker.feed("hm")
    assert not thinker.passes(["a"])
    assert not AnswerParser(TOOL_FORMATS["hermes"], streams=False).passes(["a"])


def test_arguments_are_passed_on_as_they_come() -> None:
    parser = AnswerParser(TOOL_FORMATS["hermes"], new_id=lambda: "id")
    assert parser.feed('<tool_call>{"name": "f"') == []
    assert parser.feed(', "arguments": {"a') == [CallBegin(0, "id", "f"), CallArguments(0, '{"a')]
    assert parser.feed('": "x y') == [CallArguments(0, '": "x y')]
    assert parser.feed(' z"}}') == [CallArguments(0, ' z"}')]
    assert parser.feed("</tool_call>") == []
    assert list(parser.finish()) == []


def test_ids_are_of_the_form_that_templates_take() -> None:
    for name, length in (("mistral", 9), ("hermes", 37)):
        parser = AnswerParser(TOOL_FORMATS[name])
        marker = TOOL_FORMATS[name].begin[0]
        begin = parser.feed(marker + '{"name": "f", "arguments": {}}')[0] if name == "hermes" else None
        begin = begin or parser.feed(marker + "f{}")[0]
        assert isinstance(begin, CallBegin)
        assert len(begin.id) == length
        assert begin.id.replace("_", "").isalnum()
