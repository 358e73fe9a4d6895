"""Several slow calls at a time, with results in order: chunks are sent while further ones are hashed."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def overlapped(calls: AsyncGenerator[Coroutine[Any, Any, T]], *, limit_count: int) -> AsyncGenerator[T]:
    """Run up to `limit_count` calls at once, and yield their results in the order of the calls.

    While the consumer is busy, started calls go on, and no further call is started. The first error ends the
    iteration. When the generator is closed, or the consumer is cancelled, the calls under way are cancelled
    and awaited, and `calls` is closed.
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
