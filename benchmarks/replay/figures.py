"""The outcomes of requests, and the figures of a run."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one request. Counts are of prompt tokens; times are in the trace's seconds."""

    index: int
    worker: int
    """The worker's number in the run."""
    prompt_count: int
    cached_count: int
    """Tokens that the worker reported as found in its cache."""
    matched_count: int
    """Tokens that the router believed to be in the worker's cache at the choice; 0 if it had no estimate."""
    ttft_s: float


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of a run."""

    hit_rate: float
    """Prompt tokens found in caches ÷ all prompt tokens."""
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    imbalance: float
    """Prompt tokens read by the worker that read most ÷ by the mean one; 1 is even."""
    requests: int


def figures(outcomes: Sequence[Outcome], workers: int) -> Figures:
    """Return the figures of a run. Raises ValueError if there are no outcomes."""
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
    """Return the quantile of ordered values: `part` of them are below it."""
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)]
