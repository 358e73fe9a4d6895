"""The pause between reads of a stream whose entries come singly: each read costs a server much, however
little it finds."""

from __future__ import annotations

import asyncio


class Pace:
    """Keeps `pause_s` between the reads that find something. The first one after a silence is not put off,
    nor is one while more waits than a read takes."""

    def __init__(self, pause_s: float, full_count: int) -> None:
        """A read that found `full_count` has left some behind."""
        self._pause_s = pause_s
        self._full_count = full_count
        self._due_at = 0.0

    async def keep(self, found_count: int) -> None:
        """Wait, if it is too early to read again after a read that found so much."""
        now = asyncio.get_running_loop().time()
        if not found_count or found_count >= self._full_count:
            return
        wait_s, self._due_at = self._due_at - now, max(now, self._due_at) + self._pause_s
        if wait_s > 0:
            await asyncio.sleep(wait_s)
