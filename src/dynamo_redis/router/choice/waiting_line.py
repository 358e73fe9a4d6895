"""Lines of requests that wait while all workers that may take them are busy: first come first served, with a
bound and deadlines.

Requests for the same workers wait in one line, and each set of workers has a line of its own. So requests for
one model do not wait behind requests for another, and do not find their line full because of them. Where sets
overlap, a worker that becomes free takes the request that has waited longest.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator
from typing import TypeVar

from dynamo_redis.clock import SYSTEM_CLOCK
from dynamo_redis.errors import DeadlineExceeded, Overloaded
from dynamo_redis.runtime.among import IdsWithout, LiveIds

T = TypeVar("T")

RETRY_AFTER_S = 1.0
"""Seconds after which a client may send a request again that found its line full."""


class WaitingLines:
    """The lines of a router, by the instances that a request may go to; None stands for all instances.

    It owns no task. A line exists while a request waits in it.
    """

    def __init__(self, limit: int, wait_s: float | None = None) -> None:
        """`limit` is the most requests that may wait in each line, and `wait_s` the longest time that each of
        them waits; None: until its deadline."""
        self._limit = limit
        self._wait_s = wait_s
        self._lines: dict[Hashable, WaitingLine] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        """Number of requests that wait, in all lines."""
        return sum(map(len, self._lines.values()))

    async def enter(
        self, try_now: Callable[[], T | None], deadline: float, among: Collection[int] | None = None
    ) -> T:
        """Wait as in `WaitingLine.enter`, in the line of the requests for the same instances: those with the
        same `LiveIds` or `IdsWithout`, or with equal ids."""
        key = among if among is None or isinstance(among, LiveIds | IdsWithout) else frozenset(among)
        line = self._lines.setdefault(key, WaitingLine(self._limit, self._wait_s, self._numbers))
        try:
            return await line.enter(try_now, deadline)
        finally:
            if not len(line):
                self._lines.pop(key, None)

    def wake(self) -> None:
        """Let the first request of each line try, in the order in which they came: a worker may have become
        free."""
        for line in sorted(self._lines.values(), key=WaitingLine.first_number):
            line.wake()


class _Waiter:
    """A request in a line. `number` grows in the order of arrival; `turn` is done when it may try."""

    __slots__ = ("number", "turn")

    def __init__(self, number: int, turn: asyncio.Future[None]) -> None:
        self.number = number
        self.turn = turn


class WaitingLine:
    """One line of requests. `wake` lets the first one try.

    It owns no task. At most `limit` requests wait, each for `wait_s` at most; further ones get Overloaded at
    once.
    """

    def __init__(self, limit: int, wait_s: float | None = None, numbers: Iterator[int] | None = None) -> None:
        """`numbers` numbers the requests in the order in which they come."""
        self._limit = limit
        self._wait_s = wait_s
        self._numbers = itertools.count() if numbers is None else numbers
        self._line: deque[_Waiter] = deque()

    def __len__(self) -> int:
        return len(self._line)

    def first_number(self) -> int:
        """Return the number of the request that has waited longest; -1 if none waits."""
        return self._line[0].number if self._line else -1

    async def enter(self, try_now: Callable[[], T | None], deadline: float) -> T:
        """Return the result of `try_now`, as soon as it is not None and all earlier requests have theirs.

        `deadline` is monotonic. `try_now` must not wait; an error that it raises ends the waiting. A call
        that is cancelled leaves the line. Raises DeadlineExceeded, and Overloaded if no more requests may
        wait, or this one has waited for `wait_s`.
        """
        if not self._line and (found := try_now()) is not None:
            return found
        if self._wait_s == 0:
            raise Overloaded("all workers are busy", RETRY_AFTER_S)
        if len(self._line) >= self._limit:
            raise Overloaded("all workers are busy, and the line of waiting requests is full", RETRY_AFTER_S)
        left_s = deadline - SYSTEM_CLOCK.monotonic()
        is_cut = self._wait_s is not None and self._wait_s < left_s
        loop = asyncio.get_running_loop()
        waiter = _Waiter(next(self._numbers), loop.create_future())
        self._line.append(waiter)
        try:
            async with asyncio.timeout(self._wait_s if is_cut else left_s):
                while True:
                    await waiter.turn
                    if (found := try_now()) is not None:
                        return found
                    waiter.turn = loop.create_future()
        except TimeoutError:
            if is_cut:
                raise Overloaded(f"all workers were busy for {self._wait_s:g} s", RETRY_AFTER_S) from None
            raise DeadlineExceeded("all workers were busy until the request's deadline") from None
        finally:
            self._line.remove(waiter)
            self.wake()

    def wake(self) -> None:
        """Let the first request in the line try, then the next: a worker may have become free."""
        if self._line and not self._line[0].turn.done():
            self._line[0].turn.set_result(None)
