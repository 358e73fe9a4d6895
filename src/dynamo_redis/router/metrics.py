"""The metrics of a router: its choices, its index, and the load of its workers as it knows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from dynamo_redis.exposition import Family
from dynamo_redis.histogram import HistogramReading
from dynamo_redis.names import EndpointName, format_instance_id
from dynamo_redis.router.router_state import RouterState

HIT_RATES: Final = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Upper limits of the expected hit rates that are counted together."""

_INDEX_GAUGES: Final = (
    ("index_blocks", "block_count", "KV blocks in the index"),
    ("index_connected", "connected", "1 while KV events can be read"),
    ("index_lag_entries", "lag_count", "Entries of KV events that are not applied yet"),
    ("index_lag_seconds", "lag_s", "Age of the newest KV event that is not applied yet"),
)
_INDEX_COUNTERS: Final = (
    ("events_applied_total", "events_count", "KV events that were applied to the index"),
    ("events_repeated_total", "repeated_count", "KV events that came twice, and were left out"),
    ("entries_unreadable_total", "unreadable_count", "Entries that are no batch of KV events"),
    ("event_gaps_total", "gaps_count", "Gaps in the KV events of a worker: it is asked for its blocks"),
    ("stream_losses_total", "cut_off_count", "Times that the stream, or its unread part, was gone"),
    ("workers_recovered_total", "recovered_count", "Workers that were asked for their blocks and answered"),
    ("workers_unanswered_total", "unanswered_count", "Workers that were asked for their blocks in vain"),
    ("snapshots_stored_total", "snapshots_stored_count", "Snapshots of the index that were stored"),
)


def router_families(state: RouterState, hit_rates: HistogramReading) -> list[Family]:
    """Return the figures of a router. `hit_rates` are those that it expected of its choices."""
    workers = EndpointName.parse(state.endpoint)
    labels = {
        "dynamo_namespace": workers.namespace,
        "dynamo_component": workers.component,
        "dynamo_endpoint": workers.endpoint,
        "router_id": state.router_id,
    }
    found = [
        Family("dynamo_component_router_requests_total", "counter", "Choices of a worker; retries count").add(
            state.counts.request_count, labels
        ),
        _family(
            "blind_choices_total", "counter", "Choices for which the blocks of a listed worker were not known"
        ).add(state.counts.blind_count, labels),
        _family("active_requests", "gauge", "Requests under way").add(state.active_count, labels),
        _family("waiting_requests", "gauge", "Requests that wait while all workers are busy").add(
            state.waiting_count, labels
        ),
        *_worker_families(state, labels),
    ]
    if state.mode != "load":  # that one knows no blocks
        found += [*_cache_families(state, hit_rates, labels), *_index_families(state.index, labels)]
    return found


def _cache_families(
    state: RouterState, hit_rates: HistogramReading, labels: Mapping[str, str]
) -> list[Family]:
    """Return the figures of the prompts that were found in caches."""
    counts = state.counts
    expected = Family(
        "dynamo_component_router_kv_hit_rate", "histogram", "Expected part of a prompt in the chosen cache"
    )
    expected.add_histogram(hit_rates, labels)
    return [
        expected,
        _family("prompt_tokens_total", "counter", "Tokens of prompts that were answered").add(
            counts.prompt_tokens, labels
        ),
        _family("cached_tokens_total", "counter", "Prompt tokens that the workers had in their caches").add(
            counts.cached_tokens, labels
        ),
        _family("expected_tokens_total", "counter", "Prompt tokens expected in the workers' caches").add(
            counts.expected_tokens, labels
        ),
    ]


def _index_families(index: Mapping[str, Any], labels: Mapping[str, str]) -> list[Family]:
    """Return the figures of the index; those that are unknown have no sample."""
    found = []
    for name, field, description in _INDEX_GAUGES:
        found.append(family := _family(name, "gauge", description))
        if index.get(field) is not None:
            family.add(index[field], labels)
    for name, field, description in _INDEX_COUNTERS:
        found.append(family := _family(name, "counter", description))
        if field in index:
            family.add(index[field], labels)
    return found


def _worker_families(state: RouterState, labels: Mapping[str, str]) -> list[Family]:
    cached = _family("worker_cached_blocks", "gauge", "KV blocks of a worker that the router knows")
    requests = _family("worker_active_requests", "gauge", "Requests at a worker, by all routers' bookings")
    blocks = Family(
        "dynamo_frontend_worker_active_decode_blocks", "gauge", "KV blocks of a worker's prompts under way"
    )
    tokens = Family(
        "dynamo_frontend_worker_active_prefill_tokens", "gauge", "Prompt tokens that a worker has yet to read"
    )
    for worker in state.workers:
        own = {
            **labels,
            "worker_id": format_instance_id(worker["instance_id"]),
            "dp_rank": str(worker["dp_rank"]),
        }
        if state.mode != "load":
            cached.add(worker["cached_blocks"], own)
        requests.add(worker["request_count"], own)
        blocks.add(worker["blocks"], own)
        tokens.add(worker["prefill_tokens"], own)
    return [cached, requests, blocks, tokens]


def _family(name: str, kind: Any, description: str) -> Family:
    return Family(f"dynamo_redis_router_{name}", kind, description)
