"""Reads that find little keep their distance; the first one, and one that finds much, do not."""

from __future__ import annotations

import asyncio

import pytest

from dynamo_redis.router.pace import Pace

PAUSE_S = 10.0
FULL = 100


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the time that it has waited; no real time passes."""
    waits: list[float] = []

    async def sleep(wait_s: float) -> None:
        waits.append(wait_s)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return waits


async def test_reads_that_find_little_keep_their_distance(slept: list[float]) -> None:
    pace = Pace(PAUSE_S, FULL)
    await pace.wait(1)
    assert slept == [], "the first after a silence"
    await pace.wait(1)
    (wait_s,) = slept
    assert 0 < wait_s <= PAUSE_S


@pytest.mark.parametrize("found_count", [0, FULL, FULL + 1])
async def test_a_read_that_finds_much_or_nothing_is_not_put_off(slept: list[float], found_count: int) -> None:
    pace = Pace(PAUSE_S, FULL)
    await pace.wait(1)
    await pace.wait(found_count)
    assert slept == []
