"""An index as bytes, with its position in each shard of the event stream. Pure.

    magic, then pieces: length of the payload (u32), its xxh3_64 (u64), the payload (msgpack); little-endian
    1.   [1, position], or [2, [position of each shard …]] if there are several
    2.   [[instance_id, epoch, dp_rank, next_sequence] …, [[instance_id, dp_rank] | nil …], set with holes]
    3. … [tier, new sets, numbers of sets, number of blocks of each, the blocks]
    last [number of blocks on each tier]

Sets of workers are little-endian binaries, bit i for the i-th worker of piece 2; they are numbered as they
first appear. Blocks are ordered by set, each as eight bytes. A piece has 65,536 of them at most, so that
neither side works long without a pause. Any error, down to one bit, makes the whole an InvalidRecord.
"""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from struct import Struct
from typing import Any, Final

from xxhash import xxh3_64_intdigest

from dynamo_redis.errors import InvalidRecord, SchemaMismatch
from dynamo_redis.router.base import Worker
from dynamo_redis.router.index.prefix_index import MAX_BLOCKS, PRUNE_TARGET_RATIO, IndexState, KvIndex
from dynamo_redis.store.event_base import EntryId, check_entry_id
from dynamo_redis.wire.codec import pack_known, unpack
from dynamo_redis.wire.event import PublisherId
from dynamo_redis.wire.kv_event import TIERS

SNAPSHOT_VERSION: Final = 1
SHARDS_VERSION: Final = 2
"""Version of a snapshot with several positions, which releases without shards do not read."""

_MAGIC = b"DYNKVIDX"
_HEAD = Struct("<IQ")
_WHAT = "a snapshot of an index"
_PIECE_COUNT = 65_536
_U64_END = 1 << 64


@dataclass(slots=True)
class IndexSnapshot:
    """An index, the entry that was applied last of each shard, and each publisher's next sequence."""

    positions: tuple[EntryId, ...]
    publishers: dict[PublisherId, int]
    index: KvIndex


def encode_snapshot(snapshot: IndexSnapshot) -> Iterator[bytes]:
    """Yield the pieces of a snapshot.

    Taking the first piece copies the index, in some 20 ms for a million blocks; the snapshot shows that
    moment. Each further piece takes some milliseconds, and the index may change in between. For the event
    loop's own thread, with which it shares a packer.
    """
    state = snapshot.index.copy_state()
    publishers = [[*publisher, sequence] for publisher, sequence in snapshot.publishers.items()]
    positions = snapshot.positions
    if len(positions) == 1:
        yield _MAGIC + _piece([SNAPSHOT_VERSION, positions[0]])
    else:
        yield _MAGIC + _piece([SHARDS_VERSION, positions])
    yield _piece([publishers, state.workers, _set_to_bytes(state.holed)])
    live = state.live
    numbers: dict[int, int] = {}
    counts = []
    for tier, held in enumerate(state.tiers):
        counts.append(0)
        blocks = iter(held.items())
        for _ in range(0, len(held), _PIECE_COUNT):
            fields = _blocks(tier, islice(blocks, _PIECE_COUNT), live, numbers)
            counts[tier] += sum(fields[3])
            yield _piece(fields)
    yield _piece([counts])


def decode_snapshot(
    content: bytes, *, max_blocks: int = MAX_BLOCKS, prune_target_ratio: float = PRUNE_TARGET_RATIO
) -> IndexSnapshot:
    """Read a snapshot; the index gets these bounds.

    A million blocks take some 200 ms, in steps of some milliseconds: call it in a thread, it shares nothing.
    Raises InvalidRecord if the content differs from the encoded one, SchemaMismatch for another version.
    """
    pieces = _pieces(content)
    positions = _read_positions(next(pieces, None))
    try:
        numbered, listed, holed = next(pieces)[:3]
        publishers = {
            PublisherId(_number(instance_id), _number(epoch), _number(dp_rank)): _number(sequence)
            for instance_id, epoch, dp_rank, sequence in numbered
        }
        workers = [None if worker is None else Worker(*map(_number, worker)) for worker in listed]
        named = [worker for worker in workers if worker is not None]
        if len(set(named)) != len(named):
            raise ValueError("a worker is listed twice")
        state = IndexState(workers, 0, tuple({} for _ in TIERS))
        state = replace(state, holed=_read_set(holed, state.live))
        sets: list[int] = []
        sizes: Counter[int] = Counter()
        counts = None
        for fields in pieces:
            if counts is not None:
                raise ValueError("something follows its end")
            if len(fields) == 1:
                counts = fields[0]
            else:
                _read_blocks(fields, sets, sizes, state)
        if counts != [len(held) for held in state.tiers]:
            raise ValueError("blocks are missing")
    except InvalidRecord:
        raise
    except (TypeError, IndexError, StopIteration, ValueError, OverflowError) as exc:
        raise InvalidRecord(_WHAT, repr(exc)) from exc
    index = KvIndex.of_state(state, sizes, max_blocks=max_blocks, prune_target_ratio=prune_target_ratio)
    return IndexSnapshot(positions, publishers, index)


def snapshot_positions(head: bytes) -> tuple[EntryId, ...]:
    """Return the positions of the snapshot that begins with `head`: its first 16 KiB are enough.

    Raises InvalidRecord if it begins no snapshot, SchemaMismatch for another version.
    """
    return _read_positions(next(_pieces(head), None))


def _blocks(tier: int, blocks: Iterable[tuple[int, int]], live: int, numbers: dict[int, int]) -> list[Any]:
    """Return the fields of a piece: blocks by the set of live workers that holds them, without blocks that no
    live worker holds. New sets are added to `numbers`."""
    by_mask: dict[int, list[int]] = {}
    for block, mask in blocks:
        group = by_mask.get(mask)
        if group is None:
            group = by_mask[mask] = []
        group.append(block)
    groups: dict[int, list[int]] = {}
    for mask, group in by_mask.items():
        if kept := mask & live:
            groups.setdefault(kept, []).extend(group)
    new = []
    for mask in groups:
        if mask not in numbers:
            numbers[mask] = len(numbers)
            new.append(_set_to_bytes(mask))
    hashes = array("Q")
    for group in groups.values():
        hashes.extend(group)
    if sys.byteorder == "big":
        hashes.byteswap()
    return [
        tier,
        new,
        [numbers[mask] for mask in groups],
        [len(group) for group in groups.values()],
        hashes.tobytes(),
    ]


def _piece(fields: Sequence[Any]) -> bytes:
    """Pack one piece: head and payload."""
    payload = pack_known(fields)
    return _HEAD.pack(len(payload), xxh3_64_intdigest(payload)) + payload


def _pieces(content: bytes) -> Iterator[list[Any]]:
    """Yield the fields of each piece. Raises InvalidRecord at one that is not whole."""
    view = memoryview(content)
    if view[: len(_MAGIC)] != _MAGIC:
        raise InvalidRecord(_WHAT, "it begins otherwise")
    offset = len(_MAGIC)
    while offset < len(view):
        if len(view) - offset < _HEAD.size:
            raise InvalidRecord(_WHAT, "cut off")
        length, checksum = _HEAD.unpack_from(view, offset)
        offset += _HEAD.size
        payload = view[offset : offset + length]
        offset += length
        if len(payload) != length or xxh3_64_intdigest(payload) != checksum:
            raise InvalidRecord(_WHAT, "damaged, or cut off")
        try:
            fields = unpack(payload)
        except ValueError as exc:
            raise InvalidRecord(_WHAT, exc) from exc
        if not isinstance(fields, list) or not fields:
            raise InvalidRecord(_WHAT, "a piece is no array")
        yield fields


def _read_positions(fields: list[Any] | None) -> tuple[EntryId, ...]:
    """Return the positions in piece 1. Raises InvalidRecord, SchemaMismatch."""
    match fields:
        case None | []:
            raise InvalidRecord(_WHAT, "empty")
        case [version, str(position), *_] if version == SNAPSHOT_VERSION:
            return (check_entry_id(position, _WHAT),)
        case [version, [str(), str(), *_] as positions, *_] if version == SHARDS_VERSION:
            return tuple(check_entry_id(str(position), _WHAT) for position in positions)
        case [version, *_] if version not in (SNAPSHOT_VERSION, SHARDS_VERSION):
            raise SchemaMismatch(_WHAT, version, SNAPSHOT_VERSION)
    raise InvalidRecord(_WHAT, "no position")


def _read_blocks(fields: list[Any], sets: list[int], sizes: Counter[int], state: IndexState) -> None:
    """Add a piece's blocks to its tier, its new sets to `sets`, and the blocks of each set to `sizes`."""
    tier, new, numbers, counts, content = fields[:5]
    live = state.live
    sets.extend(_read_set(mask, live) for mask in new)
    hashes = array("Q", content)
    if sys.byteorder == "big":
        hashes.byteswap()
    if len(numbers) != len(counts) or sum(counts) != len(hashes) or tier not in TIERS:
        raise ValueError("blocks and their sets do not go together")
    held = state.tiers[tier]
    start = 0
    for number, count in zip(numbers, counts, strict=True):
        mask, end = sets[_number(number)], start + _number(count)
        if not mask:
            raise ValueError("no worker holds some blocks")
        held.update(dict.fromkeys(hashes[start:end], mask))
        sizes[mask] += count
        start = end


def _set_to_bytes(mask: int) -> bytes:
    return mask.to_bytes((mask.bit_length() + 7) // 8, "little")


def _read_set(content: bytes, live: int) -> int:
    """Read a set of workers. Raises ValueError if one of them does not exist."""
    mask = int.from_bytes(content, "little")
    if mask & ~live:
        raise ValueError("a set has workers that do not exist")
    return mask


def _number(value: Any) -> int:
    """Return `value` if it is a number of 64 bits. Raises TypeError for anything else."""
    if type(value) is not int or not 0 <= value < _U64_END:
        raise TypeError("a number is missing")
    return value
