"""A watch of a registry prefix that is started again after each failure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dynamo_redis.store.base import Delete, DeleteCause, Put, Registry, WatchBatch
from dynamo_redis.supervision import Supervisor


async def follow(
    registry: Registry, prefix: str, apply: Callable[[WatchBatch], None], supervisor: Supervisor
) -> None:
    """Pass every batch of a watch of `prefix` to `apply`; return when the registry is closed.

    If the watch fails, or `apply` raises, a new watch is started after a pause. Its first batch reaches
    `apply` as a resync, with a delete of each key that is gone since the watch before.
    """
    known: set[str] = set()

    async def read() -> None:
        async with registry.watch(prefix) as watch:
            is_first = supervisor.failed_count > 0
            async for batch in watch:
                puts = {event.record.key for event in batch.events if isinstance(event, Put)}
                if is_first:  # the first batch has puts only: add deletes for keys of the watch before
                    gone = sorted(known - puts)
                    deletes = (Delete(key, batch.revision, DeleteCause.RESYNC) for key in gone)
                    events = (*deletes, *batch.events)
                    batch = replace(batch, events=events, resync="the watch was started again")
                    is_first = False
                known.update(puts)
                apply(batch)
                known.difference_update(event.key for event in batch.events if isinstance(event, Delete))

    await supervisor.run(read)


def key_of(event: Put | Delete) -> str:
    """Return the key of a put or a delete."""
    return event.record.key if isinstance(event, Put) else event.key
