"""Keeping long-lived tasks at work: one bad value costs that value, a failure costs a pause.

A task that reads values of other processes gives each value to its `Supervisor`, by `each` or `skip`. A value
that cannot be used is left out, counted, and named in the log. `run` is for failures of the reading itself:
it starts the work again after a pause, for as long as the task lives.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Final, TypeVar

from dynamo_redis.errors import DynamoRedisError, InvalidRecord, StoreUnavailable
from dynamo_redis.rate_limited_log import RateLimitedLog

PAUSES_S: Final = (0.1, 5.0)
"""The first pause after a failure, and the longest."""

T = TypeVar("T")


class Supervisor:
    """Keeps one long-lived task at work. It owns no resources and belongs to that task's event loop.

    `skipped_count` is the number of values left out, `failed_count` that of failures of the work.
    """

    def __init__(self, log: logging.Logger, task: str, *, pauses_s: tuple[float, float] = PAUSES_S) -> None:
        """`task` is its name in the log, for example "view of dynamo.backend.generate"."""
        self.skipped_count = 0
        self.failed_count = 0
        self._log = log
        self._lines = RateLimitedLog(log)
        self._task = task
        self._pauses_s = pauses_s

    # ----------------------------------------------------------------- one bad value

    def each(self, values: Iterable[T], take: Callable[[T], None], name: Callable[[T], str]) -> None:
        """Call `take` with each value. A value for which it raises is left out; `name` gives its name in the
        log."""
        for value in values:
            try:
                take(value)
            except Exception as exc:  # noqa: BLE001 - logged, with its traceback
                self.skip(name(value), exc)

    def skip(self, name: str, exc: Exception) -> None:
        """Log that a value is left out. An exception that is not of this package is a defect: it is logged
        with its traceback."""
        self.skipped_count += 1
        names_its_key = isinstance(exc, InvalidRecord) and exc.key
        self._log_failure("left out" if names_its_key else f"left out {name}", exc, name)

    # ----------------------------------------------------------------- a failure of the work itself

    async def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run the work until it returns.

        A failure is logged, and the work starts again after a pause. The pause grows while the work keeps
        failing soon after its start. StoreUnavailable is logged at debug only: the registry logs it once.
        """
        shortest_s, longest_s = self._pauses_s
        pause_s = shortest_s
        while True:
            began_at = time.monotonic()
            try:
                await work()
                return
            except Exception as exc:  # noqa: BLE001 - logged, with its traceback
                self.failed(exc)
            if time.monotonic() - began_at > 2 * longest_s:
                pause_s = shortest_s
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            pause_s = min(2 * pause_s, longest_s)

    def failed(self, exc: Exception) -> None:
        """Log that the work failed and starts again; for work that makes its own pauses."""
        self.failed_count += 1
        if isinstance(exc, StoreUnavailable):
            self._log.debug("%s: starting it again: %s", self._task, exc)
        else:
            self._log_failure("failed, starting it again", exc, type(exc).__name__)

    def _log_failure(self, text: str, exc: Exception, kind: str) -> None:
        is_defect = not isinstance(exc, DynamoRedisError)
        shown = f"{type(exc).__name__}: {exc}" if is_defect else exc
        self._lines.log("%s: %s: %s", self._task, text, shown, kind=kind, exc_info=exc if is_defect else None)


@asynccontextmanager
async def supervised(
    log: logging.Logger, task: str, work: Callable[[], Awaitable[None]]
) -> AsyncIterator[None]:
    """Run `work` in a task that ends with the block. A failure is logged, and `work` starts again."""
    running = asyncio.create_task(Supervisor(log, task).run(work), name=task)
    try:
        yield
    finally:
        running.cancel()
        await asyncio.wait([running])
