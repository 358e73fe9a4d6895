"""Several slow calls at a time, their results in order: how chunks travel while others are hashed."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def overlapped(calls: AsyncGenerator[Coroutine[Any, Any, T]], *, limit_count: int) -> AsyncGenerator[T]:
    """Run up to `limit_count` calls at once, and yield what they answer in the order they came.

    While the consumer is busy the calls that have begun go on, and no further one begins. The first to fail
    ends it with its error. When it is closed, or the consumer cancelled, the calls under way are cancelled
    and have ended; `calls` is closed, too.
    """
    running: deque[asyncio.Task[T]] = deque()
    async with contextlib.aclosing(calls):
        try:
            async for call in calls:
                running.append(asyncio.create_task(call))
                if len(running) == limit_count or running[0].done():
                    yield await _first(running)
            while running:
                yield await _first(running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


async def _first(running: deque[asyncio.Task[T]]) -> T:
    answer = await running[0]
    running.popleft()
    return answer
