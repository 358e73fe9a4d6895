"""Detects leftovers of a fuzz: unhandled errors, tasks, objects, memory."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

SETTLES_WITHIN_S: Final = 40.0
_POLL_S: Final = 0.01
_PACKAGE: Final = "dynamo_redis"


class Complaints:
    """Collects the signs of an unhandled error in the code."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def check(self) -> None:
        """Raise AssertionError with the collected signs, if there are any."""
        assert not self.messages, "\n".join(self.messages[:5])

    def on_loop(self, loop: asyncio.AbstractEventLoop, about: dict[str, Any]) -> None:
        """The event loop's exception handler: a callback raised, or an error was never retrieved."""
        error = about.get("exception")
        where = "".join(traceback.format_exception(error)) if error is not None else ""
        self.messages.append(f"event loop: {about.get('message')}: {error!r}\n{where}")

    def on_unraisable(self, about: Any) -> None:
        """The interpreter's hook: a finalizer raised, or a coroutine was never awaited."""
        self.messages.append(f"unraisable: {about.err_msg or about.object!r}: {about.exc_value!r}")


class _Recorder(logging.Handler):
    """Turns error lines of the package's log into complaints, except those about handlers that raise."""

    def __init__(self, complaints: Complaints) -> None:
        super().__init__(logging.ERROR)
        self._complaints = complaints

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if not message.startswith("the handler of"):
            self._complaints.messages.append(f"log: {message}: {record.exc_info and record.exc_info[1]!r}")


@contextmanager
def complaints(*, with_garbage: bool = True) -> Iterator[Complaints]:
    """Collect the complaints of the running event loop; check them at the end, by default with those of
    objects that the garbage collector frees there."""
    found, loop = Complaints(), asyncio.get_running_loop()
    recorder, log = _Recorder(found), logging.getLogger(_PACKAGE)
    hooks = loop.get_exception_handler(), sys.unraisablehook, log.propagate
    loop.set_exception_handler(found.on_loop)
    sys.unraisablehook = found.on_unraisable
    log.addHandler(recorder)
    log.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield found
            if with_garbage:
                gc.collect()
        found.check()
    finally:
        loop.set_exception_handler(hooks[0])
        sys.unraisablehook = hooks[1]
        log.propagate = hooks[2]
        log.removeHandler(recorder)


async def settled(condition: Callable[[], bool], what: Callable[[], object]) -> None:
    """Wait until `condition` holds; raises AssertionError with `what()` if it does not come true."""
    deadline = time.monotonic() + SETTLES_WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, f"this did not settle: {what()}"
        await asyncio.sleep(_POLL_S)


class Newcomers:
    """The package's objects that are newer than this one: older objects may outlive their tests."""

    def __init__(self) -> None:
        self._earlier = {id(found): found for found in _living(_PACKAGE)}

    def living(self, *modules: str) -> list[Any]:
        """Return those of the package's `modules`, after a garbage collection."""
        found = _living(*(f"{_PACKAGE}.{module}" for module in modules))
        return [one for one in found if id(one) not in self._earlier]

    def census(self, *modules: str) -> Counter[str]:
        """Count the living objects of each class of the package's `modules`."""
        return Counter(type(found).__name__ for found in self.living(*modules))


def _living(*prefixes: str) -> list[Any]:
    gc.collect()
    return [found for found in gc.get_objects() if str(type(found).__module__).startswith(prefixes)]


def contents(owner: object) -> dict[str, int]:
    """Return the lengths of the non-empty containers among the attributes of an object."""
    slots = {name for cls in type(owner).__mro__ for name in getattr(cls, "__slots__", ())}
    found = {name: getattr(owner, name, None) for name in {*slots, *getattr(owner, "__dict__", ())}}
    return {
        name: len(value)
        for name, value in found.items()
        if isinstance(value, dict | list | set | deque) and value
    }


class MemoryMark:
    """The memory in use at one moment, to compare with later."""

    def __init__(self) -> None:
        gc.collect()
        self._types = Counter(type(found).__qualname__ for found in gc.get_objects())
        self._blocks = sys.getallocatedblocks()

    def check(self, *, objects: int, blocks: int) -> None:
        """Raises AssertionError if a class has more than `objects` new objects, or the interpreter has more
        than `blocks` allocations (whatever they hold) than at the mark."""
        now = MemoryMark()
        grown = {name: count for name, count in (now._types - self._types).items() if count > objects}
        assert not grown, f"objects left: {grown}"
        more = now._blocks - self._blocks
        assert more <= blocks, f"{more} allocations left"
