"""Requests to an OpenAI-compatible server: a completion, in each kind of server's own words. Pure.

The prompt goes as token ids, which vLLM, SGLang and llama.cpp take as `prompt`. What a request asks for is
passed on under the server's own name for it, or refused by name: nothing is left out in silence. Sources:
the request classes of vLLM (`entrypoints/openai`) and SGLang (`entrypoints/openai/protocol.py`), and the
README of llama.cpp's server.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from dynamo_redis.errors import InvalidRequest
from dynamo_redis.models.llm_protocol import GUIDED_BY

Dialect = Literal["vllm", "sglang", "llamacpp", "openai"]
"""The kind of server; `openai` for any other, of which only the standard is expected."""

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
"""The options that each kind of server knows."""

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
"""Values that ask for what every server does anyway."""


def completion_body(
    request: Mapping[str, Any],
    *,
    model: str,
    dialect: Dialect,
    prompt: Sequence[int] | str,
    dp_rank: int | None,
    token_room: int | None = None,
) -> dict[str, Any]:
    """Return the body for `POST /v1/completions`. Raises InvalidRequest for what that server does not know.

    `token_room` is how many tokens the engine's own context leaves for an answer, or None if it does not say:
    then a request without `max_tokens` leaves the limit to the engine. Where it is known it is sent, since
    servers take a completion without a limit for one of 16 tokens.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    wanted = _wanted(request)
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


def _wanted(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a request asks for, by OpenAI's names; absent and null are the same."""
    stop = dict(_options(request, "stop_conditions"))
    hidden = stop.pop("stop_token_ids_hidden", None)
    if hidden:
        stop["stop_token_ids"] = [*(stop.get("stop_token_ids") or ()), *hidden]
    options = {**_options(request, "sampling_options"), **stop}
    return {name: value for name, value in options.items() if value is not None and value != []}


def _options(request: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = request.get(name) or {}
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{name} must be an object, not {type(value).__name__}")
    return value


def _unknown(name: str, dialect: Dialect) -> InvalidRequest:
    hint = "; if it does, say whose server it is with DYN_ENGINE_KIND" if dialect == "openai" else ""
    return InvalidRequest(f"{name}: the engine behind this worker ({dialect}) does not know it{hint}")


def prompt_ids(request: Mapping[str, Any]) -> list[int]:
    """Return the prompt. Raises InvalidRequest if it is not token ids."""
    token_ids = request.get("token_ids")
    if not isinstance(token_ids, list) or not token_ids or not all(type(token) is int for token in token_ids):
        raise InvalidRequest("token_ids must be a non-empty list of token ids")
    return token_ids


def hidden_stop_ids(request: Mapping[str, Any]) -> frozenset[int]:
    """Return the tokens that end an answer and are not part of it."""
    stop = _options(request, "stop_conditions")
    eos = [] if stop.get("ignore_eos") else request.get("eos_token_ids") or []
    try:
        return frozenset(eos) | frozenset(stop.get("stop_token_ids_hidden") or [])
    except TypeError as exc:
        raise InvalidRequest(f"stop token ids are not a list of token ids: {exc}") from exc


def token_limit(request: Mapping[str, Any]) -> int | None:
    """Return the most tokens that the answer may have, if the request says so."""
    limit = _options(request, "stop_conditions").get("max_tokens")
    return limit if type(limit) is int else None


# --------------------------------------------------------------------------- guided decoding


def _guided(guided: Mapping[str, Any], dialect: Dialect) -> dict[str, Any]:
    """Return the fields that make an answer follow a schema, an expression, a choice or a grammar."""
    given = {name: value for name, value in guided.items() if value is not None}
    if isinstance(given.get("structural_tag"), Mapping):
        given["structural_tag"] = json.dumps(given["structural_tag"])
    if dialect == "vllm":
        # Releases before 0.11 know the second form alone, later ones the first; each leaves the other out.
        return {"structured_outputs": given} | {f"guided_{name}": value for name, value in given.items()}
    fields: dict[str, Any] = {}
    for name, value in given.items():
        fields |= _guide(name, value, dialect)
    return fields


def _guide(name: str, value: Any, dialect: Dialect) -> dict[str, Any]:
    match dialect, name:
        case "sglang", "json":
            return {"json_schema": value if isinstance(value, str) else json.dumps(value)}
        case "sglang", "regex" | "structural_tag":
            return {name: value}
        case "sglang", "grammar":
            return {"ebnf": value}
        case "sglang", "choice":
            return {"regex": "(" + "|".join(re.escape(choice) for choice in _texts(value)) + ")"}
        case "llamacpp", "json":
            return {"json_schema": json.loads(value) if isinstance(value, str) else value}
        case "llamacpp", "grammar":
            return {"grammar": value}
        case "llamacpp", "choice":
            return {"grammar": "root ::= " + " | ".join(json.dumps(text) for text in _texts(value))}
    raise _unknown(f"guided_decoding.{name} ({GUIDED_BY})", dialect)


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise InvalidRequest("guided_decoding.choice must be a non-empty list of strings")
    return value
