"""F11: the CPU time of a streamed token with parsers of tool calls and reasoning. F12: golden answers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final

from benchmarks.frontend.prompts import model_directory
from benchmarks.frontend.saturated import alternate
from benchmarks.frontend.sides import STEP_APART, callers, our_frontend, our_workers
from benchmarks.harness.processes import REPOSITORY
from benchmarks.harness.report import Measured
from dynamo_redis.parsers.answer_parser import AnswerParser
from dynamo_redis.parsers.deltas import CallBegin, Reasoning, Text
from dynamo_redis.parsers.reasoning import REASONING_FORMATS
from dynamo_redis.parsers.tool_formats import TOOL_FORMATS

TOKENS: Final = 256
LOAD: Final = {"answer_tokens": TOKENS, "has_tools": True, "most_requests": 8000}
ON: Final = ("--tool-call-parser", "hermes", "--reasoning-parser", "basic")
OFF: Final = ("--tool-call-parser", "none", "--reasoning-parser", "none")
GOLDEN: Final = REPOSITORY / "tests" / "vectors" / "parsed_answers.json"


def on_against_off(rounds: int) -> dict[str, Measured]:
    """Measure F11, in the frontend's µs of CPU a token. All requests have tools, and all answers are text."""
    speed = ("--speedup-ratio", STEP_APART)
    with (
        model_directory() as model,
        callers(model) as caller,
        our_workers(model, *speed, *ON) as on_workers,
        our_workers(model, *speed, *OFF) as off_workers,
        our_frontend(on_workers) as on,
        our_frontend(off_workers) as off,
    ):
        taken = alternate("F11", rounds, caller, LOAD, {"on": on, "off": off})
    figures = ([1e3 * each.cpu_ms("frontend") / TOKENS for each in taken[name]] for name in ("on", "off"))
    return {"F11": Measured.against(*figures)}


def golden_answers(_: int) -> dict[str, Measured]:
    """Measure F12: the golden answers that are parsed right whole, at each split point, and character by
    character, in %; for whole responses and for streams."""
    golden = json.loads(GOLDEN.read_bytes())
    right = [
        _is_right(case, golden["tools"], streams=streams)
        for case in golden["cases"]
        for streams in (False, True)
    ]
    return {"F12": Measured.alone([100 * sum(right) / len(right)])}


def _is_right(case: dict[str, Any], tools: dict[str, Any], *, streams: bool) -> bool:
    text = case["text"]
    splits = [[text], list(text), *([text[:at], text[at:]] for at in range(len(text)))]
    wanted = case["streamed"] if streams and "streamed" in case else case
    expected = (
        wanted["content"],
        case["reasoning"],
        [(call["name"], call["arguments"]) for call in wanted["calls"]],
    )
    return all(_parsed(case, tools, pieces, streams=streams) == expected for pieces in splits)


def _parsed(
    case: dict[str, Any], tools: dict[str, Any], pieces: Iterable[str], *, streams: bool
) -> tuple[str, str, list[tuple[str, str]]]:
    parser = AnswerParser(
        TOOL_FORMATS.get(case["tool_parser"]),
        REASONING_FORMATS.get(case["reasoning_parser"]),
        starts_inside=case.get("starts_inside", False),
        tools=tools,
        most_calls=case.get("most_calls"),
        streams=streams,
    )
    deltas = [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish()
    content, reasoning = "", ""
    calls: list[tuple[str, str]] = []
    for delta in deltas:
        if isinstance(delta, Text):
            content += delta.text
        elif isinstance(delta, Reasoning):
            reasoning += delta.text
        elif isinstance(delta, CallBegin):
            calls.append((delta.name, ""))
        else:
            name, arguments = calls[delta.index]
            calls[delta.index] = name, arguments + delta.text
    return content, reasoning, calls
