"""How much of an answer a parser withholds. Beyond that the text is content."""

from __future__ import annotations

import pytest

from dynamo_redis.parsers.answer_parser import PIECE_SIZE, AnswerParser
from dynamo_redis.parsers.deltas import CallBegin, Delta, Reasoning, Text
from dynamo_redis.parsers.json_text import MOST_HELD
from dynamo_redis.parsers.reader import MOST_SKIPPED
from dynamo_redis.parsers.reasoning import ReasoningFormat
from dynamo_redis.parsers.tool_formats import TOOL_FORMATS

LONG = 4 * MOST_HELD
THINK = ReasoningFormat("<think>", "</think>")


def parsed(parser: AnswerParser, text: str) -> tuple[list[Delta], int]:
    """Return the deltas of a text, and the most characters that were held."""
    found: list[Delta] = []
    most_held = 0
    for start in range(0, len(text), PIECE_SIZE):
        found += parser.feed(text[start : start + PIECE_SIZE])
        most_held = max(most_held, len(parser._reader.buffer))
    return found + parser.finish(), most_held


def content(deltas: list[Delta]) -> str:
    assert not [delta for delta in deltas if isinstance(delta, CallBegin)]
    return "".join(delta.text for delta in deltas if isinstance(delta, Text))


@pytest.mark.parametrize(
    "value",
    [
        f"'{'x' * LONG}'",
        "'" + r"\n" * (LONG // 2) + "'",
        "'' " * (LONG // 3),
        f"'''{chr(34) * LONG}'''",
        " " * LONG + "1",
        "[" + "1, " * (LONG // 3) + "]",
    ],
    ids=["text", "escapes", "empty strings", "quotes", "white space", "items"],
)
def test_pythonic_call_has_a_longest_length(value: str) -> None:
    text = f"[f(a={value})]"
    parser = AnswerParser(TOOL_FORMATS["pythonic"], tools={"f": {}})
    deltas, most_held = parsed(parser, text)
    assert content(deltas) == text
    assert most_held <= MOST_HELD + MOST_SKIPPED + 2 * PIECE_SIZE


@pytest.mark.parametrize(("depth", "is_call"), [(50, True), (51, False)])
def test_pythonic_values_have_a_largest_depth(depth: int, is_call: bool) -> None:
    text = f"[f(a={'[' * (depth - 1)}1{']' * (depth - 1)})]"
    parser = AnswerParser(TOOL_FORMATS["pythonic"], tools={"f": {}})
    deltas, _ = parsed(parser, text)
    assert any(isinstance(delta, CallBegin) for delta in deltas) is is_call
    if not is_call:
        assert content(deltas) == text


@pytest.mark.parametrize("name", [None, *sorted(TOOL_FORMATS)])
@pytest.mark.parametrize("reasoning", [None, THINK])
def test_leading_white_space_is_held_up_to_a_length(
    name: str | None, reasoning: ReasoningFormat | None
) -> None:
    parser = AnswerParser(None if name is None else TOOL_FORMATS[name], reasoning, tools={"f": {}})
    text = " " * LONG + "yes"
    deltas, most_held = parsed(parser, text)
    assert "".join(delta.text for delta in deltas if isinstance(delta, Text | Reasoning)) == text
    assert most_held <= 4 * MOST_SKIPPED + 2 * PIECE_SIZE
