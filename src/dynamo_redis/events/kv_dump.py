"""The endpoint `kv_dump`: a worker tells a router what it has missed, or everything.

    request  {"have": [[epoch, dp_rank, next_sequence], …]}   what the caller has applied of this instance
    answer   for each rank {"epoch", "dp_rank", "kind", "next_sequence", "event_plane", "block_size"}, and
             then any number of {"batch": …}

A `range` goes on at the caller's `next_sequence`. A `dump` is the rank's blocks, to be applied to an emptied
worker; its batches all bear the rank's `next_sequence`. Either way the caller has then applied all before
the `next_sequence` of the answer. What a rank says is of one moment; ranks are asked one after the other.
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


def _do_nothing() -> None:
    pass


class KvDump:
    """The endpoint of one instance, for the ranks that are in `ranks` when it is asked."""

    def __init__(
        self,
        ranks: Mapping[PublisherId, KvPublisher],
        *,
        event_plane: str = "stream",
        on_asked: Callable[[], None] = _do_nothing,
    ) -> None:
        """`event_plane` is how the ranks' events are sent. `on_asked` is called before an answer is made: a
        router reads events, and wants those that follow the answer."""
        self._ranks = ranks
        self._event_plane = event_plane
        self._on_asked = on_asked

    async def generate(self, request: Any) -> AsyncGenerator[dict[str, Any], None]:
        """Answer in pieces of some 32 KiB, one a turn of the loop. Raises InvalidRequest."""
        have = _read(request)
        self._on_asked()
        for publisher_id, rank in tuple(self._ranks.items()):
            kind, batches = _tell(publisher_id, rank, have.get((publisher_id.epoch, publisher_id.dp_rank)))
            yield {
                "epoch": publisher_id.epoch,
                "dp_rank": publisher_id.dp_rank,
                "kind": kind,
                "next_sequence": rank.next_sequence,
                "event_plane": self._event_plane,
                "block_size": rank.block_size,
            }
            for batch in batches:
                await asyncio.sleep(0)
                yield {"batch": batch.to_bytes()}


def _tell(
    publisher_id: PublisherId, rank: KvPublisher, next_sequence: int | None
) -> tuple[str, Iterator[EventBatch]]:
    events = None if next_sequence is None else rank.events_from(next_sequence)
    if events is not None and next_sequence is not None:
        return "range", _batches(publisher_id, events, next_sequence, step=1)
    return "dump", _batches(publisher_id, rank.dump(), rank.next_sequence, step=0)


def _batches(
    publisher_id: PublisherId, events: Iterable[KvEvent], first_sequence: int, *, step: int
) -> Iterator[EventBatch]:
    batch: list[Any] = []
    block_count = 0

    def made() -> EventBatch:
        at_ms = int(SYSTEM_CLOCK.wall() * 1000)
        return EventBatch(KV_EVENTS, publisher_id, first_sequence, at_ms, batch)

    for event in events:
        if batch and (
            len(batch) == _BATCH_EVENT_COUNT or block_count + len(event.hashes) > _BATCH_BLOCK_COUNT
        ):
            yield made()
            first_sequence += step * len(batch)
            batch, block_count = [], 0
        batch.append(event.to_wire())
        block_count += len(event.hashes)
    if batch:
        yield made()


def _read(request: Any) -> dict[tuple[int, int], int]:
    """What the caller has: (epoch, rank) → next sequence."""
    have = request.get("have", []) if isinstance(request, Mapping) else None
    if not isinstance(have, list):
        raise InvalidRequest('kv_dump takes {"have": [[epoch, dp_rank, next_sequence], …]}')
    known: dict[tuple[int, int], int] = {}
    for entry in have:
        if not isinstance(entry, list) or len(entry) != 3 or not all(type(part) is int for part in entry):
            raise InvalidRequest(f"not [epoch, dp_rank, next_sequence]: {str(entry)[:80]}")
        epoch, dp_rank, next_sequence = entry
        known[epoch, dp_rank] = next_sequence
    return known
