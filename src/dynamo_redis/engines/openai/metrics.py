"""What engines say of themselves at `/metrics`: load, and how large they are. Pure.

Prometheus text (https://prometheus.io/docs/instrumenting/exposition_formats/), of which a few gauges are
read. vLLM labels its data-parallel ranks `engine`, SGLang `dp_rank`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
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
    """One rank as it says. Ratios are 0 to 1, None what the engine does not say."""

    running_count: int
    waiting_count: int
    used_ratio: float | None
    prefix_hit_rate: float | None


@dataclass(frozen=True, slots=True)
class EngineMetrics:
    """One reading. `ranks` is empty if the engine says nothing of its load."""

    ranks: dict[int, RankMetrics]
    block_size: int | None = None
    block_count: int | None = None
    token_count: int | None = None
    """KV cache of one rank: blocks and their size (vLLM), or tokens (SGLang)."""

    def after(self, before: EngineMetrics) -> EngineMetrics:
        """This reading of the same engine, whose sizes are those said before where it does not say them."""
        return replace(
            self,
            block_size=self.block_size or before.block_size,
            block_count=self.block_count or before.block_count,
            token_count=self.token_count or before.token_count,
        )


def read_metrics(text: str) -> EngineMetrics:
    """Read a page. Lines that are not understood are skipped."""
    samples: dict[str, dict[int, float]] = {}
    config: dict[str, str] = {}
    for name, labels, value in _samples(text):
        if name == _CONFIG:
            config = config or labels
        rank = labels.get("engine") or labels.get("dp_rank") or "0"
        values = samples.setdefault(name, {})
        values.setdefault(int(rank) if rank.isdecimal() else 0, value)
    tokens = _first(samples, _TOKENS)
    return EngineMetrics(
        ranks=dict(_ranks(samples)),
        block_size=_whole(config.get("block_size")),
        block_count=_whole(config.get("num_gpu_blocks")),
        token_count=int(min(tokens.values())) if tokens else None,
    )


def _samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    for line in text.splitlines():
        found = None if line.startswith("#") else _LINE.match(line)
        if found is None:
            continue
        try:
            value = float(found[3])
        except ValueError:
            continue
        if value == value and abs(value) < 1e18:  # neither NaN nor infinite
            yield found[1], dict(_LABEL.findall(found[2] or "")), value


def _ranks(samples: dict[str, dict[int, float]]) -> Iterator[tuple[int, RankMetrics]]:
    running, waiting = _first(samples, _RUNNING), _first(samples, _WAITING)
    used, rates = _first(samples, _USED_RATIO), _first(samples, _HIT_RATE)
    queries, hits = _first(samples, _QUERIES), _first(samples, _HITS)
    for rank, count in running.items():
        rate = rates.get(rank)
        if rate is None and queries.get(rank):
            rate = hits.get(rank, 0.0) / queries[rank]
        yield rank, RankMetrics(int(count), int(waiting.get(rank, 0)), used.get(rank), rate)


def _first(samples: dict[str, dict[int, float]], names: Iterable[str]) -> dict[int, float]:
    return next((samples[name] for name in names if name in samples), {})


def _whole(value: str | None) -> int | None:
    return int(value) if value is not None and value.isdecimal() and int(value) > 0 else None
