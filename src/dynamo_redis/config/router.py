"""Settings of the KV-aware router."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dynamo_redis.config.base import Duration, SettingsGroup, setting

_Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class RouterSettings(SettingsGroup):
    """The KV-aware router: its index, its cost function, its queue. docs/router.md explains the cost."""

    kv_cache_block_size: Annotated[int, Field(ge=1, le=4096)] | None = setting(
        "DYN_KV_CACHE_BLOCK_SIZE",
        None,
        "Tokens in a block of the workers' KV caches. Unset: the first worker's value; 16 until it is known.",
        unit="tokens",
    )
    kv_overlap_score_weight: _Weight = setting(
        "DYN_KV_OVERLAP_SCORE_WEIGHT",
        1.0,
        "Credit for a block of the prompt that a worker holds on its device. 0: only load counts.",
    )
    router_host_cache_hit_weight: _Weight = setting(
        "DYN_ROUTER_HOST_CACHE_HIT_WEIGHT", 0.75, "Credit for a block that a worker holds in host memory."
    )
    router_disk_cache_hit_weight: _Weight = setting(
        "DYN_ROUTER_DISK_CACHE_HIT_WEIGHT", 0.25, "Credit for a block that a worker holds on disk."
    )
    router_prefill_load_scale: _Weight = setting(
        "DYN_ROUTER_PREFILL_LOAD_SCALE",
        1.0,
        "Cost of a prompt block that is still to be read, relative to a block that a running request holds.",
    )
    router_temperature: _Weight = setting(
        "DYN_ROUTER_TEMPERATURE", 0.0, "0: the lowest cost is chosen; above 0: a random draw by softmax."
    )
    use_kv_events: bool = setting(
        "DYN_KV_EVENTS",
        True,
        "Follow the workers' KV events. false: predict from the router's own decisions.",
    )
    router_replica_sync: bool = setting(
        "DYN_ROUTER_REPLICA_SYNC", True, "Share the requests under way with the other routers."
    )
    router_snapshot_threshold: Annotated[int, Field(ge=1)] = setting(
        "DYN_ROUTER_SNAPSHOT_THRESHOLD",
        100_000,
        "Events in the stream after which the index is stored as a snapshot and the stream is trimmed.",
        unit="events",
    )
    router_reset_states: bool = setting(
        "DYN_ROUTER_RESET_STATES",
        False,
        "At start, discard the snapshot and the stream, and read the workers' blocks again.",
    )
    router_ttl_s: Annotated[Duration, Field(gt=0)] = setting(
        "DYN_ROUTER_TTL_SECS", 120.0, "Without KV events: time for which a predicted block counts.", unit="s"
    )
    router_max_tree_size: Annotated[int, Field(ge=1000)] = setting(
        "DYN_ROUTER_MAX_TREE_SIZE",
        4_194_304,
        "Most blocks in the index; beyond that the oldest are removed.",
        unit="blocks",
    )
    router_prune_target_ratio: Annotated[float, Field(gt=0, le=1)] = setting(
        "DYN_ROUTER_PRUNE_TARGET_RATIO", 0.8, "Fraction of that maximum that stays when blocks are removed."
    )
    active_decode_blocks_threshold: Annotated[float, Field(ge=0, le=1)] | None = setting(
        "DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD",
        None,
        "A worker is busy, and is not chosen, while its requests hold more than this fraction of its KV "
        "blocks. Unset: no worker is busy by its blocks. `POST /busy_threshold` changes it for a model.",
    )
    active_prefill_tokens_threshold: Annotated[int, Field(ge=0)] | None = setting(
        "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD",
        None,
        "A worker is busy, and is not chosen, while it has more prompt tokens to read than this. Unset: no "
        "worker is busy by a number of tokens. `POST /busy_threshold` changes it for a model.",
        unit="tokens",
    )
    active_prefill_tokens_threshold_frac: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = setting(
        "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD_FRAC",
        None,
        "The same as a multiple of the tokens that the worker reads in one step (`max_num_batched_tokens` of "
        "its card). Unset: no worker is busy by it. `POST /busy_threshold` changes it for a model.",
    )
    router_queue_count: Annotated[int, Field(ge=0)] = setting(
        "DYN_ROUTER_QUEUE",
        1024,
        "Most requests that wait while all workers that can take them are busy; beyond that the answer is "
        "Overloaded. Each model of a shared endpoint has its own queue.",
        unit="requests",
    )
    router_queue_wait_s: Duration = setting(
        "DYN_ROUTER_QUEUE_WAIT_S",
        1.0,
        "Longest time that a request waits while all workers that can take it are busy; then the answer is "
        "Overloaded. 0: at once.",
        unit="s",
    )
