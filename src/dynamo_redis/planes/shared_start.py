"""Starting handlers without a task each, on Python 3.11; from 3.12 on there are eager tasks for that.

A task costs more than all the rest of a small request at its server. So the handlers of an endpoint that are
started in one turn of the event loop begin one after the other in one task. A handler that ends without ever
waiting hands the task on to the next. The first that waits keeps it, and those behind it get their own.

Within a handler, `current_task()` is a real task: `asyncio.timeout`, task groups and anyio work. That it was
another handler's before must not be seen, so it is handed on only without a trace: no context variable set,
no cancellation requested, no callback added, nobody left who refers to the task, strongly or weakly. After a
trace, those behind get tasks of their own, too.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Coroutine, Generator, Iterable
from contextvars import Context, copy_context
from sys import getrefcount
from typing import Any, Final, Protocol
from weakref import getweakrefcount

_APART_COUNT: Final = 64
"""After a handler that waited, so many requests get tasks at once: its like will wait as well, and whoever
keeps a shared task pays for two more frames at each step."""


class Startable(Protocol):
    """A request whose handler is to start."""

    def run(self) -> Coroutine[Any, None, None]:
        """Run the handler."""
        ...

    def keep(self, task: asyncio.Task[None]) -> None:
        """The handler waits; `task` is its own from now on."""
        ...


class SharedStart:
    """Starts the handlers of one endpoint."""

    __slots__ = ("_apart_count", "_name", "_waiting")

    def __init__(self, name: str) -> None:
        """`name` is that of the tasks."""
        self._name = name
        self._apart_count = 0
        self._waiting: list[Startable] = []

    def start(self, request: Startable, loop: asyncio.AbstractEventLoop) -> None:
        """Start a handler in the next turn of the event loop."""
        if self._apart_count:
            self._apart_count -= 1
            self._start_apart((request,), loop, None)
            return
        self._waiting.append(request)
        if len(self._waiting) == 1:
            loop.create_task(self._start_together(loop), name=self._name)

    async def _start_together(self, loop: asyncio.AbstractEventLoop) -> None:
        await self._one_after_the_other(loop)

    def _start_apart(
        self, requests: Iterable[Startable], loop: asyncio.AbstractEventLoop, context: Context | None
    ) -> None:
        for request in requests:
            own = None if context is None else context.copy()
            request.keep(loop.create_task(request.run(), name=self._name, context=own))

    @types.coroutine
    def _one_after_the_other(self, loop: asyncio.AbstractEventLoop) -> Generator[Any, Any, None]:
        requests, self._waiting = self._waiting, []
        task = asyncio.current_task()
        assert task is not None
        context = copy_context()
        references, weak_references = getrefcount(task), getweakrefcount(task)
        begun_count = 0
        try:
            for request in requests:
                begun_count += 1
                run = request.run()
                try:
                    awaited = run.send(None)
                except StopIteration:
                    if (
                        getrefcount(task) == references
                        and getweakrefcount(task) == weak_references
                        and copy_context() == context
                        and not task.cancelling()
                        and not task._callbacks
                    ):
                        continue
                    return
                self._apart_count = _APART_COUNT
                request.keep(task)
                self._start_apart(requests[begun_count:], loop, context)
                requests.clear()  # or they, and what this one waits for, are kept for as long as it runs
                going_on = _go_on(run, awaited)
                del awaited
                yield from going_on
                return
        finally:
            self._start_apart(requests[begun_count:], loop, context)


def _go_on(run: Coroutine[Any, None, None], awaited: Any) -> Generator[Any, Any, None]:
    """Let a coroutine that was begun by hand wait for `awaited`, and then run as part of this one."""
    while True:
        try:
            yield awaited
        except BaseException as exc:  # noqa: BLE001 - it is the coroutine's
            try:
                awaited = run.throw(exc)
            except StopIteration:
                return
        else:
            del awaited
            yield from run.__await__()
            return
