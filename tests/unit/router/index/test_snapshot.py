"""Snapshots: what is read is what was written, or an error."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_redis.errors import InvalidRecord, SchemaMismatch
from dynamo_redis.router.base import Matched, Worker
from dynamo_redis.router.index import snapshot as codec
from dynamo_redis.router.index.prefix_index import KvIndex
from dynamo_redis.router.index.snapshot import (
    IndexSnapshot,
    decode_snapshot,
    encode_snapshot,
    snapshot_positions,
)
from dynamo_redis.store.event_base import EntryId
from dynamo_redis.wire.event import PublisherId
from dynamo_redis.wire.kv_event import HOST, TIERS, removed, stored

POSITION = EntryId("1763800000000-7")
PUBLISHERS = {PublisherId(1, 99, 0): 12, PublisherId((1 << 63) - 1, 5, 3): 0}
VECTOR = Path(__file__).parents[3] / "vectors" / "index_snapshot.bin"


def encoded(index: KvIndex) -> bytes:
    return b"".join(encode_snapshot(IndexSnapshot((POSITION,), PUBLISHERS, index)))


def some_index(seed: int = 3, blocks: int = 60) -> KvIndex:
    rng, index = random.Random(seed), KvIndex()
    for number in range(9):
        hashes = [rng.getrandbits(64) for _ in range(blocks)]
        for worker in rng.sample(range(9), 1 + number % 3):
            index.apply(Worker(worker + 1, number % 2), [stored(hashes), stored(hashes[:5], HOST)])
    index.apply(Worker(1), [stored(range(1, 33)), removed([4], inside=True)])
    index.remove(Worker(3))
    return index


def test_snapshot_is_read_as_written() -> None:
    index = some_index()
    read = decode_snapshot(encoded(index))
    assert (read.positions, read.publishers) == ((POSITION,), PUBLISHERS)
    assert set(read.index.workers()) == set(index.workers())
    assert read.index.block_counts() == index.block_counts()
    for worker in index.workers():
        assert read.index.blocks_of(worker) == index.blocks_of(worker)


def test_holes_are_kept() -> None:
    """A restored index would else gallop over them."""
    read = decode_snapshot(encoded(some_index())).index
    assert read.find(range(1, 33)) == {Worker(1): Matched(3)}


def test_an_empty_index_has_a_snapshot() -> None:
    assert decode_snapshot(encoded(KvIndex())).index.workers() == []


def test_a_snapshot_shows_the_index_as_it_was_at_the_first_piece() -> None:
    index = some_index()
    truth = {worker: index.blocks_of(worker) for worker in index.workers()}
    pieces = encode_snapshot(IndexSnapshot((POSITION,), PUBLISHERS, index))
    content = next(pieces)
    index.apply(Worker(1), [stored(range(500, 600))])
    index.remove(Worker(2))
    while index.sweep(100):
        pass
    index.apply(Worker(77), [stored([1, 2, 3])])
    read = decode_snapshot(content + b"".join(pieces)).index
    assert {worker: read.blocks_of(worker) for worker in read.workers()} == truth


def test_a_large_index_comes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_PIECE_COUNT", 16)
    index = some_index()
    pieces = list(encode_snapshot(IndexSnapshot((POSITION,), PUBLISHERS, index)))
    assert max(map(len, pieces[2:])) < 400
    read = decode_snapshot(b"".join(pieces)).index
    assert read.block_counts() == index.block_counts()


def test_a_block_takes_little_more_than_its_hash() -> None:
    index = KvIndex()
    rng = random.Random(1)
    for number in range(64):
        index.apply(Worker(number), [stored(rng.getrandbits(64) for _ in range(500))])
    assert len(encoded(index)) < 8.1 * index.block_count


def test_the_bounds_are_the_reader_s() -> None:
    index = KvIndex()
    index.apply(Worker(1), [stored(range(100))])
    read = decode_snapshot(encoded(index), max_blocks=50, prune_target_ratio=0.5).index
    while read.sweep(10):
        pass
    assert read.block_count == 25


def test_the_position_stands_at_the_beginning() -> None:
    content = encoded(some_index())
    assert snapshot_positions(content) == snapshot_positions(content[:60]) == (POSITION,)
    for cut in (b"", content[:9], b"x" + content[1:60]):
        with pytest.raises(ValueError, match="not a snapshot"):
            snapshot_positions(cut)


def test_a_snapshot_of_shards_has_a_position_for_each() -> None:
    positions = (POSITION, EntryId("0-0"), EntryId("5-1"))
    content = b"".join(encode_snapshot(IndexSnapshot(positions, PUBLISHERS, some_index())))
    assert snapshot_positions(content) == decode_snapshot(content).positions == positions
    for broken in ([], ["1-1"], ["1-1", "x"], ["1-1", 2], "1-1"):
        with pytest.raises(InvalidRecord):
            snapshot_positions(codec._MAGIC + codec._piece([codec.SHARDS_VERSION, broken]))


def test_other_version_is_distinct_from_damage() -> None:
    content = codec._MAGIC + codec._piece([3, POSITION])
    for read in (decode_snapshot, snapshot_positions):
        with pytest.raises(SchemaMismatch):
            read(content)


def test_cut_off_anywhere_it_is_none() -> None:
    content = encoded(some_index(blocks=3))
    for length in range(len(content)):
        with pytest.raises(ValueError, match="not a snapshot"):
            decode_snapshot(content[:length])
    with pytest.raises(ValueError, match="not a snapshot"):
        decode_snapshot(content + b"\0")


def test_with_one_bit_changed_anywhere_it_is_none() -> None:
    content = encoded(some_index(blocks=2))
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        with pytest.raises((ValueError, SchemaMismatch)):
            decode_snapshot(bytes(damaged))


def test_pieces_of_another_snapshot_do_not_fit() -> None:
    """Each is whole, and yet the end tells that some are missing, or too many."""
    one = list(encode_snapshot(IndexSnapshot((POSITION,), {}, some_index(1))))
    other = list(encode_snapshot(IndexSnapshot((POSITION,), {}, some_index(2, blocks=9))))
    for pieces in (
        [*one[:2], one[-1]],
        [*one, one[-1]],
        [*one[:-1], other[-1]],
        [*one[:2], *one[2:], one[2]],
    ):
        with pytest.raises(ValueError, match="not a snapshot"):
            decode_snapshot(b"".join(pieces))


block_piece = [0, [b"\1"], [0], [1], b"12345678"]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, 3),
        (0, -1),
        (0, "device"),
        (1, [b"\4"]),
        (1, [b"\0"]),
        (1, ["x"]),
        (1, 5),
        (2, [1]),
        (2, [-1]),
        (2, [None]),
        (2, []),
        (3, [2]),
        (3, [-1]),
        (3, [True]),
        (3, 1),
        (4, b"1234"),
        (4, b""),
        (4, None),
    ],
)
def test_wrong_fields_with_a_right_checksum_are_refused(place: int, value: object) -> None:
    def made(piece: list[object]) -> bytes:
        head = codec._MAGIC + codec._piece([1, POSITION]) + codec._piece([[], [[1, 0]], b""])
        return head + codec._piece(piece) + codec._piece([[1, 0, 0]])

    assert decode_snapshot(made(list(block_piece))).index.block_count == 1
    with pytest.raises(ValueError, match="not a snapshot"):
        decode_snapshot(made([*block_piece[:place], value, *block_piece[place + 1 :]]))


scalars = (
    st.none() | st.booleans() | st.integers(-5, 1 << 64 - 1) | st.text(max_size=3) | st.binary(max_size=9)
)
anything = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4), max_leaves=6)


@settings(max_examples=60, deadline=None)
@given(pieces=st.lists(st.lists(anything, min_size=1, max_size=5), max_size=3))
def test_well_formed_nonsense_is_refused(pieces: list[list[object]]) -> None:
    content = codec._MAGIC + codec._piece([1, POSITION]) + b"".join(map(codec._piece, pieces))
    try:
        decode_snapshot(content)
    except (ValueError, SchemaMismatch):
        return
    assert len(pieces) >= 2, "only what has workers and an end is one"


@given(content=st.binary(max_size=200))
def test_noise_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="not a snapshot"):
        decode_snapshot(content)


def test_a_snapshot_of_this_version_is_read_for_ever() -> None:
    """Written by the release that made version 1."""
    read = decode_snapshot(VECTOR.read_bytes())
    assert (read.positions, read.publishers) == ((POSITION,), PUBLISHERS)
    truth = some_index()
    for worker in truth.workers():
        assert {tier: read.index.blocks_of(worker)[tier] for tier in TIERS} == truth.blocks_of(worker)
