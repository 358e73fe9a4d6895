"""The block cache: sharing, eviction and events."""

from __future__ import annotations

from typing import Protocol

from dynamo_redis.engines.base import AllBlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from dynamo_redis.engines.mock.kv_cache import BlockCache, BlockTable
from dynamo_redis.events.block_hashes import chain, local_hashes

BLOCK = 4


class Oracle(Protocol):
    """The `oracle` fixture."""

    stored: set[int]
    events: list[KvEvent]

    def __call__(self, event: KvEvent) -> None: ...


def _hashes(tokens: list[int]) -> list[int]:
    return chain(local_hashes(tokens, BLOCK))


def _store(cache: BlockCache, tokens: list[int]) -> BlockTable:
    """Store the blocks of a sequence whose tokens are all computed; return its table."""
    table = BlockTable()
    hashes = _hashes(tokens)
    held = cache.match(hashes, len(hashes))
    cache.hold(table, hashes[:held])
    assert cache.reserve(table, len(hashes) - held)
    cache.store(table, hashes[held:], tokens[held * BLOCK :])
    return table


def test_released_prefix_stays_and_is_found(oracle: Oracle) -> None:
    cache = BlockCache(8, BLOCK, oracle)
    tokens = list(range(12))
    cache.release(_store(cache, tokens))

    assert cache.active_count == 0
    assert cache.match(_hashes(tokens), 3) == 3
    assert cache.match(_hashes([*range(8), 99, 99, 99, 99]), 3) == 2
    assert oracle.events == [BlocksStored(tuple(_hashes(tokens)), None, tokens, BLOCK)]


def test_sequences_share_their_prefix(oracle: Oracle) -> None:
    cache = BlockCache(8, BLOCK, oracle)
    first = _store(cache, list(range(8)))
    second = _store(cache, [*range(8), 50, 51, 52, 53])

    assert cache.active_count == 3
    cache.release(first)
    assert cache.active_count == 3
    cache.release(second)
    assert (cache.active_count, cache.idle_count) == (0, 3)
    assert oracle.stored == cache.stored()


def test_block_computed_twice_is_stored_once(oracle: Oracle) -> None:
    cache = BlockCache(8, BLOCK, oracle)
    tokens = list(range(8))
    tables = [BlockTable(), BlockTable()]
    for table in tables:
        assert cache.reserve(table, 2)
    assert cache.active_count == 4
    for table in tables:
        cache.store(table, _hashes(tokens), tokens)

    assert cache.active_count == 2
    assert len(oracle.events) == 1


def test_least_recently_used_tail_is_evicted_first(oracle: Oracle) -> None:
    cache = BlockCache(4, BLOCK, oracle)
    old, recent = list(range(8)), list(range(100, 108))
    cache.release(_store(cache, old))
    cache.release(_store(cache, recent))
    cache.release(_store(cache, old))  # used again

    assert cache.reserve(BlockTable(), 1)
    assert oracle.events[-1] == BlocksRemoved((_hashes(recent)[1],))
    assert cache.reserve(BlockTable(), 2)
    assert oracle.events[-1] == BlocksRemoved((_hashes(recent)[0], _hashes(old)[1]))


def test_held_blocks_are_never_evicted(oracle: Oracle) -> None:
    cache = BlockCache(3, BLOCK, oracle)
    _store(cache, list(range(8)))
    table = BlockTable()

    assert not cache.reserve(table, 2)
    assert table.block_count == 0
    assert cache.reserve(table, 1)
    assert not cache.reserve(table, 1)
    assert cache.stored() == oracle.stored == set(_hashes(list(range(8))))


def test_clear_keeps_held_blocks(oracle: Oracle) -> None:
    cache = BlockCache(8, BLOCK, oracle)
    cache.release(_store(cache, [*range(4), 9, 9, 9, 9]))
    table = _store(cache, list(range(4)))

    assert cache.clear() == 1
    assert oracle.stored == cache.stored() == set(_hashes(list(range(4))))
    cache.release(table)
    assert cache.clear() == 1
    assert oracle.events[-1] == AllBlocksCleared()
    assert cache.stored() == oracle.stored == set()


def test_block_after_a_shared_one_has_it_as_parent(oracle: Oracle) -> None:
    """Another sequence has stored the first of two blocks while both were computed."""
    cache = BlockCache(8, BLOCK, oracle)
    tokens = list(range(8))
    table = BlockTable()
    assert cache.reserve(table, 2)
    _store(cache, tokens[:4])
    cache.store(table, _hashes(tokens), tokens)

    first, second = _hashes(tokens)
    assert oracle.events[-1] == BlocksStored((second,), first, tokens[4:], BLOCK)
    assert cache.active_count == 2
