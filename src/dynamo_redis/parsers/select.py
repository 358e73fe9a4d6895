"""Parsers by their names, as cards and options give them."""

from __future__ import annotations

from dynamo_redis.parsers.calls import ToolFormat
from dynamo_redis.parsers.detection import AUTO, detect_reasoning_parser, detect_tool_parser
from dynamo_redis.parsers.reasoning import REASONING_FORMATS, ReasoningFormat
from dynamo_redis.parsers.tool_formats import TOOL_FORMATS

NONE = "none"
"""The name that switches a parser off."""

TOOL_PARSERS = (AUTO, NONE, *sorted(TOOL_FORMATS))
"""The values of `--tool-call-parser`."""

REASONING_PARSERS = (AUTO, NONE, *sorted(REASONING_FORMATS))
"""The values of `--reasoning-parser`."""


def check_tool_parser(name: str) -> str:
    """Return the name of a tool parser. Raises ValueError, with the known ones."""
    return _check(name, TOOL_PARSERS)


def check_reasoning_parser(name: str) -> str:
    """Return the name of a reasoning parser. Raises ValueError, with the known ones."""
    return _check(name, REASONING_PARSERS)


def _check(name: str, known: tuple[str, ...]) -> str:
    if name not in known:
        raise ValueError(f"must be one of {', '.join(known)}")
    return name


def tool_format(name: str | None, template: str) -> ToolFormat | None:
    """Return the format of a tool parser; by the chat template for `auto` and None. Raises KeyError."""
    if name is None or name == AUTO:
        name = detect_tool_parser(template) or NONE
    return None if name == NONE else TOOL_FORMATS[name]


def reasoning_format(name: str | None, template: str) -> ReasoningFormat | None:
    """Return the format of a reasoning parser; by the chat template for `auto` and None. Raises KeyError."""
    if name is None or name == AUTO:
        name = detect_reasoning_parser(template) or NONE
    return None if name == NONE else REASONING_FORMATS[name]


def marker_texts(tool: ToolFormat | None, reasoning: ReasoningFormat | None) -> frozenset[str]:
    """Return the literals that the parsers look for: their tokens need a text, also if they are special."""
    tool_markers = () if tool is None else (*tool.begin, *tool.markers)
    reasoning_markers = () if reasoning is None else (reasoning.begin, reasoning.end)
    return frozenset((*tool_markers, *reasoning_markers))
