"""What became of requests, and what a run of them comes to."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request. Counts are of prompt tokens; times in the trace's seconds."""

    index: int
    worker: int
    """The worker's number in the run."""
    prompt_count: int
    cached_count: int
    """Found in the cache, by the worker's own word."""
    matched_count: int
    """Thought to be in its cache when it was chosen; 0 if nobody thought about it."""
    ttft_s: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What a run comes to."""

    hit_rate: float
    """Prompt tokens found in caches ÷ all prompt tokens."""
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    imbalance: float
    """Prompt tokens read by the worker that read most ÷ by the mean one; 1 is even."""
    requests: int


def figures(outcomes: Sequence[Outcome], workers: int) -> Figures:
    """Raises ValueError if there are no outcomes."""
    if not outcomes:
        raise ValueError("no request was answered")
    times = sorted(outcome.ttft_s for outcome in outcomes)
    prompt_count = sum(outcome.prompt_count for outcome in outcomes)
    read: Counter[int] = Counter()
    for outcome in outcomes:
        read[outcome.worker] += outcome.prompt_count - outcome.cached_count
    return Figures(
        hit_rate=sum(outcome.cached_count for outcome in outcomes) / prompt_count,
        ttft_mean_s=statistics.fmean(times),
        ttft_p50_s=quantile(times, 0.5),
        ttft_p99_s=quantile(times, 0.99),
        imbalance=max(read.values()) * workers / sum(read.values()),
        requests=len(outcomes),
    )


def quantile(ordered: Sequence[float], part: float) -> float:
    """Of ordered values, the one with `part` of them below it."""
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)]
