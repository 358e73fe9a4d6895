"""Lines of requests that wait while all workers that may take them are busy: first come first served, with a
bound and deadlines.

Requests for the same workers stand in one line, and each set of workers has a line of its own: the requests
for one model wait neither for those for another, nor for their room. Where sets overlap, a worker that
becomes free takes the request that has waited longest.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator
from typing import TypeVar

from dynamo_redis.clock import SYSTEM_CLOCK
from dynamo_redis.errors import DeadlineExceeded, Overloaded
from dynamo_redis.runtime.among import LiveIds

Answer = TypeVar("Answer")

RETRY_AFTER_S = 1.0
"""What a request that may not even wait is told."""


class WaitingLines:
    """The lines of a router, by the instances that a request may go to; None are all.

    It owns no task. A line exists while a request waits in it.
    """

    def __init__(self, limit: int) -> None:
        """`limit` is how many requests may wait in each."""
        self._limit = limit
        self._lines: dict[Hashable, WaitingLine] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        """Requests that wait, in all lines."""
        return sum(map(len, self._lines.values()))

    async def enter(
        self, look: Callable[[], Answer | None], deadline: float, among: Collection[int] | None = None
    ) -> Answer:
        """Wait as `WaitingLine.enter` says, in the line of the requests that may go to the same instances: to
        those of the same `LiveIds`, or to ids that are equal."""
        key = among if among is None or isinstance(among, LiveIds) else frozenset(among)
        line = self._lines.setdefault(key, WaitingLine(self._limit, self._numbers))
        try:
            return await line.enter(look, deadline)
        finally:
            if not len(line):
                self._lines.pop(key, None)

    def wake(self) -> None:
        """Let the first of each line look, the one that came first before the others: a worker may have
        become free."""
        for line in sorted(self._lines.values(), key=WaitingLine.first_number):
            line.wake()


class _Waiter:
    """A request in a line. `number` grows with the time at which it came, `turn` ends when it may look."""

    __slots__ = ("number", "turn")

    def __init__(self, number: int, turn: asyncio.Future[None]) -> None:
        self.number = number
        self.turn = turn


class WaitingLine:
    """One line of requests. `wake` lets the first one look whether its turn has come.

    It owns no task. At most `limit` requests wait; past that the answer is Overloaded, at once.
    """

    def __init__(self, limit: int, numbers: Iterator[int] | None = None) -> None:
        """`numbers` are given to the requests in the order in which they come."""
        self._limit = limit
        self._numbers = itertools.count() if numbers is None else numbers
        self._line: deque[_Waiter] = deque()

    def __len__(self) -> int:
        return len(self._line)

    def first_number(self) -> int:
        """The number of the request that has waited longest; -1 if none waits."""
        return self._line[0].number if self._line else -1

    async def enter(self, look: Callable[[], Answer | None], deadline: float) -> Answer:
        """What `look` finds, as soon as that is something and all who came before have theirs.

        `deadline` is monotonic. `look` must not wait; what it raises ends the waiting. Cancelling it leaves
        the line. Raises Overloaded if no more may wait, DeadlineExceeded.
        """
        if not self._line and (found := look()) is not None:
            return found
        if len(self._line) >= self._limit:
            raise Overloaded("all workers are busy, and as many requests wait as may", RETRY_AFTER_S)
        loop = asyncio.get_running_loop()
        waiter = _Waiter(next(self._numbers), loop.create_future())
        self._line.append(waiter)
        try:
            async with asyncio.timeout(deadline - SYSTEM_CLOCK.monotonic()):
                while True:
                    await waiter.turn
                    if (found := look()) is not None:
                        return found
                    waiter.turn = loop.create_future()
        except TimeoutError:
            raise DeadlineExceeded("all workers were busy until the request's deadline") from None
        finally:
            self._line.remove(waiter)
            self.wake()

    def wake(self) -> None:
        """A worker may have become free: the first in the line looks, then the next."""
        if self._line and not self._line[0].turn.done():
            self._line[0].turn.set_result(None)
