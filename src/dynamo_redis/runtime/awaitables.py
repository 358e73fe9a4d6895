"""Awaitables that have begun when they are handed out, as those of `dynamo.runtime` have.

Nothing has to await them, `asyncio.wait` takes them, and an error that is never awaited is logged by asyncio
as one of a task is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

T = TypeVar("T")

_running: Final[set[asyncio.Task[Any]]] = set()
"""The event loop itself keeps no task alive."""


def started(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Start work on the running event loop; cancelling the task ends it. Raises RuntimeError without one."""
    try:
        task = asyncio.get_running_loop().create_task(work)
    except RuntimeError:
        work.close()
        raise
    _running.add(task)
    task.add_done_callback(_running.discard)
    return task


def failed(error: Exception) -> asyncio.Future[Any]:
    """Make a future that has ended with an error already."""
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    future.set_exception(error)
    return future
