"""The bound on the requests that a frontend has under way, and the line of those that wait for a place."""

from __future__ import annotations

import asyncio
import math
from types import TracebackType
from typing import Self

from starlette.types import Receive

from dynamo_redis.errors import Overloaded
from dynamo_redis.frontend.http.errors import frontend_full
from dynamo_redis.frontend.http.request_body import ClientGone
from dynamo_redis.router.choice.waiting_line import WaitingLine


class Admission:
    """The places for requests. A request that finds none waits in line, for a bounded time.

    A place is taken by `Place.take`, and given back at the end of the `with` block. Each request that waits
    has a task that sees its client hang up.
    """

    def __init__(self, limit: int | None, queue_limit: int, wait_s: float) -> None:
        """`limit` is the most requests under way; None: no bound. At most `queue_limit` requests wait, each
        for `wait_s` at most."""
        self._limit = limit
        self._line = WaitingLine(queue_limit, wait_s)
        self.taken_count = 0
        """The number of requests under way."""

    @property
    def waiting_count(self) -> int:
        """The number of requests that wait for a place."""
        return len(self._line)

    def place(self) -> Place:
        """Return a place that is not taken yet."""
        return Place(self)

    async def take(self, receive: Receive) -> None:
        """Take a place. Raises ApiError 503, and ClientGone if the client hangs up while it waits."""
        if not self._line and self._try_now():
            return
        limit = asyncio.timeout(None)

        async def leave_with_client() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            limit.reschedule(0.0)

        leaving = asyncio.create_task(leave_with_client())
        try:
            async with limit:
                await self._line.enter(self._try_now, math.inf)
        except Overloaded:
            raise frontend_full(self._limit or 0) from None
        except TimeoutError:
            raise ClientGone from None
        finally:
            leaving.cancel()

    def _try_now(self) -> bool | None:
        if self._limit is not None and self.taken_count >= self._limit:
            return None
        self.taken_count += 1
        return True

    def give_back(self) -> None:
        """Give a place back."""
        self.taken_count -= 1
        self._line.wake()


class Place:
    """One request's place, as a `with` block."""

    __slots__ = ("_admission", "_is_taken")

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._is_taken = False

    async def take(self, receive: Receive) -> None:
        """See `Admission.take`."""
        await self._admission.take(receive)
        self._is_taken = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_taken:
            self._is_taken = False
            self._admission.give_back()
