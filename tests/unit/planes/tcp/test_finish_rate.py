"""The rate at which a full worker finishes requests."""

from __future__ import annotations

import pytest

from dynamo_redis.planes.frames.admission import FinishRate


def test_rate_is_unknown_at_first() -> None:
    rate = FinishRate()
    rate.resume(100.0, 5)
    assert rate.per_s(100.0, 5) is None
    assert rate.per_s(100.1, 6) is None  # one request in 0.1 s says little


def test_rate_is_known_after_many_requests_or_a_window() -> None:
    rate = FinishRate()
    rate.resume(100.0, 0)
    assert rate.per_s(100.1, 50) == pytest.approx(500)
    slow = FinishRate()
    slow.resume(100.0, 0)
    assert slow.per_s(101.0, 3) == pytest.approx(3)


def test_server_that_stands_still_is_seen() -> None:
    rate = FinishRate()
    rate.resume(100.0, 0)
    assert rate.per_s(101.0, 100) == pytest.approx(100)
    assert rate.per_s(102.1, 100) == pytest.approx(100 / 2.1)
    assert rate.per_s(103.2, 100) == 0


def test_rate_follows_a_change_within_two_windows() -> None:
    rate = FinishRate()
    rate.resume(0.0, 0)
    for tick in range(1, 40):
        rate.per_s(tick / 10, tick * 10)  # 100 a second
    for tick in range(1, 30):
        rate.per_s(4 + tick / 10, 400 + tick)  # 10 a second
    assert rate.per_s(7.0, 430) == pytest.approx(10, rel=0.3)


def test_idle_time_does_not_count() -> None:
    rate = FinishRate()
    rate.resume(0.0, 0)
    assert rate.per_s(1.0, 100) == pytest.approx(100)
    rate.resume(3600.0, 100)
    assert rate.per_s(3600.0, 100) == pytest.approx(100)
    assert rate.per_s(3601.0, 150) == pytest.approx(50)


def test_rate_covers_the_time_between_rare_readings() -> None:
    rate = FinishRate()
    rate.resume(0.0, 0)
    assert rate.per_s(30.0, 300) == pytest.approx(10)
