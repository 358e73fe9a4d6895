"""The counts of an endpoint."""

from __future__ import annotations

import pytest

from dynamo_redis.histogram import FOLD_COUNT
from dynamo_redis.planes.stats import DURATION_BUCKETS_S, RECENT_COUNT, RequestCounts


def test_sums_are_over_all_requests_and_percentiles_over_recent() -> None:
    counts = RequestCounts()
    assert (counts.snapshot(0).average_s, counts.snapshot(0).p99_s) == (0.0, 0.0)
    for number in range(3 * RECENT_COUNT):
        counts.durations_s.append(100.0 if number < RECENT_COUNT else number % 100 + 1)
        if len(counts.durations_s) >= FOLD_COUNT:
            counts.fold()
    stats = counts.snapshot(7)
    assert stats.request_count == 3 * RECENT_COUNT
    assert stats.in_flight_count == 7
    assert stats.processing_s == pytest.approx(RECENT_COUNT * 100 + 2 * RECENT_COUNT * 50.5)
    assert stats.average_s == pytest.approx(stats.processing_s / stats.request_count)
    assert (stats.p50_s, stats.p99_s) == (51, 100)


def test_errors_are_counted_and_the_last_one_kept() -> None:
    counts = RequestCounts()
    for code, text in (("overloaded", "first"), ("handler_failed", "y"), ("overloaded", "x" * 1000)):
        counts.add_error(code, text)
    stats = counts.snapshot(0)
    assert stats.error_count == 3
    assert stats.error_counts == {"overloaded": 2, "handler_failed": 1}
    assert stats.last_error == "x" * 200


def test_durations_are_counted_up_to_each_limit() -> None:
    counts = RequestCounts()
    for limit_s in DURATION_BUCKETS_S:
        counts.durations_s.append(limit_s)
    counts.durations_s.append(1e6)
    counts.fold()
    stats = counts.snapshot(0)
    assert stats.duration_counts == tuple(range(1, len(DURATION_BUCKETS_S) + 2))
