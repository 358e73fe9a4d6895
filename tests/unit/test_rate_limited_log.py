"""`RateLimitedLog`: one line a while of each kind, with a count of those left out."""

from __future__ import annotations

import logging

import pytest

from dynamo_redis import rate_limited_log
from dynamo_redis.rate_limited_log import MAX_KINDS, PAUSE_S, RateLimitedLog

LOG = logging.getLogger("dynamo_redis.test")


class Clock:
    """A replacement of the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(rate_limited_log, "time", made)
    return made


def test_one_line_a_while_of_each_kind(caplog: pytest.LogCaptureFixture, clock: Clock) -> None:
    limited = RateLimitedLog(LOG)
    with caplog.at_level(logging.INFO, "dynamo_redis.test"):
        for number in range(4):
            limited.log("%d is refused", number)
            limited.log("%d has gone", number)
            clock.now += PAUSE_S / 4 - 0.01
        assert caplog.messages == ["0 is refused", "0 has gone"]
        caplog.clear()
        clock.now += 1
        limited.log("%d is refused", 4)
        clock.now += PAUSE_S
        limited.log("%d is refused", 5)
        assert caplog.messages == ["4 is refused (3 more of these since the last such line)", "5 is refused"]
        assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_kinds_are_bounded_and_the_rest_is_counted(caplog: pytest.LogCaptureFixture, clock: Clock) -> None:
    limited = RateLimitedLog(LOG)
    with caplog.at_level(logging.INFO, LOG.name):
        for number in range(MAX_KINDS + 9):
            limited.log("kind %d", number, kind=number)
        assert len(caplog.messages) == MAX_KINDS
        limited.log("kind %d", 0, kind=0)
        caplog.clear()
        clock.now += PAUSE_S
        limited.log(
            "kind %d", MAX_KINDS, kind=MAX_KINDS
        )  # takes the place of kind 0, of which one line was left out
        assert caplog.messages == [f"kind {MAX_KINDS} (10 of other kinds since the last such line)"]


def test_a_line_has_the_traceback(caplog: pytest.LogCaptureFixture) -> None:
    limited = RateLimitedLog(LOG, logging.ERROR)
    error = ValueError("no")
    limited.log("it broke", exc_info=error)
    (record,) = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[1] is error
