"""The endpoint `kv_dump`: a worker sends a router the events that it has missed, or all blocks.

    request  {"have": [[epoch, dp_rank, next_sequence], …]}   the events applied of each rank
    answer   for each rank {"epoch", "dp_rank", "kind", "next_sequence", "event_plane", "event_shards",
             "block_size"}, and then any number of {"batch": …}

A `range` has the events from the caller's `next_sequence` on. A `dump` has the rank's blocks, to be applied
to an emptied worker; each of its batches has the rank's `next_sequence`. After either, the caller has applied
all events before the answer's `next_sequence`. The answer of each rank shows one moment; the ranks follow one
after the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from dynamo_redis.clock import SYSTEM_CLOCK
from dynamo_redis.errors import InvalidRequest
from dynamo_redis.events.kv_publisher import KvPublisher
from dynamo_redis.wire.event import EventBatch, PublisherId
from dynamo_redis.wire.kv_event import KvEvent
from dynamo_redis.wire.topics import KV_EVENTS

_BATCH_EVENT_COUNT: Final = 256
_BATCH_BLOCK_COUNT: Final = 4096


class KvDump:
    """The endpoint of one instance, for the ranks that are in `ranks` when it is asked."""

    def __init__(
        self,
        ranks: Mapping[PublisherId, KvPublisher],
        *,
        event_plane: str = "stream",
        shards_count: int = 1,
        on_asked: Callable[[], None] | None = None,
    ) -> None:
        """`event_plane` is the event plane by which the ranks' events are sent, over `shards_count` streams.
        `on_asked` is called before
        an answer is made: there is a router, which will read the events that follow the answer."""
        self._ranks = ranks
        self._event_plane = event_plane
        self._shards_count = shards_count
        self._on_asked = on_asked

    async def generate(self, request: Any) -> AsyncGenerator[dict[str, Any], None]:
        """Answer in pieces of some 32 KiB, one a turn of the loop. Raises InvalidRequest."""
        have = request.get("have", []) if isinstance(request, Mapping) else None
        if not isinstance(have, list):
            raise InvalidRequest('kv_dump takes {"have": [[epoch, dp_rank, next_sequence], …]}')
        next_sequences: dict[tuple[int, int], int] = {}
        for entry in have:
            if not isinstance(entry, list) or [type(part) for part in entry[:3]] != [int] * 3:
                raise InvalidRequest(f"not [epoch, dp_rank, next_sequence]: {str(entry)[:80]}")
            epoch, dp_rank, next_sequence = entry[:3]  # a later release may add fields
            next_sequences[epoch, dp_rank] = next_sequence
        if self._on_asked is not None:
            self._on_asked()
        for publisher_id, rank in tuple(self._ranks.items()):
            wanted = next_sequences.get((publisher_id.epoch, publisher_id.dp_rank))
            events = None if wanted is None else rank.events_from(wanted)
            if events is not None and wanted is not None:
                kind, batches = "range", _batches(publisher_id, events, wanted, step=1)
            else:
                kind, batches = "dump", _batches(publisher_id, rank.dump(), rank.next_sequence, step=0)
            yield {
                "epoch": publisher_id.epoch,
                "dp_rank": publisher_id.dp_rank,
                "kind": kind,
                "next_sequence": rank.next_sequence,
                "event_plane": self._event_plane,
                "event_shards": self._shards_count,
                "block_size": rank.block_size,
            }
            for batch in batches:
                await asyncio.sleep(0)
                yield {"batch": batch.to_bytes()}


def _batches(
    publisher_id: PublisherId, events: Iterable[KvEvent], first_sequence: int, *, step: int
) -> Iterator[EventBatch]:
    """Yield events in batches of limited size. `step` is 1 if events have sequences of their own, 0 if all
    batches have the first one."""
    batch: list[Any] = []
    block_count = 0

    def closed() -> EventBatch:
        at_ms = int(SYSTEM_CLOCK.wall() * 1000)
        return EventBatch(KV_EVENTS, publisher_id, first_sequence, at_ms, batch)

    for event in events:
        if batch and (
            len(batch) == _BATCH_EVENT_COUNT or block_count + len(event.hashes) > _BATCH_BLOCK_COUNT
        ):
            yield closed()
            first_sequence += step * len(batch)
            batch, block_count = [], 0
        batch.append(event.to_wire())
        block_count += len(event.hashes)
    if batch:
        yield closed()
