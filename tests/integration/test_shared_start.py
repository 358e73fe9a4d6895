"""Handlers that begin one after the other in one task: nobody may be able to tell."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import pytest

from dynamo_redis.planes.shared_start import SharedStart

seen: ContextVar[str] = ContextVar("seen", default="nothing")


class Work:
    """A request: `handler` is told its number, `task` is the one it got to itself."""

    def __init__(self, number: int, handler: Callable[[int], Awaitable[None]]) -> None:
        self.number = number
        self.handler = handler
        self.task: asyncio.Task[None] | None = None
        self.ended = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        try:
            await self.handler(self.number)
        finally:
            self.ended.set_result(None)

    def keep(self, task: asyncio.Task[None]) -> None:
        self.task = task


async def start(count: int, handler: Callable[[int], Awaitable[None]]) -> list[Work]:
    """Start so many at once, and let them begin."""
    shared, loop = SharedStart("test"), asyncio.get_running_loop()
    works = [Work(number, handler) for number in range(count)]
    for work in works:
        shared.start(work, loop)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return works


def current_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


async def test_handlers_that_do_not_wait_share_a_task_and_leave_no_trace() -> None:
    tasks: list[int] = []

    async def handler(_: int) -> None:
        async with asyncio.timeout(1):
            tasks.append(id(asyncio.current_task()))

    works = await start(20, handler)
    assert len(tasks) == 20
    assert len(set(tasks)) == 1
    assert all(work.ended.done() and work.task is None for work in works)


async def test_what_a_handler_sets_is_not_seen_by_the_next() -> None:
    found: list[str] = []

    async def handler(number: int) -> None:
        found.append(seen.get())
        if number % 3 == 0:
            seen.set(f"what {number} left")

    await start(10, handler)
    assert found == ["nothing"] * 10


async def test_what_a_handler_sets_before_it_waits_is_not_seen_by_the_next() -> None:
    found: list[str] = []
    go_on = asyncio.Event()

    async def handler(number: int) -> None:
        found.append(seen.get())
        seen.set(f"what {number} left")
        await go_on.wait()
        found.append(seen.get())

    works = await start(3, handler)
    go_on.set()
    await asyncio.gather(*(work.ended for work in works))
    assert found == ["nothing"] * 3 + [f"what {number} left" for number in range(3)]


kept: list[Any] = []


def _keep_it(task: asyncio.Task[Any]) -> None:
    kept.append(task)


def _keep_it_weakly(task: asyncio.Task[Any]) -> None:
    kept.append(weakref.ref(task))


def _cancel_it(task: asyncio.Task[Any]) -> None:
    task.cancel()


def _add_a_callback(task: asyncio.Task[Any]) -> None:
    task.add_done_callback(lambda _: None)


def _plan_its_end(task: asyncio.Task[Any]) -> None:
    kept.append(asyncio.get_running_loop().call_later(60, task.cancel))


@pytest.mark.parametrize(
    "trace", [_keep_it, _keep_it_weakly, _cancel_it, _add_a_callback, _plan_its_end], ids=lambda f: f.__name__
)
async def test_a_task_that_somebody_knows_is_not_handed_on(
    trace: Callable[[asyncio.Task[Any]], None],
) -> None:
    tasks: list[int] = []

    async def handler(number: int) -> None:
        tasks.append(id(asyncio.current_task()))
        if number == 1:
            trace(current_task())

    works = await start(5, handler)
    await asyncio.gather(*(work.ended for work in works))
    assert tasks[0] == tasks[1]
    assert tasks[1] not in tasks[2:]
    while kept:
        if isinstance(last := kept.pop(), asyncio.TimerHandle):
            last.cancel()


async def test_all_begin_though_the_first_waits() -> None:
    begun: list[int] = []
    go_on = asyncio.Event()

    async def handler(number: int) -> None:
        begun.append(number)
        await go_on.wait()

    works = await start(50, handler)
    assert begun == list(range(50))
    assert len({work.task for work in works}) == 50
    go_on.set()
    await asyncio.gather(*(work.ended for work in works))


async def test_a_handler_that_waits_keeps_none_of_those_it_began_with() -> None:
    async def handler(number: int) -> None:
        if number == 5:
            await asyncio.Event().wait()

    works = await start(10, handler)
    task, others = works[5].task, [weakref.ref(work) for work in works if work.number != 5]
    works.clear()
    assert [other() for other in others] == [None] * 9
    assert task is not None
    task.cancel()
    await asyncio.wait([task])


async def test_a_cancellation_hits_the_handler_that_has_the_task_to_itself() -> None:
    cancelled: list[int] = []

    async def handler(number: int) -> None:
        if number < 3:
            return
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(number)
            if number == 4:  # it goes on all the same
                await asyncio.sleep(0)
                cancelled.append(-number)
                return
            raise

    works = await start(6, handler)
    for number in (3, 4):
        task = works[number].task
        assert task is not None
        task.cancel()
        await works[number].ended
    assert cancelled == [3, 4, -4]
    last = works[5].task
    assert last is not None
    assert not last.done()
    last.cancel()
    await works[5].ended


@pytest.mark.parametrize("error", [asyncio.CancelledError, ValueError])
async def test_a_handler_that_raises_holds_up_nobody(error: type[BaseException]) -> None:
    begun: list[int] = []

    async def handler(number: int) -> None:
        begun.append(number)
        if number == 1:
            raise error

    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda *_: None)
    works = await start(4, handler)
    await asyncio.gather(*(work.ended for work in works))
    assert begun == [0, 1, 2, 3]


async def test_a_handler_that_waits_again_and_again_is_fed_what_it_waits_for() -> None:
    results: list[list[int]] = []

    async def handler(number: int) -> None:
        async def numbers() -> AsyncIterator[int]:
            for each in range(3):
                await asyncio.sleep(0)
                future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
                asyncio.get_running_loop().call_soon(future.set_result, each * number)
                yield await future

        async with asyncio.timeout(5):
            results.append([item async for item in numbers()])

    works = await start(3, handler)
    await asyncio.gather(*(work.ended for work in works))
    assert sorted(results) == [[0, 0, 0], [0, 1, 2], [0, 2, 4]]
