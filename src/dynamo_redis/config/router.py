"""Settings of the KV-aware router."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dynamo_redis.config.base import Duration, SettingsGroup, setting

_Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class RouterSettings(SettingsGroup):
    """The KV-aware router: what it knows, and how it weighs. The cost is explained in docs/router.md."""

    kv_cache_block_size: Annotated[int, Field(ge=1, le=4096)] | None = setting(
        "DYN_KV_CACHE_BLOCK_SIZE",
        None,
        "Tokens in a block of the workers' KV caches. Unset: what the first worker says, and 16 until then.",
        unit="tokens",
    )
    kv_overlap_score_weight: _Weight = setting(
        "DYN_KV_OVERLAP_SCORE_WEIGHT",
        1.0,
        "Credit for a block of the prompt that a worker holds on its device; 0 looks at load alone.",
    )
    router_host_cache_hit_weight: _Weight = setting(
        "DYN_ROUTER_HOST_CACHE_HIT_WEIGHT", 0.75, "The same for a block that it holds in its host's memory."
    )
    router_disk_cache_hit_weight: _Weight = setting(
        "DYN_ROUTER_DISK_CACHE_HIT_WEIGHT", 0.25, "The same for a block that it holds on disk."
    )
    router_prefill_load_scale: _Weight = setting(
        "DYN_ROUTER_PREFILL_LOAD_SCALE",
        1.0,
        "What a block of prompt still to be read counts, against a block that a running request holds.",
    )
    router_temperature: _Weight = setting(
        "DYN_ROUTER_TEMPERATURE", 0.0, "0 takes the lowest cost; above, workers are drawn by softmax."
    )
    use_kv_events: bool = setting(
        "DYN_KV_EVENTS",
        True,
        "Follow the workers' KV events; without, predict from the router's own decisions.",
    )
    router_replica_sync: bool = setting(
        "DYN_ROUTER_REPLICA_SYNC", True, "Tell other routers of the requests under way, and hear of theirs."
    )
    router_snapshot_threshold: Annotated[int, Field(ge=1)] = setting(
        "DYN_ROUTER_SNAPSHOT_THRESHOLD",
        100_000,
        "Events in the stream after which the index is stored and the stream trimmed.",
        unit="events",
    )
    router_reset_states: bool = setting(
        "DYN_ROUTER_RESET_STATES",
        False,
        "At start forget snapshot and stream, and learn anew from the workers.",
    )
    router_ttl_s: Annotated[Duration, Field(gt=0)] = setting(
        "DYN_ROUTER_TTL_SECS", 120.0, "Without KV events: how long a predicted block counts.", unit="s"
    )
    router_max_tree_size: Annotated[int, Field(ge=1000)] = setting(
        "DYN_ROUTER_MAX_TREE_SIZE",
        4_194_304,
        "Most blocks in the index; past that the oldest are forgotten.",
        unit="blocks",
    )
    router_prune_target_ratio: Annotated[float, Field(gt=0, le=1)] = setting(
        "DYN_ROUTER_PRUNE_TARGET_RATIO", 0.8, "What part of that is kept when blocks are forgotten."
    )
    active_decode_blocks_threshold: Annotated[float, Field(gt=0, le=1)] | None = setting(
        "DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD",
        None,
        "A worker whose requests hold more than this part of its KV blocks is busy, and is not chosen. "
        "Unset: none is.",
    )
    active_prefill_tokens_threshold: Annotated[int, Field(ge=1)] | None = setting(
        "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD",
        None,
        "A worker with more prompt tokens to read than this is busy, and is not chosen. Unset: none is.",
        unit="tokens",
    )
    router_queue_count: Annotated[int, Field(ge=0)] = setting(
        "DYN_ROUTER_QUEUE",
        1024,
        "Requests that wait while all workers that may take them are busy; past that the answer is "
        "Overloaded. Each model of a shared endpoint has a line of its own.",
        unit="requests",
    )
