"""Metrics of engines at `/metrics`: their load and sizes. Pure.

They are Prometheus text (https://prometheus.io/docs/instrumenting/exposition_formats/); only a few gauges are
read. vLLM labels its data-parallel ranks `engine`, SGLang `dp_rank`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

_LINE: Final = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+([-+.\w]+)")
_LABEL: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

_RUNNING: Final = ("vllm:num_requests_running", "sglang:num_running_reqs", "llamacpp:requests_processing")
_WAITING: Final = ("vllm:num_requests_waiting", "sglang:num_queue_reqs", "llamacpp:requests_deferred")
_USED_RATIO: Final = (
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    "sglang:token_usage",
    "llamacpp:kv_cache_usage_ratio",
)
_HIT_RATE: Final = ("sglang:cache_hit_rate",)
_QUERIES: Final = ("vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total")
_HITS: Final = ("vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total")
_TOKENS: Final = ("sglang:max_total_num_tokens",)
_CONFIG: Final = "vllm:cache_config_info"


@dataclass(frozen=True, slots=True)
class RankMetrics:
    """The load of one rank. Ratios are 0 to 1; a value that the engine does not report is None."""

    running_count: int
    waiting_count: int
    used_ratio: float | None
    prefix_hit_rate: float | None


@dataclass(frozen=True, slots=True)
class EngineMetrics:
    """The values of one page. `ranks` is empty if the engine does not report its load."""

    ranks: dict[int, RankMetrics]
    block_size: int | None = None
    block_count: int | None = None
    token_count: int | None = None
    """The KV cache of one rank: blocks and their size (vLLM), or tokens (SGLang)."""

    def with_sizes_of(self, before: EngineMetrics) -> EngineMetrics:
        """Return these values, and for sizes that are missing here those of `before`, of the same engine."""
        return replace(
            self,
            block_size=self.block_size or before.block_size,
            block_count=self.block_count or before.block_count,
            token_count=self.token_count or before.token_count,
        )


def read_metrics(text: str) -> EngineMetrics:
    """Read a page of metrics. Unknown lines are skipped."""
    samples: dict[str, dict[int, float]] = {}
    config: dict[str, str] = {}
    for line in text.splitlines():
        found = None if line.startswith("#") else _LINE.match(line)
        if found is None:
            continue
        try:
            value = float(found[3])
        except ValueError:
            continue
        if not abs(value) < 1e18:  # NaN and infinite values, too
            continue
        name, labels = found[1], dict(_LABEL.findall(found[2] or ""))
        if name == _CONFIG:
            config = config or labels
        rank = labels.get("engine") or labels.get("dp_rank") or "0"
        values = samples.setdefault(name, {})
        values.setdefault(int(rank) if rank.isdecimal() else 0, value)
    running, waiting = _first(samples, _RUNNING), _first(samples, _WAITING)
    used, rates = _first(samples, _USED_RATIO), _first(samples, _HIT_RATE)
    queries, hits = _first(samples, _QUERIES), _first(samples, _HITS)
    ranks = {}
    for dp_rank, count in running.items():
        rate = rates.get(dp_rank)
        if rate is None and queries.get(dp_rank):
            rate = hits.get(dp_rank, 0.0) / queries[dp_rank]
        ranks[dp_rank] = RankMetrics(int(count), int(waiting.get(dp_rank, 0)), used.get(dp_rank), rate)
    tokens = _first(samples, _TOKENS)
    return EngineMetrics(
        ranks=ranks,
        block_size=_whole(config.get("block_size")),
        block_count=_whole(config.get("num_gpu_blocks")),
        token_count=int(min(tokens.values())) if tokens else None,
    )


def _first(samples: dict[str, dict[int, float]], names: Iterable[str]) -> dict[int, float]:
    """Return the values by rank of the first of these metrics that the page has."""
    return next((samples[name] for name in names if name in samples), {})


def _whole(value: str | None) -> int | None:
    return int(value) if value is not None and value.isdecimal() and int(value) > 0 else None
