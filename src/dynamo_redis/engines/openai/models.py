"""The answers by which an OpenAI-compatible server describes itself and its model. Pure.

`GET /v1/models` everywhere; vLLM and SGLang say there how long a model's context is (`max_model_len`). SGLang
tells its page size at `/get_server_info`, llama.cpp its context at `/props`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dynamo_redis.engines.openai.request import Dialect

_OWNERS: Final[Mapping[str, Dialect]] = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llamacpp"}

DETAILS_PATHS: Final[Mapping[Dialect, str]] = {"sglang": "/get_server_info", "llamacpp": "/props"}
"""Paths at which these servers describe themselves further."""


@dataclass(frozen=True, slots=True)
class ListedModel:
    """One entry of `/v1/models`. `context_length` is None where the server does not say it."""

    name: str
    dialect: Dialect
    context_length: int | None = None


@dataclass(frozen=True, slots=True)
class ServerDetails:
    """The sizes that a server states beyond its models; None is a size that it does not state."""

    context_length: int | None = None
    block_size: int | None = None


def read_models(content: bytes) -> list[ListedModel]:
    """Read an answer to `GET /v1/models`. Entries that are not understood are left out."""
    entries = _object(content).get("data")
    listed = (
        [_listed(entry) for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    )
    return [model for model in listed if model is not None]


def _listed(entry: Mapping[str, Any]) -> ListedModel | None:
    name, meta = entry.get("id"), entry.get("meta")
    if not isinstance(name, str) or not name:
        return None
    lengths = [entry.get("max_model_len"), meta.get("n_ctx") if isinstance(meta, dict) else None]
    return ListedModel(name, _OWNERS.get(str(entry.get("owned_by")).lower(), "openai"), _first_count(lengths))


def read_details(content: bytes) -> ServerDetails:
    """Read an answer to `DETAILS_PATHS`."""
    told = _object(content)
    settings = told.get("default_generation_settings")
    lengths = [told.get("context_length"), settings.get("n_ctx") if isinstance(settings, dict) else None]
    return ServerDetails(_first_count(lengths), _first_count([told.get("page_size")]))


def _object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _first_count(values: Sequence[object]) -> int | None:
    return next((value for value in values if type(value) is int and 0 < value < 1 << 53), None)
