"""One state for all viewers."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from dynamo_redis.frontend.dashboard.broadcast import Broadcast


def counting_state(number: int) -> dict[str, Any]:
    facts = {"now": number, "verdict": (), "problems": [], "figures": {}}
    lists: dict[str, Any] = {"models": [], "routers": [], "processes": []}
    tables: dict[str, Any] = {"who": {}, "points": {}, "events": {}, "loads": {"a": number}}
    return {**facts, **lists, **tables}


def numbered(*, failing: int | None = None) -> tuple[Callable[[], Awaitable[dict[str, Any]]], list[int]]:
    """Return a source of states, and the numbers of those that it has made."""
    made: list[int] = []
    numbers = itertools.count(1)

    async def sample() -> dict[str, Any]:
        made.append(next(numbers))
        if made[-1] == failing:
            raise ValueError("a state that cannot be made")
        return counting_state(made[-1])

    return sample, made


async def read(frames: AsyncGenerator[bytes]) -> tuple[str, dict[str, Any]]:
    """Return the kind and content of the next frame."""
    async with asyncio.timeout(30):
        kind, _, rest = (await anext(frames)).decode().partition("\n")
    return kind.removeprefix("event: "), json.loads(rest.removeprefix("data: "))


async def test_viewer_gets_a_state_and_then_changes() -> None:
    sample, _ = numbered()
    broadcast = Broadcast(sample, pause_s=0.02)
    async with aclosing(broadcast.frames()) as frames:
        assert (await read(frames))[0] == "state"
        kind, change = await read(frames)
        assert kind == "change"
        assert change["loads"]["set"] == {"a": change["now"]}
        assert "who" not in change


async def test_slow_viewer_gets_the_newest_state() -> None:
    sample, made = numbered()
    broadcast = Broadcast(sample, pause_s=0.002)
    async with aclosing(broadcast.frames()) as slow, aclosing(broadcast.frames()) as quick:
        await read(slow)
        count = len(made)
        while len(made) < count + 5:
            await read(quick)
        kind, state = await read(slow)
        assert kind == "state"
        assert state["now"] >= count + 4


async def test_sampler_runs_only_while_a_browser_looks() -> None:
    sample, made = numbered()
    broadcast = Broadcast(sample, pause_s=0.002)
    await asyncio.sleep(0.02)
    assert made == []
    async with aclosing(broadcast.frames()) as frames:
        await read(frames)
        assert broadcast.viewer_count == 1
    assert broadcast.viewer_count == 0
    count = len(made)
    await asyncio.sleep(0.02)
    assert len(made) == count
    async with aclosing(broadcast.frames()) as frames:
        assert (await read(frames))[0] == "state"


async def test_failed_state_costs_itself() -> None:
    sample, _ = numbered(failing=2)
    broadcast = Broadcast(sample, pause_s=0.002)
    async with aclosing(broadcast.frames()) as frames:
        while (await read(frames))[1]["now"] < 3:
            pass


async def test_end_ends_all_frames() -> None:
    sample, _ = numbered()
    broadcast = Broadcast(sample, pause_s=0.002)
    async with aclosing(broadcast.frames()) as frames:
        await read(frames)
        broadcast.end()
        assert [frame async for frame in frames] == []
