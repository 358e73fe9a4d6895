"""Requests by which idle engines are checked: the names of `dynamo.common.backend.health_check`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynamo_redis.config import UnifiedBackendSettings
from dynamo_redis.errors import ConfigError

HEALTH_CHECK_KEY = "_HEALTH_CHECK"
"""The key that marks a check among requests."""


def is_probe(request: Mapping[str, Any]) -> bool:
    """Return whether a request is a check."""
    return request.get(HEALTH_CHECK_KEY) is True


def build_health_check_payload(bos_token_id: int, *, extras: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a check of one token, with `extras`; `DYN_HEALTH_CHECK_PAYLOAD`, JSON or `@` and a path,
    replaces it. Raises ConfigError if that is no JSON object."""
    payload: dict[str, Any] = {
        "token_ids": [bos_token_id],
        "stop_conditions": {"max_tokens": 1, "ignore_eos": True},
        "sampling_options": {"temperature": 0.0},
    }
    given = parse_health_check_payload_cli(UnifiedBackendSettings.load().health_check_payload)
    return given or payload | (extras or {}) | {HEALTH_CHECK_KEY: True}


def bos_token_id_or(tokenizer: Any, default: int = 1) -> int:
    """Return the `bos_token_id` of a tokenizer, or of the tokenizer in it; `default` without one."""
    for one in (tokenizer, getattr(tokenizer, "tokenizer", None)):
        if (found := getattr(one, "bos_token_id", None)) is not None:
            return int(found)
    return default


def parse_health_check_payload_cli(value: str | None) -> dict[str, Any] | None:
    """Return the check of a `--health-check-payload`: JSON, or `@` and the path of a file; None for no value.

    Raises ConfigError if it is no JSON object.
    """
    if not value:
        return None
    try:
        text = Path(value[1:]).read_text(encoding="utf-8") if value.startswith("@") else value
        payload = json.loads(text)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"health check payload {value!r}: {exc}") from exc
    if not isinstance(payload, dict):
        raise ConfigError(f"health check payload {value!r} must be a JSON object")
    return payload | {HEALTH_CHECK_KEY: True}
