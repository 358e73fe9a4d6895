"""Requests of split stages: the names of `dynamo.common.backend.disagg`. Pure.

Workers here handle all stages, so a request has no `prefill_result`. Engines call these functions also where
there is nothing to do.
"""

from __future__ import annotations

from typing import Any

from dynamo_redis.common.backend.engine import GenerateRequest
from dynamo_redis.common.constants import DisaggregationMode


def enforce_prefill_max_tokens(request: GenerateRequest) -> GenerateRequest:
    """Set the request's `max_tokens` to 1, and return it."""
    request.setdefault("stop_conditions", {})["max_tokens"] = 1
    return request


def extract_prefill_result(request: GenerateRequest) -> dict[str, Any] | None:
    """Return the request's `prefill_result`, or None."""
    return request.get("prefill_result")


def require_prefill_result(request: GenerateRequest, mode: DisaggregationMode) -> dict[str, Any]:
    """Return the request's `prefill_result`. Raises ValueError without one."""
    result = extract_prefill_result(request)
    if result is None:
        raise ValueError(f"a {mode.value} worker got a request without prefill_result")
    return result
