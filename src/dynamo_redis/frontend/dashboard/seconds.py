"""The counts of a frontend by seconds, for rates, percentiles and charts. Pure."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from dynamo_redis.frontend.metrics.recording import (
    DURATION_LIMITS_S,
    FIRST_TOKEN_LIMITS_S,
    TOKEN_GAP_LIMITS_S,
    FrontendMetrics,
)

HISTORY_S: Final = 300
"""Seconds that are kept."""

FAILURES: Final = frozenset({"overload", "unavailable", "response_timeout", "internal"})
"""Error types of requests that failed through no fault of their client."""

TIMES: Final = {"first": FIRST_TOKEN_LIMITS_S, "gap": TOKEN_GAP_LIMITS_S, "duration": DURATION_LIMITS_S}
"""The measured times, and the limits of their histograms in seconds."""

_ENOUGH_TOKENS: Final = 100


@dataclass(slots=True)
class Totals:
    """Counts since the start of a process."""

    requests: int = 0
    items: int = 0
    ended_tokens: int = 0
    migrated: int = 0
    failed_over: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    times: dict[str, list[int]] = field(
        default_factory=lambda: {name: [0] * (len(limits) + 1) for name, limits in TIMES.items()}
    )
    """For each measured time: the counts up to each limit, then of all."""

    @classmethod
    def of(cls, metrics: FrontendMetrics) -> Totals:
        """Add the counts of all models."""
        totals = cls()
        for (_, kind), count in metrics.refused.items():
            if kind in FAILURES:
                totals.requests += count
                totals.failures[kind] += count
        for model in metrics.models.values():
            for (*_, kind), count in model.requests.items():
                totals.requests += count
                if kind in FAILURES:
                    totals.failures[kind] += count
            totals.ended_tokens += model.answer_token_count
            totals.migrated += model.migrations["ongoing_request"]
            totals.failed_over += model.migrations["new_request"]
            for name, histogram in zip(
                TIMES, (model.first_token_s, model.token_gaps_s, model.durations_s), strict=True
            ):
                sums = totals.times[name]
                for place, count in enumerate(histogram.read().counts):
                    sums[place] += count
        totals.items = totals.times["first"][-1] + totals.times["gap"][-1]
        return totals

    @property
    def tokens_an_item(self) -> float:
        """The tokens in an item of an answer, on average: one, for most engines."""
        if self.ended_tokens < _ENOUGH_TOKENS or not self.items:
            return 1.0
        return self.ended_tokens / self.items


@dataclass(slots=True)
class Second:
    """The counts of one second. `at` is its end, in whole seconds since 1970."""

    at: int
    requests: int = 0
    tokens: float = 0.0
    failures: dict[str, int] = field(default_factory=dict)
    times: dict[str, list[int]] = field(default_factory=dict)
    """As in `Totals`; without the times that were not measured in this second."""

    @classmethod
    def between(cls, at: int, before: Totals, now: Totals) -> Second:
        """Return what has been counted between two moments."""
        times = {
            name: [new - old for new, old in zip(counts, before.times[name], strict=True)]
            for name, counts in now.times.items()
            if counts[-1] != before.times[name][-1]
        }
        return cls(
            at,
            now.requests - before.requests,
            (now.items - before.items) * now.tokens_an_item,
            dict(now.failures - before.failures),
            times,
        )

    @property
    def is_empty(self) -> bool:
        """True if nothing was counted."""
        return not (self.requests or self.tokens or self.times or self.failures)

    def add(self, other: Second) -> None:
        """Add the counts of another process, or of another second."""
        self.requests += other.requests
        self.tokens += other.tokens
        for kind, count in other.failures.items():
            self.failures[kind] = self.failures.get(kind, 0) + count
        for name, counts in other.times.items():
            known = self.times.get(name)
            self.times[name] = (
                list(counts)
                if known is None
                else [mine + more for mine, more in zip(known, counts, strict=True)]
            )


class History:
    """The last seconds in which something was counted."""

    def __init__(self) -> None:
        self._seconds: deque[Second] = deque()

    def add(self, second: Second) -> None:
        """Add the newest second; those that are too old go."""
        if not second.is_empty:
            self._seconds.append(second)
        while self._seconds and self._seconds[0].at <= second.at - HISTORY_S:
            self._seconds.popleft()

    def since(self, at: int) -> list[Second]:
        """Return the seconds after this one."""
        return [second for second in self._seconds if second.at > at]


def summed(seconds: Iterable[Second], after: int, at: int) -> Second:
    """Return the sum of the seconds in a window."""
    total = Second(at)
    for second in seconds:
        if after < second.at <= at:
            total.add(second)
    return total


def percentile(limits: Sequence[float], counts: Sequence[int], part: float) -> float | None:
    """Return the value below which a part of the counted values is, in a straight line between two limits.

    `counts` are those up to each limit, then of all. None without values; the last limit for a value above
    it.
    """
    if not counts or not counts[-1]:
        return None
    rank = part * counts[-1]
    below_limit, below = 0.0, 0
    for limit, count in zip(limits, counts, strict=False):
        if count >= rank:
            share = (rank - below) / (count - below) if count > below else 1.0
            return below_limit + share * (limit - below_limit)
        below_limit, below = limit, count
    return limits[-1]
