"""Completion requests to an OpenAI-compatible server, in the form of each kind of server. Pure.

The prompt is sent as token ids, which vLLM, SGLang and llama.cpp take as `prompt`. Each option of a request
is sent under the server's name for it, or refused with its name; none is dropped silently. Sources: the
request classes of vLLM (`entrypoints/openai`) and SGLang (`entrypoints/openai/protocol.py`), and the README
of llama.cpp's server.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from dynamo_redis.errors import InvalidRequest
from dynamo_redis.models.llm_protocol import GUIDED_BY

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

_NAMES: Final[Mapping[Dialect, frozenset[str]]] = {
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
"""The options of each kind of server."""

_RENAMED: Final[Mapping[Dialect, Mapping[str, str]]] = {
    "vllm": {"max_thinking_tokens": "thinking_token_budget"},
    "sglang": {"include_stop_str_in_output": "no_stop_trim"},
    "llamacpp": {"repetition_penalty": "repeat_penalty"},
}

_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
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


def completion_body(
    request: Mapping[str, Any],
    *,
    model: str,
    dialect: Dialect,
    prompt: Sequence[int] | str,
    dp_rank: int | None,
    token_room: int | None = None,
) -> dict[str, Any]:
    """Return the body for `POST /v1/completions`. Raises InvalidRequest for an option without an equivalent.

    Args:
        request: a `GenerateRequest`.
        model: the server's name for the model.
        dialect: the kind of server.
        prompt: the prompt as token ids, or as text.
        dp_rank: the data-parallel rank that has to answer; None: the engine chooses.
        token_room: the number of tokens that the engine's context leaves for an answer; None: unknown. It is
            sent for a request without `max_tokens`, for which servers would generate 16 tokens only.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    stop = dict(_options(request, "stop_conditions"))
    hidden = stop.pop("stop_token_ids_hidden", None)
    if hidden:
        stop["stop_token_ids"] = [*(stop.get("stop_token_ids") or ()), *hidden]
    options = {**_options(request, "sampling_options"), **stop}
    wanted = {name: value for name, value in options.items() if value is not None and value != []}
    guided = wanted.pop("guided_decoding", None)
    for name, value in wanted.items():
        if name in _NAMES[dialect]:
            body[_RENAMED.get(dialect, {}).get(name, name)] = value
        elif value not in _NEUTRAL.get(name, ()):
            raise _unknown(name, dialect)
    if guided:
        if not isinstance(guided, Mapping):
            raise InvalidRequest(f"guided_decoding must be an object, not {type(guided).__name__}")
        body |= _guided(guided, dialect)
    if "max_tokens" not in body and token_room is not None:
        # SGLang refuses an answer that would fill its context to the last token.
        body["max_tokens"] = max(1, token_room - (dialect == "sglang"))
    if dialect == "llamacpp":
        body["cache_prompt"] = True
    elif dialect != "openai":
        body["return_token_ids"] = True
    if dialect == "sglang" and dp_rank is not None:
        body["data_parallel_rank"] = dp_rank
    return body


def _options(request: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = request.get(name) or {}
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{name} must be an object, not {type(value).__name__}")
    return value


def _unknown(name: str, dialect: Dialect) -> InvalidRequest:
    hint = "; if it does, set DYN_ENGINE_KIND to the kind of server" if dialect == "openai" else ""
    return InvalidRequest(f"{name}: the engine behind this worker ({dialect}) does not know it{hint}")


def prompt_ids(request: Mapping[str, Any]) -> list[int]:
    """Return the prompt. Raises InvalidRequest if it is not token ids."""
    token_ids = request.get("token_ids")
    if not isinstance(token_ids, list) or not token_ids or not all(type(token) is int for token in token_ids):
        raise InvalidRequest("token_ids must be a non-empty list of token ids")
    return token_ids


def hidden_stop_ids(request: Mapping[str, Any]) -> frozenset[int]:
    """Return the tokens that end an answer and are no part of it. Raises InvalidRequest."""
    stop = _options(request, "stop_conditions")
    eos = [] if stop.get("ignore_eos") else request.get("eos_token_ids") or []
    try:
        return frozenset(eos) | frozenset(stop.get("stop_token_ids_hidden") or [])
    except TypeError as exc:
        raise InvalidRequest(f"stop token ids are not a list of token ids: {exc}") from exc


def wanted_rank(request: Mapping[str, Any], rank_count: int) -> int | None:
    """Return the data-parallel rank that a router chose; None: the engine chooses. Raises InvalidRequest."""
    wanted = request.get("dp_rank")
    if wanted is None or rank_count == 1:
        return None
    if type(wanted) is not int or not 0 <= wanted < rank_count:
        raise InvalidRequest(f"dp_rank={wanted!r} must be one of 0 to {rank_count - 1}")
    return wanted


def token_limit(request: Mapping[str, Any]) -> int | None:
    """Return the most tokens of the answer; None without a limit in the request."""
    limit = _options(request, "stop_conditions").get("max_tokens")
    return limit if type(limit) is int else None


# --------------------------------------------------------------------------- guided decoding


def _guided(guided: Mapping[str, Any], dialect: Dialect) -> dict[str, Any]:
    """Return the fields that guide an answer by a schema, an expression, a choice or a grammar.

    Raises InvalidRequest for a kind of guide that the server does not have.
    """
    given = {name: value for name, value in guided.items() if value is not None}
    if isinstance(given.get("structural_tag"), Mapping):
        given["structural_tag"] = json.dumps(given["structural_tag"])
    if dialect == "vllm":
        # Releases before 0.11 read the second form only, later ones the first; each ignores the other.
        return {"structured_outputs": given} | {f"guided_{name}": value for name, value in given.items()}
    fields: dict[str, Any] = {}
    for name, value in given.items():
        match dialect, name:
            case "sglang", "json":
                fields["json_schema"] = value if isinstance(value, str) else json.dumps(value)
            case "sglang", "regex" | "structural_tag":
                fields[name] = value
            case "sglang", "grammar":
                fields["ebnf"] = value
            case "sglang", "choice":
                fields["regex"] = "(" + "|".join(re.escape(choice) for choice in _texts(value)) + ")"
            case "llamacpp", "json":
                fields["json_schema"] = json.loads(value) if isinstance(value, str) else value
            case "llamacpp", "grammar":
                fields["grammar"] = value
            case "llamacpp", "choice":
                fields["grammar"] = "root ::= " + " | ".join(json.dumps(text) for text in _texts(value))
            case _:
                raise _unknown(f"guided_decoding.{name} ({GUIDED_BY})", dialect)
    return fields


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise InvalidRequest("guided_decoding.choice must be a non-empty list of strings")
    return value
