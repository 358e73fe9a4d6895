"""The formats in which families of models write tool calls, by Dynamo's names."""

from __future__ import annotations

from typing import Final

from dynamo_redis.parsers.calls import ToolFormat
from dynamo_redis.parsers.json_calls import json_format
from dynamo_redis.parsers.marked_calls import DEEPSEEK, GLM, KIMI, MISTRAL, QWEN3_CODER
from dynamo_redis.parsers.pythonic import PYTHONIC

_HERMES: Final = json_format("<tool_call>", end="</tool_call>")

TOOL_FORMATS: Final[dict[str, ToolFormat]] = {
    "deepseek_v3": DEEPSEEK.format(),
    "deepseek_v3_1": DEEPSEEK.format(),
    "default": json_format("<TOOLCALL>", "<|python_tag|>", end="</TOOLCALL>"),
    "glm45": GLM,
    "glm47": GLM,
    "granite": json_format("<|tool_call|>", "<tool_call>", end="</tool_call>"),
    "hermes": _HERMES,
    "jamba": json_format("<tool_calls>", end="</tool_calls>"),
    "kimi_k2": KIMI.format(),
    "kimi_k25": KIMI.format(),
    "llama3_json": json_format("<|python_tag|>", bare="{"),
    "mistral": MISTRAL,
    "nemotron_deci": json_format("<TOOLCALL>", end="</TOOLCALL>"),
    "nemotron_nano": QWEN3_CODER,
    "phi4": json_format("functools"),
    "pythonic": PYTHONIC,
    "qwen25": _HERMES,
    "qwen3": _HERMES,
    "qwen3_coder": QWEN3_CODER,
}
