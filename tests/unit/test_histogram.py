"""Counts of values up to limits."""

from __future__ import annotations

import random

from dynamo_redis.histogram import FOLD_COUNT, Histogram


def test_values_are_counted_up_to_each_limit() -> None:
    histogram = Histogram((1, 2, 5))
    for value in (0.5, 1, 1.5, 2, 3, 100):
        histogram.add(value)
    read = histogram.read()
    assert (read.limits, read.counts, read.total) == ((1, 2, 5), (2, 4, 5, 6), 108)


def test_many_values_are_counted_as_one_by_one() -> None:
    rng, limits = random.Random(7), (0.1, 0.5, 0.9)
    histogram, values = Histogram(limits), [rng.random() for _ in range(3 * FOLD_COUNT + 17)]
    for value in values:
        histogram.add(value)
        assert len(histogram.pending) < FOLD_COUNT
    read = histogram.read()
    assert list(read.counts) == [sum(value <= limit for value in values) for limit in limits] + [len(values)]
    assert abs(read.total - sum(values)) < 1e-9
    assert histogram.read() == read
