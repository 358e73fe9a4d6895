"""The kinds of OpenAI-compatible servers, and the options that each of them has. Pure.

Sources: the request classes of vLLM (`entrypoints/openai`) and SGLang (`entrypoints/openai/protocol.py`), and
the README of llama.cpp's server.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from dynamo_redis.errors import InvalidRequest

Dialect = Literal["vllm", "sglang", "llamacpp", "openai"]
"""The kind of server; `openai` for any other, which gets only OpenAI's own options."""

_STANDARD: Final = (
    "max_tokens",
    "stop",
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "logit_bias",
)
_SHARED: Final = (*_STANDARD, "top_k", "min_p", "repetition_penalty", "ignore_eos")
_BY_IDS: Final = ("min_tokens", "stop_token_ids", "skip_special_tokens", "spaces_between_special_tokens")

OPTION_NAMES: Final[Mapping[Dialect, frozenset[str]]] = {
    "openai": frozenset(_STANDARD),
    "vllm": frozenset(
        {
            *_SHARED,
            *_BY_IDS,
            "length_penalty",
            "include_stop_str_in_output",
            "allowed_token_ids",
            "bad_words",
            "max_thinking_tokens",
            "truncate_prompt_tokens",
            "vllm_xargs",
        }
    ),
    "sglang": frozenset({*_SHARED, *_BY_IDS, "include_stop_str_in_output"}),
    "llamacpp": frozenset(
        {
            *_SHARED,
            "typical_p",
            "top_n_sigma",
            "repeat_last_n",
            "dynatemp_range",
            "dynatemp_exponent",
            "xtc_probability",
            "xtc_threshold",
            "dry_multiplier",
            "dry_base",
            "dry_allowed_length",
            "dry_penalty_last_n",
            "dry_sequence_breakers",
            "mirostat",
            "mirostat_tau",
            "mirostat_eta",
            "min_keep",
            "samplers",
        }
    ),
}
"""The options of each kind of server, by their names in a request."""

CHAT_NAMES: Final[Mapping[Dialect, frozenset[str]]] = {
    "openai": frozenset({"messages", "tools"}),
    "vllm": frozenset(
        {
            "messages",
            "tools",
            "documents",
            "add_generation_prompt",
            "continue_final_message",
            "add_special_tokens",
            "chat_template_kwargs",
        }
    ),
    "sglang": frozenset({"messages", "tools", "continue_final_message", "chat_template_kwargs"}),
    "llamacpp": frozenset({"messages", "tools", "add_generation_prompt", "chat_template_kwargs"}),
}
"""The fields of a chat that each kind of server has."""

RAW_ANSWER: Final[Mapping[Dialect, Mapping[str, Any]]] = {
    "sglang": {"separate_reasoning": False},
    "llamacpp": {"reasoning_format": "none", "parse_tool_calls": False},
}
"""Options by which a server leaves reasoning and tool calls in the text of an answer to a chat."""

RENAMED: Final[Mapping[Dialect, Mapping[str, str]]] = {
    "vllm": {"max_thinking_tokens": "thinking_token_budget"},
    "sglang": {"include_stop_str_in_output": "no_stop_trim"},
    "llamacpp": {"repetition_penalty": "repeat_penalty"},
}
"""Names of options that a kind of server has in place of those of a request."""

NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "n": (1,),
    "best_of": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "use_beam_search": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
}
"""Values that are every server's default behaviour."""


def unknown_option(name: str, dialect: Dialect) -> InvalidRequest:
    """Return the error for an option that servers of this kind do not have."""
    hint = "; if it does, set DYN_ENGINE_KIND to the kind of server" if dialect == "openai" else ""
    return InvalidRequest(f"{name}: the engine behind this worker ({dialect}) does not know it{hint}")
