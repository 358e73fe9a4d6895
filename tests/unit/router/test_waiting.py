"""The line of requests that wait while all workers are busy."""

from __future__ import annotations

import asyncio
import time

import pytest

from dynamo_redis.errors import DeadlineExceeded, NoInstances, Overloaded
from dynamo_redis.router.waiting import WaitingLine


class Door:
    """Lets so many through as there are places."""

    def __init__(self, places: int = 0) -> None:
        self.places = places
        self.passed: list[str] = []

    async def enter(self, line: WaitingLine, name: str, within_s: float = 60.0) -> None:
        def look() -> str | None:
            if not self.places:
                return None
            self.places -= 1
            return name

        self.passed.append(await line.enter(look, time.monotonic() + within_s))


async def waiting(line: WaitingLine, count: int) -> None:
    async with asyncio.timeout(30):
        while len(line) != count:
            await asyncio.sleep(0)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_who_finds_something_does_not_wait() -> None:
    line, door = WaitingLine(0), Door(1)
    await door.enter(line, "a")
    assert door.passed == ["a"]
    assert len(line) == 0


async def test_first_come_first_served_however_many_become_free_at_once() -> None:
    line, door = WaitingLine(10), Door()
    async with asyncio.TaskGroup() as tasks:
        for name in "abc":
            tasks.create_task(door.enter(line, name))
            await waiting(line, len(line) + 1)
        door.places = 2
        line.wake()
        await waiting(line, 1)
        await settle()  # the third has looked, too
        assert door.passed == ["a", "b"]
        # A place becomes free just as another comes: it stands behind who waits.
        door.places = 1
        tasks.create_task(door.enter(line, "d"))
        await waiting(line, 2)
        line.wake()
        await waiting(line, 1)
        assert door.passed == ["a", "b", "c"]
        door.places = 1
        line.wake()
    assert door.passed == ["a", "b", "c", "d"]


async def test_no_more_wait_than_may() -> None:
    line, door = WaitingLine(1), Door()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(door.enter(line, "a"))
        await waiting(line, 1)
        with pytest.raises(Overloaded) as refused:
            await door.enter(line, "b")
        assert refused.value.retry_after_s
        door.places = 1
        line.wake()
    assert door.passed == ["a"]


async def test_a_deadline_ends_the_waiting_and_the_next_has_its_turn() -> None:
    line, door = WaitingLine(10), Door()
    async with asyncio.TaskGroup() as tasks:
        first = asyncio.ensure_future(door.enter(line, "a", within_s=0.05))
        await waiting(line, 1)
        tasks.create_task(door.enter(line, "b"))
        with pytest.raises(DeadlineExceeded):
            await first
        door.places = 1
        line.wake()
    assert door.passed == ["b"]


async def test_one_that_is_cancelled_at_its_turn_hands_it_on() -> None:
    line, door = WaitingLine(10), Door()
    async with asyncio.TaskGroup() as tasks:
        first = asyncio.ensure_future(door.enter(line, "a"))
        await waiting(line, 1)
        tasks.create_task(door.enter(line, "b"))
        await waiting(line, 2)
        door.places = 1
        line.wake()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    assert door.passed == ["b"]


async def test_what_looking_raises_ends_the_waiting() -> None:
    line = WaitingLine(10)
    answers: list[Exception | None] = [None, NoInstances("all have left")]

    def look() -> str | None:
        answer = answers.pop(0)
        if answer is not None:
            raise answer
        return None

    task = asyncio.ensure_future(line.enter(look, time.monotonic() + 60))
    await waiting(line, 1)
    line.wake()
    with pytest.raises(NoInstances):
        await task
    assert len(line) == 0
