"""Awaitables whose work starts at once, as those of `dynamo.runtime`.

They need not be awaited, `asyncio.wait` accepts them, and asyncio logs an error that is never awaited, as it
does for a task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

T = TypeVar("T")

_running: Final[set[asyncio.Task[Any]]] = set()
"""Strong references: the event loop itself keeps no task alive."""


def started(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Start `work` as a task of the running event loop; cancel the task to end it.

    Raises RuntimeError without a running event loop.
    """
    try:
        task = asyncio.get_running_loop().create_task(work)
    except RuntimeError:
        work.close()
        raise
    _running.add(task)
    task.add_done_callback(_running.discard)
    return task


def failed(error: Exception) -> asyncio.Future[Any]:
    """Return a future that already holds `error`."""
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    future.set_exception(error)
    return future
