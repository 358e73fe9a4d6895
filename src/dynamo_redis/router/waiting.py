"""Where requests wait while every worker is busy: first come first served, bounded, with deadlines."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from dynamo_redis.clock import SYSTEM_CLOCK
from dynamo_redis.errors import DeadlineExceeded, Overloaded

Answer = TypeVar("Answer")

RETRY_AFTER_S = 1.0
"""What a request that may not even wait is told."""


class WaitingLine:
    """A line of requests. `wake` lets the first one look whether its turn has come.

    It owns no task. At most `limit` requests wait; past that the answer is Overloaded, at once.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._line: deque[asyncio.Future[None]] = deque()

    def __len__(self) -> int:
        return len(self._line)

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
        turn = loop.create_future()
        self._line.append(turn)
        try:
            async with asyncio.timeout(deadline - SYSTEM_CLOCK.monotonic()):
                while True:
                    await turn
                    if (found := look()) is not None:
                        return found
                    self._line[0] = turn = loop.create_future()
        except TimeoutError:
            raise DeadlineExceeded("all workers were busy until the request's deadline") from None
        finally:
            self._line.remove(turn)
            self.wake()

    def wake(self) -> None:
        """A worker may have become free: the first in the line looks, then the next."""
        if self._line and not self._line[0].done():
            self._line[0].set_result(None)
