"""Several calls at a time, with results in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any

import pytest

from dynamo_redis.store.objects.overlap import overlapped


class Calls:
    """Calls that return their number when the test allows it, and record how they end."""

    def __init__(self, count: int) -> None:
        self.begun: list[int] = []
        self.ended: list[int] = []
        self.closed = False
        self.let = [asyncio.Event() for _ in range(count)]

    async def __call__(self) -> AsyncGenerator[Coroutine[Any, Any, int]]:
        try:
            for number in range(len(self.let)):
                yield self._call(number)
        finally:
            self.closed = True

    async def _call(self, number: int) -> int:
        self.begun.append(number)
        try:
            await self.let[number].wait()
        finally:
            self.ended.append(number)
        if number == 13:
            raise ValueError(number)
        return number


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_answers_come_in_order_whatever_ends_first() -> None:
    calls = Calls(5)
    for event in reversed(calls.let):
        asyncio.get_running_loop().call_soon(event.set)
    assert [number async for number in overlapped(calls(), limit_count=3)] == [0, 1, 2, 3, 4]
    assert calls.closed


async def test_no_more_than_the_limit_are_under_way() -> None:
    calls = Calls(6)
    async with aclosing(overlapped(calls(), limit_count=3)) as answers:
        first = asyncio.ensure_future(anext(answers))
        await turns()
        assert calls.begun == [0, 1, 2]
        calls.let[0].set()
        assert await first == 0
        await turns()
        assert calls.begun == [0, 1, 2]  # the consumer is busy


async def test_fewer_calls_than_the_limit() -> None:
    calls = Calls(2)
    for event in calls.let:
        event.set()
    assert [number async for number in overlapped(calls(), limit_count=3)] == [0, 1]
    assert [number async for number in overlapped(Calls(0)(), limit_count=3)] == []


async def test_the_first_failure_ends_the_others() -> None:
    calls = Calls(20)
    for event in calls.let[:14]:
        event.set()
    seen = []
    with pytest.raises(ValueError, match="13"):  # noqa: PT012 - what came before it counts
        async for number in overlapped(calls(), limit_count=4):
            seen.append(number)  # noqa: PERF401 - the same
    assert seen == list(range(13))
    assert calls.begun == calls.ended
    assert calls.closed


@pytest.mark.parametrize("waiting", [True, False])
async def test_closing_or_cancelling_leaves_no_call_behind(waiting: bool) -> None:
    calls = Calls(6)
    calls.let[0].set()
    answers = overlapped(calls(), limit_count=3)
    assert await anext(answers) == 0
    if waiting:
        task = asyncio.ensure_future(anext(answers))
        await turns()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        await answers.aclose()
    assert sorted(calls.ended) == calls.begun
    assert calls.closed
