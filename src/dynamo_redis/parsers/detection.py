"""The parsers for a model, from its chat template: it writes the same markers into prompts as the model into
answers."""

from __future__ import annotations

from typing import Final

AUTO: Final = "auto"
"""The name that has the parser chosen by the chat template."""

_TOOLS: Final = (
    # All of these literals are in the template.
    (("<tool_call>", "<function="), "qwen3_coder"),
    (("<tool_call>", "<arg_key>"), "glm45"),
    (("<|tool_call|>",), "granite"),
    (("<tool_call>",), "hermes"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<｜tool▁calls▁begin｜>",), "deepseek_v3"),
    (("<|tool_calls_section_begin|>",), "kimi_k2"),
    (("<TOOLCALL>",), "nemotron_deci"),
    (("<tool_calls>",), "jamba"),
    (("functools[",), "phi4"),
    (("<|python_start|>",), "pythonic"),
    (("[func_name1(",), "pythonic"),
    (("<|python_tag|>",), "llama3_json"),
    (('{"name": function name, "parameters":',), "llama3_json"),
)
_REASONING: Final = (
    ("[THINK]", "mistral"),
    ("◁think▷", "kimi"),
    ("Here is my thought process", "granite"),
    ("<think>", "basic"),
    ("</think>", "basic"),
)


def detect_tool_parser(template: str) -> str | None:
    """Return the name of the tool parser that fits a chat template, or None."""
    for literals, name in _TOOLS:
        if all(literal in template for literal in literals):
            return name
    return None


def detect_reasoning_parser(template: str) -> str | None:
    """Return the name of the reasoning parser that fits a chat template, or None."""
    for literal, name in _REASONING:
        if literal in template:
            return name
    return None
