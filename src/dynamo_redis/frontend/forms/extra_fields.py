"""`nvext` of a completion: more of an answer than OpenAI's fields, as Dynamo tells it on request."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any

from dynamo_redis.frontend.choices import CompletionChoice, Usage


class ExtraFields:
    """The extra fields of one response, which has one choice."""

    def __init__(self, names: Collection[str], arrived_at: float) -> None:
        """`names` are those of `nvext.extra_fields`. `arrived_at` is the time of the request's arrival, on
        `time.perf_counter`."""
        self._names = names
        self._arrived_at = arrived_at
        self._received_at = time.time() - (time.perf_counter() - arrived_at)

    def of(self, choices: Sequence[CompletionChoice], usage: Usage) -> dict[str, Any]:
        """Return the fields of an answer that is over."""
        [choice] = choices
        fields: dict[str, Any] = {}
        if "worker_id" in self._names:
            worker_id = choice.instance_id
            fields["worker_id"] = {"prefill_worker_id": worker_id, "decode_worker_id": worker_id}
        if "timing" in self._names:
            timing = {
                "request_received_ms": int(self._received_at * 1000),
                "ttft_ms": (choice.first_item_at - self._arrived_at) * 1000,
                "total_time_ms": (time.perf_counter() - self._arrived_at) * 1000,
            }
            if usage.cached_count is not None:
                timing["kv_hit_rate"] = usage.cached_count / usage.prompt_count if usage.prompt_count else 0.0
            fields["timing"] = timing
        if "stop_reason" in self._names:
            fields["stop_reason"] = choice.answer.stop_found
        return fields
