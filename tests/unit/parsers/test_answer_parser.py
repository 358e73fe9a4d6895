"""Answers, whole and in pieces, become content, reasoning and calls: by golden cases and random cuts."""

import gc
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic_core import from_json

from dynamo_redis.parsers.answer_parser import PIECE_SIZE, AnswerParser
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


def _without_malformed_answers() -> list[Any]:
    return [pytest.param(case, id=case["name"]) for case in CASES if "streamed" not in case]


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
@pytest.mark.parametrize("case", _without_malformed_answers())
def test_no_piece_of_a_marker_is_text(case: dict[str, Any], streams: bool) -> None:
    """A cut answer has the beginning of the whole one's reasoning, and of its content behind a call. A
    single character may be text, as the "<" of a comparison is."""
    whole = parse(case, [case["text"]], streams=streams)
    for at in range(len(case["text"]) + 1):
        cut = parse(case, [case["text"][:at]], streams=streams, is_cut=True)
        assert _begins(whole.reasoning, cut.reasoning), f"cut at {at}"
        if cut.calls:
            assert _begins(whole.content, cut.content), f"cut at {at}"


def _begins(whole: str, cut: str) -> bool:
    return whole.startswith((cut, cut[:-1].rstrip()))


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
        ("qwen3_coder", "<function=f>\n<parameter=a>\nb c</para", '{"a": "b c'),
        ("qwen3_coder", "<function=f>\n<parameter=a>\nb <", '{"a": "b <'),
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


_LONG_ANSWERS = [
    ("hermes", '<tool_call>{"name":"' * 20_000),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": [' + "1," * 80_000 + "1]}}</tool_call>"),
    ("hermes", '<tool_call>{"arguments": {"x": [' + "1," * 80_000 + '1]}, "name": "f"}</tool_call>'),
    ("granite", '<tool_call>{"name": "f", "arguments": {}}</tool_call>' * 5_000),
    ("mistral", "[TOOL_CALLS]" * 20_000),
    ("deepseek_v3", "<｜tool▁calls▁begin｜>" * 20_000),
    ("qwen3_coder", "<function=f>" + "<parameter=x>y</parameter>" * 10_000 + "</function>"),
    ("glm45", "<tool_call>f" + "<arg_key>x</arg_key><arg_value>y</arg_value>" * 8_000 + "</tool_call>"),
    ("pythonic", "[f(x=[" + "1," * 80_000 + "])]"),
    ("pythonic", "[f(x=[" + "{'a': 'b'}," * 20_000 + "])]"),
    ("pythonic", "[f(x='" + "\\n" * 100_000 + "')]"),
    ("pythonic", "[" + "f(x='y'), " * 20_000 + "f()]"),
]


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("tool_parser", "text"), _LONG_ANSWERS)
def test_no_piece_of_a_long_answer_takes_long(tool_parser: str, text: str, streams: bool) -> None:
    limit_s = 0.1  # 0.015 at most on a usual machine; texts that are parsed at once take longer
    gc.disable()  # a collection of the whole process could come into any step
    try:
        assert any(_longest_step_s(tool_parser, text, streams=streams) < limit_s for _ in range(3))
    finally:
        gc.enable()


def _longest_step_s(tool_parser: str, text: str, *, streams: bool) -> float:
    parser = AnswerParser(TOOL_FORMATS[tool_parser], tools={"f": {}}, streams=streams)
    pieces = [text[at : at + PIECE_SIZE] for at in range(0, len(text), PIECE_SIZE)]
    taken_s = []
    steps: list[Callable[[], object]] = [*(partial(parser.feed, piece) for piece in pieces), parser.finish]
    for step in steps:
        started_s = time.thread_time()
        step()
        taken_s.append(time.thread_time() - started_s)
    return max(taken_s)


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


_PYTHON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("aL\"'\\\n\t\x00{}[](),:ł😀", max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text("ab'\"\n\\", max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    data=st.data(),
    values=st.dictionaries(st.sampled_from(["a", "b_1", "from"]), _PYTHON_VALUES, max_size=3),
    equals=st.sampled_from(["=", " = "]),
)
def test_pythonic_values_are_those_of_python(
    data: st.DataObject, values: dict[str, Any], equals: str
) -> None:
    text = f"[f({', '.join(f'{name}{equals}{value!r}' for name, value in values.items())})]"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert arguments_of(pieces) == json.loads(json.dumps(values))


def arguments_of(pieces: list[str]) -> Any:
    """Return the arguments of a pythonic call."""
    parser = AnswerParser(TOOL_FORMATS["pythonic"], tools={"f": {}})
    deltas = [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish()
    return json.loads("".join(delta.text for delta in deltas if isinstance(delta, CallArguments)))


@pytest.mark.parametrize(
    ("literals", "value"),
    [
        ("""x='a' "b" r'\\n'""", "ab\\n"),
        ("x='''a\n'b''c'''", "a\n'b''c"),
        ('x=""', ""),
        (r"x=u'\x41\u0142\N{BULLET}\101'", "Ał•A"),
        ("x=(1)", 1),
        ("x=(1,)", [1]),
        ("x=()", []),
        ("x=[1, (2, 3), ], ", [1, [2, 3]]),
        ("x={'a': {'b': .5, }}", {"a": {"b": 0.5}}),
        ("x=[+1, -2, 0x1F, 0b11, 0o17, 1_000]", [1, -2, 31, 3, 15, 1000]),
        ("x=[1e3, 1., -1.5E-2, True, true, None, null]", [1000.0, 1.0, -0.015, True, True, None, None]),
    ],
)
def test_pythonic_literals_are_read(literals: str, value: Any) -> None:
    assert arguments_of([f"[f({literals})]"]) == {"x": value}


@pytest.mark.parametrize(
    "arguments",
    [
        *("1", "x", "x=", "x=1 y=2", "x=1, x=2", "=1", "1x=1", "x==1", "**x", "*x", "x=1;", "x.y=1", "x=y"),
        *("x=b'a'", "x=f'a'", "x='a", "x='a\nb'", r"x='\x4'", "x='a'b", "x=[1", "x=[1}", "x=[,]", "x=[1,,]"),
        *("x={1: 2}", "x={'a'}", "x={'a': }", "x={*y}", "x=1+1", "x=1j", "x=01", "x=1__0", "x=nan"),
        *(
            "x=1e999",
            "x=g()",
            "x=a.b",
            "x=-",
            "x=--1",
            "x=...",
            "x=" + "[" * 60 + "]" * 60,
            "x=" + "1" * 2000,
        ),
        *("x=[y for y in z]", "x=lambda: 1", "x=1 if y else 2", "x=(", "x='a' 'b", "x=r", "x=# 1\n1"),
    ],
)
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
def test_other_expressions_of_python_are_content(arguments: str, streams: bool) -> None:
    text = f"[f({arguments})]"
    parsed = parse({"tool_parser": "pythonic", "reasoning_parser": None}, [text], streams=streams)
    assert (parsed.calls, parsed.content) == ([], text)


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
