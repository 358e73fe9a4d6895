"""Completion requests to an OpenAI-compatible server, in the form of each kind of server. Pure.

The prompt is sent as token ids, which vLLM, SGLang and llama.cpp take as `prompt`. Each option of a request
is sent under the server's name for it, or refused with its name; none is dropped silently.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from dynamo_redis.engines.openai.dialects import (
    CHAT_NAMES,
    NEUTRAL,
    OPTION_NAMES,
    RAW_ANSWER,
    RENAMED,
    Dialect,
    unknown_option,
)
from dynamo_redis.engines.openai.guided import guided_fields
from dynamo_redis.errors import InvalidRequest

_CACHE_FIELDS: Final[Mapping[Dialect, tuple[str, ...]]] = {
    "vllm": ("cache_salt", "priority"),
    "sglang": ("cache_salt", "priority"),
}


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
        if name in OPTION_NAMES[dialect]:
            body[RENAMED.get(dialect, {}).get(name, name)] = value
        elif value not in NEUTRAL.get(name, ()):
            raise unknown_option(name, dialect)
    if guided:
        if not isinstance(guided, Mapping):
            raise InvalidRequest(f"guided_decoding must be an object, not {type(guided).__name__}")
        body |= guided_fields(guided, dialect)
    body |= _output_fields(_options(request, "output_options"), dialect)
    body |= _cache_fields(request, dialect)
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


def chat_completion_body(
    request: Mapping[str, Any], *, model: str, dialect: Dialect, dp_rank: int | None
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the body for `POST /v1/chat/completions`, and further fields of it as JSON.

    The answer shall be the model's own text, since frontends find reasoning and tool calls in it. Raises
    InvalidRequest for an option without an equivalent.
    """
    chat = request["chat"]
    if not isinstance(chat, dict) or not all(type(value) is bytes for value in chat.values()):
        raise InvalidRequest("chat must be a map of JSON values as bytes")
    if "messages" not in chat:
        raise InvalidRequest("chat has no messages")
    if chat.get("continue_final_message") and dialect == "sglang":  # implied there
        chat = {name: value for name, value in chat.items() if name != "add_generation_prompt"}
    for name in chat:
        if name not in CHAT_NAMES[dialect]:
            raise unknown_option(name, dialect)
    body = completion_body(request, model=model, dialect=dialect, prompt=[], dp_rank=dp_rank)
    del body["prompt"]
    if "logprobs" in body:
        body |= {"logprobs": True, "top_logprobs": body["logprobs"]}
    if dialect != "vllm" and "json_schema" in body:
        schema = body.pop("json_schema")
        schema = json.loads(schema) if isinstance(schema, str) else schema
        described = {"name": "answer", "schema": schema}
        body["response_format"] = {"type": "json_schema", "json_schema": described}
    if dialect == "vllm" and "tools" in chat:
        body["tool_choice"] = "none"  # the template shows the tools, and no parser reads the answer
    return {**body, **RAW_ANSWER.get(dialect, {})}, chat


def _output_fields(output: Mapping[str, Any], dialect: Dialect) -> dict[str, Any]:
    """Return the fields for log probabilities. Raises InvalidRequest for servers that name no token ids."""
    logprobs = output.get("logprobs")
    if logprobs is None:
        return {}
    if dialect != "vllm":
        raise unknown_option("logprobs", dialect)
    return {"logprobs": logprobs, "return_tokens_as_token_ids": True}


def _cache_fields(request: Mapping[str, Any], dialect: Dialect) -> dict[str, Any]:
    """Return the fields for cache and scheduler. Raises InvalidRequest for servers without them."""
    fields = {name: request[name] for name in ("cache_salt", "priority") if request.get(name)}
    for name in fields:
        if name not in _CACHE_FIELDS.get(dialect, ()):
            raise unknown_option(name, dialect)
    return fields


def _options(request: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = request.get(name) or {}
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{name} must be an object, not {type(value).__name__}")
    return value


def prompt_ids(request: Mapping[str, Any]) -> list[int]:
    """Return the prompt. Raises InvalidRequest if it is not token ids."""
    token_ids = request.get("token_ids")
    if not isinstance(token_ids, list) or set(map(type, token_ids)) != {int}:
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
