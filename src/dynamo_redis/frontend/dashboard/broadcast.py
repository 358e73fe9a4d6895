"""One state for all browsers: a task makes it while at least one looks, each gets the newest."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Final

from dynamo_redis.frontend.dashboard.page_state import State, difference
from dynamo_redis.supervision import Supervisor

log = logging.getLogger(__name__)

PAUSE_S: Final = 1.0
"""Seconds between two states."""

MOST_VIEWERS: Final = 64
"""Browsers that look at one process at a time."""

_encode = json.JSONEncoder(separators=(",", ":")).encode


class Broadcast:
    """Makes a state each second while it has viewers, and keeps the newest one and its difference to the one
    before, encoded once for all.

    A viewer that has taken the state before gets the difference. One that is slower, or new, gets the whole
    newest state: nothing is queued for it. The task ends when the last viewer leaves.
    """

    def __init__(self, sample: Callable[[], Awaitable[State]], *, pause_s: float = PAUSE_S) -> None:
        """`sample` makes a state; an error of it costs that state."""
        self._sample = sample
        self._pause_s = pause_s
        self._sampler: asyncio.Task[None] | None = None
        self._supervisor = Supervisor(log, "the dashboard's sampler")
        self._changed = asyncio.Event()
        self._version = 0
        self._state: State | None = None
        self._change = b""
        self._whole: bytes | None = None
        self._is_over = False
        self.viewer_count = 0

    async def frames(self) -> AsyncGenerator[bytes]:
        """Yield server-sent events: `state`, then `change` or `state`, until `end`. Close it if it is left
        before its end."""
        self._enter()
        try:
            seen = 0
            while not self._is_over:
                if self._state is None or seen == self._version:
                    await self._changed.wait()
                    continue
                is_next = seen and seen == self._version - 1
                seen = self._version
                yield self._change if is_next else self._newest()
        finally:
            self._leave()

    def end(self) -> None:
        """End the frames of all viewers, for good."""
        self._is_over = True
        self._wake()

    def _enter(self) -> None:
        self.viewer_count += 1
        if self._sampler is None:
            self._sampler = asyncio.create_task(self._supervisor.run(self._run), name="sample dashboard")

    def _leave(self) -> None:
        self.viewer_count -= 1
        if not self.viewer_count and self._sampler is not None:
            self._sampler.cancel()
            self._sampler = self._state = self._whole = None
            self._change = b""

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._is_over:
            began_at = loop.time()
            before, state = self._state, await self._sample()
            self._change = b"" if before is None else _event("change", difference(before, state))
            self._state, self._whole = state, None
            self._version += 1
            self._wake()
            await asyncio.sleep(max(self._pause_s - (loop.time() - began_at), self._pause_s / 2))

    def _newest(self) -> bytes:
        if self._whole is None:
            self._whole = _event("state", self._state)
        return self._whole

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _event(name: str, value: Any) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), _encode(value).encode())
