"""The lines of requests that wait while all workers that may take them are busy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection

import pytest

from dynamo_redis.errors import DeadlineExceeded, NoInstances, Overloaded
from dynamo_redis.router.choice.waiting_line import WaitingLine, WaitingLines
from dynamo_redis.runtime.among import LiveIds


class Door:
    """Lets so many through as there are places."""

    def __init__(self, places: int = 0) -> None:
        self.places = places
        self.passed: list[str] = []

    def look(self, name: str) -> str | None:
        if not self.places:
            return None
        self.places -= 1
        return name

    async def enter(self, line: WaitingLine, name: str, within_s: float = 60.0) -> None:
        found = await line.enter(lambda: self.look(name), time.monotonic() + within_s)
        self.passed.append(found)


async def waiting(line: WaitingLine | WaitingLines, count: int) -> None:
    async with asyncio.timeout(30):
        while len(line) != count:
            await asyncio.sleep(0)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_request_with_a_free_worker_does_not_wait() -> None:
    line, door = WaitingLine(0), Door(1)
    await door.enter(line, "a")
    assert door.passed == ["a"]
    assert len(line) == 0


async def test_order_holds_when_many_become_free_at_once() -> None:
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
        # A place becomes free just as another comes: it waits behind the earlier ones.
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


async def test_error_of_a_try_ends_the_wait() -> None:
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


async def enter(lines: WaitingLines, door: Door, name: str, among: Collection[int] | None = None) -> None:
    found = await lines.enter(lambda: door.look(name), time.monotonic() + 60, among)
    door.passed.append(found)


async def test_lines_of_other_workers_are_passed_by() -> None:
    lines, busy, idle = WaitingLines(1), Door(), Door(1)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(enter(lines, busy, "a", {1}))
        await waiting(lines, 1)
        await enter(lines, idle, "b", {2})
        assert idle.passed == ["b"]
        # Nor does a full line of others keep a request from waiting.
        with pytest.raises(Overloaded):
            await enter(lines, busy, "c", {1})
        tasks.create_task(enter(lines, idle, "d", {2}))
        tasks.create_task(enter(lines, idle, "e"))
        await waiting(lines, 3)
        idle.places = 2
        lines.wake()
        await waiting(lines, 1)
        busy.places = 1
        lines.wake()
    assert busy.passed == ["a"]
    assert sorted(idle.passed) == ["b", "d", "e"]


async def test_a_line_ends_with_its_last_request() -> None:
    lines, door = WaitingLines(10), Door()
    tasks = [asyncio.ensure_future(enter(lines, door, "a", {number})) for number in range(5)]
    await waiting(lines, 5)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert len(lines) == 0
    assert not lines._lines


async def test_lines_for_the_same_worker_take_turns() -> None:
    """A place goes to the request that came first, whatever line it stands in."""
    lines, door = WaitingLines(10), Door()
    async with asyncio.TaskGroup() as tasks:
        for name, among in (("a", {1, 2}), ("b", {1, 2}), ("c", {2, 3}), ("d", {1, 2}), ("e", None)):
            tasks.create_task(enter(lines, door, name, among))
            await waiting(lines, len(lines) + 1)
        for count in range(5):
            assert len(door.passed) == count
            door.places = 1
            lines.wake()
            await waiting(lines, 4 - count)
            await settle()
    assert door.passed == ["a", "b", "c", "d", "e"]


async def test_live_ids_keep_their_line_when_they_change() -> None:
    lines, door, ids = WaitingLines(1), Door(), LiveIds()
    ids.set(frozenset({1}))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(enter(lines, door, "a", ids))
        await waiting(lines, 1)
        ids.set(frozenset({1, 2}))
        with pytest.raises(Overloaded):
            await enter(lines, door, "b", ids)
        tasks.create_task(enter(lines, door, "c", LiveIds()))
        await waiting(lines, 2)
        door.places = 2
        lines.wake()
    assert door.passed == ["a", "c"]
    assert not lines._lines


async def test_request_waits_no_longer_than_it_may() -> None:
    line, door = WaitingLine(10, 0.05), Door()
    with pytest.raises(Overloaded, match=r"busy for 0\.05 s") as caught:
        await door.enter(line, "a")
    assert caught.value.retry_after_s
    with pytest.raises(DeadlineExceeded):
        await door.enter(line, "b", within_s=0.01)
    assert len(line) == 0


async def test_request_that_may_not_wait_is_refused_at_once() -> None:
    line, door = WaitingLine(10, 0.0), Door(1)
    await door.enter(line, "a")
    with pytest.raises(Overloaded, match="all workers are busy"):
        await door.enter(line, "b")
    assert (door.passed, len(line)) == (["a"], 0)
