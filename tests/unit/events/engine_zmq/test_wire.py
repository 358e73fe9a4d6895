"""The engines' wire format: messages of the engines' own publishers, and invalid ones."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_redis.events.engine_zmq.wire import (
    END_OF_REPLAY,
    Cleared,
    EngineEvent,
    EngineHash,
    MainGroup,
    Removed,
    Stored,
    decode_batch,
    join_removals,
    replay_request,
    split_message,
)
from dynamo_redis.wire.kv_event import DEVICE, DISK, HOST

OWN_FRAMES = Path(__file__).parents[3] / "vectors" / "zmq_kv_events.json"
GOLDEN_FRAMES = Path(__file__).parents[4].parent / "shared" / "data" / "kv-events" / "golden_frames.json"

A, B = 0x9E3779B97F4A7C15, 0x3C6EF372FE94F82A
CHILD, OTHER = 0xDAA66D2C7DDF743F, 0xB54CDA58FBBEE87E
BRANCH = [0x78DDE6E5FD29F054, 0x1715609F7C746C69]


def stored(hashes: list[int], parent: int | None, first_token: int, tier: int = DEVICE) -> Stored:
    tokens = list(range(first_token, first_token + 16 * len(hashes)))
    return Stored(list(hashes), parent, tokens, 16, tier, None, None, full_attention=True)


SAID: dict[str, list[EngineEvent]] = {
    "store two root blocks": [stored([A, B], None, 0)],
    "store one child block": [stored([CHILD], B, 32)],
    "store a branch and remove a leaf in one batch": [
        stored(BRANCH, A, 1000),
        Removed([CHILD], DEVICE, None),
    ],
    "empty batch": [],
    "offloaded to CPU tier then removed from GPU": [stored([A], None, 0, HOST), Removed([B], DEVICE, None)],
    "medium unspecified": [stored([OTHER], None, 2000)],
    "all cleared": [Cleared()],
    "store after clear": [stored([A, B], None, 0)],
}
"""The events of each golden message, with integer hashes; the 32-byte ones repeat the eight bytes four
times."""


def as_int(block: EngineHash) -> int:
    if isinstance(block, int):
        return block
    assert block == block[:8] * 4
    return int.from_bytes(block[:8], "big")


def with_int_hashes(event: EngineEvent) -> EngineEvent:
    if isinstance(event, Cleared):
        return event
    block_hashes: list[EngineHash] = [as_int(block) for block in event.block_hashes]
    if isinstance(event, Removed):
        return replace(event, block_hashes=block_hashes)
    parent = None if event.parent_hash is None else as_int(event.parent_hash)
    return replace(event, block_hashes=block_hashes, parent_hash=parent)


@pytest.mark.skipif(not GOLDEN_FRAMES.exists(), reason="the engines' recorded messages are not here")
def test_golden_messages_of_engines_are_decoded() -> None:
    frames = json.loads(GOLDEN_FRAMES.read_text())
    assert len(frames) == 32
    for number, frame in enumerate(frames):
        sequence_bytes, payload_bytes = (bytes.fromhex(frame[name]) for name in ("seq_hex", "payload_hex"))
        sequence, payload = split_message([frame["topic"].encode(), sequence_bytes, payload_bytes])
        batch = decode_batch(payload)
        assert sequence == number % 8
        assert batch.dp_rank == (1 if "dp rank 1" in frame["source"] else 0)
        assert not batch.left_out
        expected_type = bytes if "sha256" in frame["source"] else int
        assert all(isinstance(block, expected_type) for event in batch.events for block in hashes_of(event))
        assert [with_int_hashes(event) for event in batch.events] == SAID[frame["what"]], frame


def hashes_of(event: EngineEvent) -> list[EngineHash]:
    return [] if isinstance(event, Cleared) else event.block_hashes


@pytest.mark.parametrize("vector", json.loads(OWN_FRAMES.read_text())["messages"], ids=lambda v: v["what"])
def test_own_messages_are_decoded(vector: dict[str, Any]) -> None:
    batch = decode_batch(bytes.fromhex(vector["payload_hex"]))
    assert [repr(event) for event in batch.events] == vector["events"]
    assert batch.left_out == Counter(vector["left_out"])


def batch_of(*events: Any, **outer: Any) -> bytes:
    packed: bytes = msgpack.packb({"ts": 1.5, "events": events, **outer} if outer else [1.5, events])
    return packed


STORED = {
    "type": "BlockStored",
    "block_hashes": [1, 2],
    "parent_block_hash": None,
    "token_ids": [1, 2, 3, 4],
    "block_size": 2,
}


def test_payload_may_be_a_map_with_new_fields() -> None:
    payload = batch_of(STORED | {"colour": {"deep": [1]}}, data_parallel_rank=3, later="field")
    batch = decode_batch(payload)
    assert batch.dp_rank == 3
    assert batch.events == [Stored([1, 2], None, [1, 2, 3, 4], 2, DEVICE, None, None, full_attention=True)]


def test_array_may_have_more_fields() -> None:
    removed = ["BlockRemoved", [7], "CPU", 1, "a later field", 2]
    assert decode_batch(batch_of(removed)).events == [Removed([7], HOST, 1)]


def test_unknown_events_are_left_out_and_counted() -> None:
    batch = decode_batch(
        batch_of(
            {"type": "BlockFrozen", "block_hashes": 7},
            STORED | {"medium": "TAPE"},
            {"type": "BlockRemoved", "block_hashes": [5], "medium": "STORAGE"},
        )
    )
    assert batch.events == [Removed([5], DISK, None)]
    assert batch.left_out == {"unknown_type": 1, "unknown_medium": 1}


def test_signed_hashes_become_unsigned() -> None:
    batch = decode_batch(batch_of({"type": "BlockRemoved", "block_hashes": [-1, (1 << 64) - 1]}))
    assert batch.events == [Removed([(1 << 64) - 1] * 2, DEVICE, None)]


def test_blocks_with_extra_keys_are_left_out() -> None:
    """An image or a cache salt changes a block's content, but not its token ids."""
    salted = STORED | {"extra_keys": [None, ["salt"]]}
    adapter = STORED | {"lora_id": 4, "lora_name": "poet", "extra_keys": [["poet"], ["poet"]]}
    unnamed = STORED | {"lora_id": 4}
    batch = decode_batch(batch_of(salted, adapter, unnamed))
    assert [(event.block_hashes, event.lora_name) for event in batch.events if isinstance(event, Stored)] == [
        ([1], None),
        ([1, 2], "poet"),
    ]
    first = batch.events[0]
    assert isinstance(first, Stored)
    assert (first.token_ids, first.nameless_hashes) == ([1, 2], [2])
    assert batch.left_out == {"extra_keys": 1, "unnamed_adapter": 2}


def test_removal_in_a_sliding_window_group_is_ignored() -> None:
    group = MainGroup()
    window = STORED | {
        "group_idx": 0,
        "kv_cache_spec_kind": "sliding_window",
        "kv_cache_spec_sliding_window": 1024,
    }
    full = STORED | {"group_idx": 1, "kv_cache_spec_kind": "full_attention"}
    second_full = STORED | {"group_idx": 2, "kv_cache_spec_kind": "full_attention"}
    removals = [{"type": "BlockRemoved", "block_hashes": [1], "group_idx": index} for index in range(3)]
    events = decode_batch(batch_of(removals[1], window, full, second_full, *removals)).events
    assert [group.includes(event) for event in events] == [False, False, True, False, False, True, False]
    assert group.includes(Cleared())
    group.forget()
    assert not group.includes(events[-2])


def test_events_without_a_group_are_of_the_main_group() -> None:
    group = MainGroup()
    events = decode_batch(batch_of(STORED, {"type": "BlockRemoved", "block_hashes": [1]})).events
    assert all(group.includes(event) for event in events)


def test_messages_and_replay_requests_are_split() -> None:
    assert split_message([b"", (5).to_bytes(8, "big"), b"payload"]) == (5, b"payload")
    assert split_message([b"", b"\xff" * 8, b""]) == (END_OF_REPLAY, b"")
    assert replay_request(258) == [b"", b"\0\0\0\0\0\0\1\2"]
    for frames in ([], [b"x"], [b"", b"short", b"payload"]):
        with pytest.raises(ValueError):
            split_message(frames)


integers = st.integers(-(1 << 63), (1 << 64) - 1)
scalars = st.none() | st.booleans() | integers | st.text(max_size=4) | st.binary(max_size=4)
anything = st.recursive(
    scalars | st.floats(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
FIELDS = ["type", "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium"]
FIELDS += ["lora_name", "extra_keys", "group_idx", "kv_cache_spec_kind", "kv_cache_spec_sliding_window"]
broken_events = st.builds(
    lambda kind, event, changed: event | changed | {"type": kind},
    st.sampled_from(["BlockStored", "BlockRemoved", "AllBlocksCleared", "Other"]),
    st.just(STORED),
    st.dictionaries(st.sampled_from(FIELDS), anything, max_size=3),
)
broken_batches = anything | st.tuples(st.just(1.0), st.lists(broken_events | anything, max_size=3), scalars)


@given(st.binary(max_size=64) | broken_batches.map(lambda batch: msgpack.packb(batch)))
def test_invalid_payload_is_a_value_error(payload: bytes) -> None:
    try:
        batch = decode_batch(payload)
    except ValueError:
        return
    group = MainGroup()
    for event in batch.events:
        group.includes(event)
        assert all(isinstance(block, bytes) or 0 <= block < 1 << 64 for block in hashes_of(event))


def test_consecutive_removals_are_one_event() -> None:
    first, last = stored([1], None, 0), stored([9], None, 0)
    events: list[EngineEvent] = [
        Removed([1], DEVICE, None),
        Removed([2, 3], DEVICE, None),
        first,
        Removed([4], DEVICE, 0),
        Removed([5], DEVICE, 1),
        Removed([6], HOST, 1),
        Cleared(),
        last,
        Removed([7], DEVICE, None),
    ]
    assert list(join_removals(events)) == [Removed([1, 2, 3], DEVICE, None), *events[2:]]
