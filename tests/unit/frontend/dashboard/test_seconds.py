"""Counts by seconds, and the percentiles of their histograms."""

from __future__ import annotations

import pytest

from dynamo_redis.frontend.dashboard.seconds import HISTORY_S, History, Second, Totals, percentile, summed
from dynamo_redis.frontend.http.errors import ApiError
from dynamo_redis.frontend.metrics.recording import FrontendMetrics

LIMITS = (0.1, 0.2, 0.4)


def end_request(metrics: FrontendMetrics, *, error: ApiError | None = None) -> None:
    record = metrics.begin("demo", "chat", is_stream=True, started_at=0.0)
    if error is None:
        record.note_first_item(0.15)
        record.gaps_s.add_all([0.012] * 9)
    record.end(error, has_hung_up=False, prompt_token_count=5, answer_token_count=10, cached_token_count=None)


@pytest.mark.parametrize(
    ("counts", "part", "expected"),
    [
        ((10, 10, 10, 10), 0.5, 0.05),
        ((0, 10, 10, 10), 0.5, 0.15),
        ((5, 10, 10, 10), 0.99, 0.198),
        ((0, 0, 0, 10), 0.5, 0.4),
        ((0, 0, 0, 0), 0.5, None),
        ((), 0.5, None),
    ],
)
def test_percentile_lies_between_its_limits(
    counts: tuple[int, ...], part: float, expected: float | None
) -> None:
    assert percentile(LIMITS, counts, part) == (None if expected is None else pytest.approx(expected))


def test_second_has_the_counts_between_two_totals() -> None:
    metrics = FrontendMetrics()
    end_request(metrics)
    before = Totals.of(metrics)
    end_request(metrics)
    end_request(metrics, error=ApiError(503, "no worker"))
    end_request(metrics, error=ApiError(400, "the client's own"))
    second = Second.between(7, before, Totals.of(metrics))
    assert (second.requests, second.tokens, second.failures) == (3, 10, {"unavailable": 1})
    assert second.times["first"][-1] == 1
    assert second.times["gap"][-1] == 9
    assert Second.between(8, before, before).is_empty


def test_tokens_count_where_items_have_several() -> None:
    totals = Totals(items=100, ended_tokens=400)
    assert totals.tokens_an_item == 4
    assert Totals(items=10, ended_tokens=40).tokens_an_item == 1


def test_history_forgets_old_seconds() -> None:
    history = History()
    history.add(Second(100, requests=1))
    history.add(Second(101))
    history.add(Second(102, requests=2))
    assert [second.at for second in history.since(0)] == [100, 102]
    assert [second.at for second in history.since(100)] == [102]
    history.add(Second(100 + HISTORY_S, requests=1))
    assert [second.at for second in history.since(0)] == [102, 100 + HISTORY_S]


def test_sum_adds_processes_and_seconds() -> None:
    seconds = [
        Second(1, 1, 2.0, {"internal": 1}, {"gap": [1, 2]}),
        Second(1, 10, 3.0, {"internal": 2}, {"gap": [1, 1], "first": [4, 4]}),
        Second(5, 100),
    ]
    total = summed(seconds, 0, 4)
    assert (total.requests, total.tokens, total.failures) == (11, 5.0, {"internal": 3})
    assert total.times == {"gap": [2, 3], "first": [4, 4]}
