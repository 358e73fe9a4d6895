"""Watches: of all keys, of one part, one with a slow consumer, and one that ends and goes on from its last
revision."""

from __future__ import annotations

import asyncio
import itertools
from typing import Final

from dynamo_redis.errors import Compacted
from dynamo_redis.store.base import Put, Registry, Revision, Watch, WatchBatch
from faults.history import recorded_value
from faults.roles.base import DATA, INSTANCES, Process

SLOW_S: Final = 0.4
"""Longest pause of the slow consumer between two batches, in seconds."""
RESUME_S: Final = 2.5
"""Longest life of a watch that is closed and resumed, in seconds."""


async def run(process: Process) -> None:
    """Watch until the end."""
    registry = await process.open_registry()
    process.recorder.note("started", role="watcher", lease=None)
    watcher = _Watcher(process, registry)
    try:
        await asyncio.gather(
            watcher.follow(""),
            watcher.follow(INSTANCES),
            watcher.follow(DATA, slow=True),
            watcher.resume(DATA),
        )
    finally:
        await registry.aclose()


class _Watcher:
    def __init__(self, process: Process, registry: Registry) -> None:
        self._process = process
        self._registry = registry
        self._numbers = itertools.count(1)

    async def follow(self, prefix: str, *, slow: bool = False) -> None:
        """Follow one watch for ever. A slow consumer becomes quick when the load rests."""
        name, watch = self._open(prefix)
        async for batch in watch:
            self._note(name, prefix, batch)
            if slow and not self._process.resting.is_set():
                await asyncio.sleep(self._process.rng.uniform(0, SLOW_S))

    async def resume(self, prefix: str) -> None:
        """Follow one watch after the other, each from the revision that the one before had reached."""
        name, watch = self._open(prefix)
        while True:
            reached = await self._follow_a_while(name, prefix, watch)
            reason = "compacted" if reached is None else "closed"
            self._process.recorder.note("unwatched", watch=name, reason=reason)
            name, watch = self._open(prefix, reached, resumes=None if reached is None else name)

    async def _follow_a_while(self, name: str, prefix: str, watch: Watch) -> Revision | None:
        """Follow until a random moment after the first batch. Returns the last revision shown, or None if the
        log no longer holds the revision at which the watch was to start."""
        limit_s = self._process.rng.uniform(0.1, RESUME_S)
        reached: Revision | None = None
        async with watch:
            while True:
                timeout_s = None if reached is None or self._process.resting.is_set() else limit_s
                try:
                    batch = await asyncio.wait_for(anext(watch), timeout_s)
                except TimeoutError:
                    if self._process.resting.is_set():
                        continue  # no watch begins so late that it shows nothing before the end
                    return reached
                except Compacted:
                    return None
                self._note(name, prefix, batch)
                reached = batch.revision

    def _open(
        self, prefix: str, start: Revision | None = None, *, resumes: str | None = None
    ) -> tuple[str, Watch]:
        name = f"{self._process.orders.process}/{next(self._numbers)}"
        self._process.recorder.note(
            "watching", watch=name, prefix=prefix, start_revision=start, resumes=resumes
        )
        return name, self._registry.watch(prefix, start_revision=start)

    def _note(self, name: str, prefix: str, batch: WatchBatch) -> None:
        events = [
            ["put", event.record.key, recorded_value(event.record.value), event.record.mod_revision]
            if isinstance(event, Put)
            else ["delete", event.key, event.revision, event.cause]
            for event in batch.events
        ]
        self._process.recorder.note(
            "watch", watch=name, prefix=prefix, revision=batch.revision, resync=batch.resync, events=events
        )
