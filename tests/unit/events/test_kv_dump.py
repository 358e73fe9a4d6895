"""The endpoint `kv_dump`: what it says is of one moment, whatever happens while it is said."""

from __future__ import annotations

from typing import Any

import pytest

from dynamo_redis.errors import InvalidRequest
from dynamo_redis.events.kv_dump import KvDump
from dynamo_redis.events.kv_publisher import KvPublisher
from dynamo_redis.wire.event import EventBatch, PublisherId
from dynamo_redis.wire.kv_event import CLEARED, STORED, KvEvent, read_kv_events

COUNT = 10_000
ME = PublisherId(7, 8, 0)
HEADER = {"epoch": 8, "dp_rank": 0, "event_plane": "stream", "event_shards": 1, "block_size": 1}


def _apply(held: set[int], events: list[KvEvent]) -> set[int]:
    for event in events:
        if event.kind == CLEARED:
            held.clear()
        elif event.kind == STORED:
            held.update(event.hashes)
        else:
            held.difference_update(event.hashes)
    return held


def _of(item: dict[str, Any]) -> tuple[EventBatch, list[KvEvent]]:
    batch = EventBatch.from_bytes(item["batch"])
    return batch, read_kv_events(batch.events)


async def test_rank_is_dumped_as_of_one_moment() -> None:
    rank = KvPublisher(None, block_size=1)
    rank.stored(range(COUNT), range(COUNT), None)
    then = set(rank.blocks())
    answer = KvDump({ME: rank}).generate({"have": []})
    header = await anext(answer)
    assert header == HEADER | {"kind": "dump", "next_sequence": 1}
    held: set[int] = set()
    number = 0
    rank.removed([5])
    async for item in answer:
        batch, events = _of(item)
        assert (batch.publisher, batch.first_sequence) == (ME, 1)
        assert len(item["batch"]) < 40_000
        _apply(held, events)
        rank.removed([COUNT - 1 - number])
        rank.stored([COUNT + number], [COUNT + number], None)
        number += 1
    assert number > 2
    assert held == then
    later = rank.events_from(header["next_sequence"])
    assert later is not None
    assert _apply(held, later) == set(rank.blocks())


async def test_a_range_goes_on_where_the_caller_is() -> None:
    rank = KvPublisher(None, block_size=1)
    for number in range(600):
        rank.stored([number], [number], None)
    have = [[8, 0, 10], [8, 1, 3], [9, 0, 5]]
    header, *items = [item async for item in KvDump({ME: rank}).generate({"have": have})]
    assert header == HEADER | {"kind": "range", "next_sequence": 600}
    expected = 10
    for item in items:
        batch, _ = _of(item)
        assert batch.first_sequence == expected
        expected = batch.next_sequence
    assert (expected, len(items)) == (600, 3)


async def test_caller_with_all_events_gets_an_empty_range() -> None:
    rank = KvPublisher(None, block_size=1)
    rank.stored([1], [1], None)
    items = [item async for item in KvDump({ME: rank}).generate({"have": [[8, 0, 1]]})]
    assert items == [HEADER | {"kind": "range", "next_sequence": 1}]


@pytest.mark.parametrize("next_sequence", [-1, 2, 1 << 70])
async def test_unknown_sequence_gets_a_dump(next_sequence: int) -> None:
    rank = KvPublisher(None, block_size=1)
    rank.stored([1], [1], None)
    header, item = [item async for item in KvDump({ME: rank}).generate({"have": [[8, 0, next_sequence]]})]
    assert header["kind"] == "dump"
    assert len(_of(item)[1][0].hashes) == 1


@pytest.mark.parametrize("request_", [None, [], {"have": 3}, {"have": [3]}, {"have": [[1, 2, "3"]]}])
async def test_malformed_request_is_refused(request_: Any) -> None:
    with pytest.raises(InvalidRequest, match="next_sequence"):
        await anext(KvDump({}).generate(request_))
