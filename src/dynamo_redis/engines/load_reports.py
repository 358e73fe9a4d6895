"""An engine's load in the form of Dynamo's events, for routers and planners."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

from dynamo_redis.engines.base import Engine, EngineLoad, ForwardPass
from dynamo_redis.events.load_publisher import INTERVAL_S, LoadPublisher
from dynamo_redis.wire.topics import FORWARD_PASS_METRICS, KV_METRICS


def kv_metrics(load: EngineLoad, slot_count: int | None) -> dict[str, Any]:
    """Return the `kv_metrics` event of a rank; `slot_count` is the most requests that it runs at once.

    Unknown values are left out: a 0 would replace the blocks that routers have booked.
    """
    used_part = None
    if load.active_blocks is not None:
        used_part = load.active_blocks / load.total_blocks if load.total_blocks else 0.0
    return {
        "worker_stats": _without_none(
            data_parallel_rank=load.dp_rank,
            request_active_slots=load.running_count,
            request_total_slots=slot_count,
            num_requests_waiting=load.waiting_count,
        ),
        "kv_stats": _without_none(
            kv_total_blocks=load.total_blocks,
            gpu_prefix_cache_hit_rate=load.prefix_hit_rate or 0.0,
            kv_active_blocks=load.active_blocks,
            gpu_cache_usage_perc=used_part,
        ),
    }


def _without_none(**stats: float | None) -> dict[str, float]:
    return {name: value for name, value in stats.items() if value is not None}


def forward_pass_metrics(dp_rank: int, forward_pass: ForwardPass) -> dict[str, Any]:
    """Return the `forward_pass_metrics` event of a rank; `wall_time` is in seconds."""
    return {
        "dp_rank": dp_rank,
        "counter_id": forward_pass.number,
        "wall_time": forward_pass.duration_s,
        "scheduled_requests": {
            "num_prefill_requests": forward_pass.prefill_request_count,
            "sum_prefill_tokens": forward_pass.prefill_token_count,
            "num_decode_requests": forward_pass.decode_request_count,
        },
        "queued_requests": {
            "num_prefill_requests": forward_pass.waiting_request_count,
            "sum_prefill_tokens": forward_pass.waiting_token_count,
        },
    }


def load_metrics(engine: Engine) -> Callable[[Any], AsyncGenerator[dict[str, Any], None]]:
    """Return the handler of `load_metrics`: one item a rank, its KV metrics with `forward_pass`, or None."""

    async def answer(_: Any) -> AsyncGenerator[dict[str, Any], None]:
        slot_count = engine.capacity.max_num_seqs
        for load in engine.loads():
            last_pass = load.last_pass
            forward_pass = None if last_pass is None else forward_pass_metrics(load.dp_rank, last_pass)
            yield kv_metrics(load, slot_count) | {"forward_pass": forward_pass}

    return answer


async def report_load(engine: Engine, publisher: LoadPublisher) -> None:
    """Publish the engine's load every `INTERVAL_S`. Runs until cancelled."""
    slot_count = engine.capacity.max_num_seqs
    published: set[int] = set()
    while True:
        loads = engine.loads()
        ranks = {load.dp_rank for load in loads}
        for dp_rank in published - ranks:  # the engine reports no load of it any more
            publisher.forget(dp_rank)
        published = ranks
        for load in loads:
            publisher.set_value(KV_METRICS, load.dp_rank, kv_metrics(load, slot_count))
            if load.last_pass is not None:
                publisher.set_value(
                    FORWARD_PASS_METRICS, load.dp_rank, forward_pass_metrics(load.dp_rank, load.last_pass)
                )
        await asyncio.sleep(INTERVAL_S)
