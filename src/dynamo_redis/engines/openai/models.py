"""Parsers of an OpenAI-compatible server's descriptions of itself and its model. Pure.

Every server has `GET /v1/models`; that of vLLM and SGLang has the model's context length (`max_model_len`).
SGLang has its page size at `/server_info`, which older versions call `/get_server_info`; llama.cpp its
context length at `/props`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dynamo_redis.engines.openai.dialects import Dialect

_OWNERS: Final[Mapping[str, Dialect]] = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llamacpp"}

DETAILS_PATHS: Final[Mapping[Dialect, Sequence[str]]] = {
    "sglang": ("/server_info", "/get_server_info"),
    "llamacpp": ("/props",),
}
"""Paths at which these servers report more sizes; the first that the server has."""


@dataclass(frozen=True, slots=True)
class ListedModel:
    """One entry of `/v1/models`. `context_length` is None if the server does not report it."""

    name: str
    dialect: Dialect
    context_length: int | None = None


@dataclass(frozen=True, slots=True)
class ServerDetails:
    """The sizes of `DETAILS_PATHS`; a size that the server does not report is None."""

    context_length: int | None = None
    block_size: int | None = None


def read_models(content: bytes) -> list[ListedModel]:
    """Return the models of an answer to `GET /v1/models`. Invalid entries are left out."""
    entries = _object(content).get("data")
    listed = []
    for entry in entries if isinstance(entries, list) else ():
        name = entry.get("id") if isinstance(entry, dict) else None
        if isinstance(name, str) and name:
            dialect = _OWNERS.get(str(entry.get("owned_by")).lower(), "openai")
            meta = entry.get("meta")
            lengths = [entry.get("max_model_len"), meta.get("n_ctx") if isinstance(meta, dict) else None]
            listed.append(ListedModel(name, dialect, _first_count(lengths)))
    return listed


def read_details(content: bytes) -> ServerDetails:
    """Return the sizes of an answer to a request to one of `DETAILS_PATHS`."""
    details = _object(content)
    settings = details.get("default_generation_settings")
    lengths = [details.get("context_length"), settings.get("n_ctx") if isinstance(settings, dict) else None]
    events = details.get("kv_events")  # of newer SGLang: pages that are spread over ranks are larger blocks
    sizes = [events.get("block_size") if isinstance(events, dict) else None, details.get("page_size")]
    return ServerDetails(_first_count(lengths), _first_count(sizes))


def _object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _first_count(values: Sequence[object]) -> int | None:
    return next((value for value in values if type(value) is int and 0 < value < 1 << 53), None)
