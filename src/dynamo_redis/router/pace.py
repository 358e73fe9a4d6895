"""The pause between reads of a stream whose entries come one by one. A read costs the server much, even if it
returns one entry."""

from __future__ import annotations

import asyncio


class Pace:
    """Keeps `pause_s` between reads that return entries.

    The first read after a silence does not wait. A read does not wait either if the one before it returned as
    many entries as a read can.
    """

    def __init__(self, pause_s: float, full_count: int) -> None:
        """A read that returned `full_count` entries is taken to have left some behind."""
        self._pause_s = pause_s
        self._full_count = full_count
        self._due_at = 0.0

    async def wait(self, entry_count: int) -> None:
        """Wait, if it is too early to read again after a read that returned `entry_count` entries."""
        now = asyncio.get_running_loop().time()
        if not entry_count or entry_count >= self._full_count:
            return
        wait_s, self._due_at = self._due_at - now, max(now, self._due_at) + self._pause_s
        if wait_s > 0:
            await asyncio.sleep(wait_s)
