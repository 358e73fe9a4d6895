"""The tokens of an answer's reasoning."""

from __future__ import annotations

import pytest

from dynamo_redis.frontend.reasoning_tokens import ReasoningTokens
from dynamo_redis.parsers.answer_parser import AnswerParser
from dynamo_redis.parsers.deltas import Reasoning
from dynamo_redis.parsers.reasoning import ReasoningFormat

MARKERS = ReasoningFormat("<think>", "</think>")


def letter(token_id: int) -> bytes:
    return bytes([token_id])


def counted(text: str, *, starts_inside: bool = False, other: str = "", size: int = 1) -> int:
    """Return the count for a text whose tokens are its bytes, given in items of a size."""
    tokens = list(text.encode())
    counter = ReasoningTokens(MARKERS, letter, starts_inside=starts_inside, other=other)
    for start in range(0, len(tokens), size):
        counter.feed(tokens[start : start + size])
    return counter.count


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("reasoning", "rest", "starts_inside"),
    [
        ("<think>it is cold</think>", "yes", False),
        ("\n <think></think>", "yes", False),
        ("\u3000\u00a0\u2028<think>it is cold</think>", "yes", False),
        ("\u3000", "", True),
        ("<think>never ends", "", False),
        ("<think>a < b </thin </think>", "</think>", False),
        ("it is cold</think>", "yes <think>no</think>", True),
        ("<think>grüße</think>", "", True),
        ("<thi", "", True),
        ("", "yes <think>no</think>", False),
        ("", "<thinking>", False),
        ("", "<thi", False),
        ("", "", True),
    ],
)
def test_reasoning_ends_with_its_marker(reasoning: str, rest: str, starts_inside: bool, size: int) -> None:
    text = reasoning + rest
    assert counted(text, starts_inside=starts_inside, size=size) == len(reasoning.encode())
    parser = AnswerParser(None, MARKERS, starts_inside=starts_inside)
    parts = [*parser.feed(text), *parser.finish()]
    thought = "".join(part.text for part in parts if isinstance(part, Reasoning))
    assert thought == reasoning.lstrip().removeprefix(MARKERS.begin).removesuffix(MARKERS.end)


@pytest.mark.parametrize(
    "text",
    [" " * 50_000, "\u3000" * 20_000, "<think>" + "thought " * 10_000, "no thought " * 5_000],
    ids=["spaces", "wide spaces", "long thought", "none"],
)
def test_counter_holds_no_more_than_a_marker(text: str) -> None:
    """Else each token would cost more than the one before it."""
    counter = ReasoningTokens(MARKERS, letter)
    for byte in text.encode():
        counter.feed([byte])
        assert len(counter._text) <= len(MARKERS.end)


def test_answer_that_has_to_be_a_call_has_none() -> None:
    assert counted(' {"a": 1}', starts_inside=True, other="{[") == 0


def test_restarted_answer_is_counted_anew() -> None:
    counter = ReasoningTokens(MARKERS, letter)
    counter.feed(b"<think>x</think>y")
    counter.restart()
    assert counter.count == 0
    counter.feed(b"<think>xyz")
    assert counter.count == 10
