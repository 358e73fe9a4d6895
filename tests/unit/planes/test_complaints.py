"""What is said of others, and how often."""

from __future__ import annotations

import logging

import pytest

from dynamo_redis.planes import complaints
from dynamo_redis.planes.complaints import PAUSE_S, Complaints


class Clock:
    """Stands in for `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_one_line_a_while_of_each_kind(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(complaints, "time", clock)
    said = Complaints(logging.getLogger("dynamo_redis.test"))
    with caplog.at_level(logging.INFO, "dynamo_redis.test"):
        for number in range(4):
            said.say("%d is refused", number)
            said.say("%d has gone", number)
            clock.now += PAUSE_S / 4 - 0.01
        assert caplog.messages == ["0 is refused", "0 has gone"]
        caplog.clear()
        clock.now += 1
        said.say("%d is refused", 4)
        clock.now += PAUSE_S
        said.say("%d is refused", 5)
        assert caplog.messages == ["4 is refused (3 more of these since the last such line)", "5 is refused"]
        assert {record.levelno for record in caplog.records} == {logging.WARNING}
