"""Following a prefix of the registry for as long as a task lives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dynamo_redis.store.base import Delete, DeleteCause, Put, Registry, WatchBatch
from dynamo_redis.supervision import Supervisor


async def follow(
    registry: Registry, prefix: str, apply: Callable[[WatchBatch], None], supervisor: Supervisor
) -> None:
    """Let `apply` have every batch of a watch; return when the registry is closed.

    A watch that fails, or a batch that `apply` raises for, costs a pause: then another watch is made, and its
    first batch reaches `apply` as a resync, with a delete of each key that went meanwhile.
    """
    known: set[str] = set()

    async def read() -> None:
        async with registry.watch(prefix) as watch:
            is_first = supervisor.failed_count > 0
            async for batch in watch:
                whole = _as_difference(batch, known) if is_first else batch
                is_first = False
                known.update(event.record.key for event in whole.events if isinstance(event, Put))
                apply(whole)
                known.difference_update(event.key for event in whole.events if isinstance(event, Delete))

    await supervisor.run(read)


def _as_difference(batch: WatchBatch, known: set[str]) -> WatchBatch:
    """Add to the first batch of a watch the deletes of `known` keys, of the watch before, that are gone."""
    gone = known - {event.record.key for event in batch.events if isinstance(event, Put)}
    deletes = (Delete(key, batch.revision, DeleteCause.RESYNC) for key in sorted(gone))
    return replace(batch, events=(*deletes, *batch.events), resync="the watch was started again")


def key_of(event: Put | Delete) -> str:
    """Return the key that a change is of."""
    return event.record.key if isinstance(event, Put) else event.key
