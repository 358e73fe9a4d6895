"""A paged KV cache as bookkeeping: which blocks are held, shared, idle and evicted. Pure.

A sequence holds *private* blocks (reserved; being filled, or not whole) and *stored* ones (whole, named by
their sequence hash, shared by all sequences with that prefix). A stored block that nobody holds is *idle*:
it stays until its room is needed, least recently used first.

Invariant: a stored block's predecessors are stored. Whoever holds a block holds its predecessors, and blocks
are released last first, so that an idle block is always older in LRU order than the block before it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from dynamo_redis.engines.base import AllBlocksCleared, BlocksRemoved, BlocksStored, KvEventSink


def _ignore(_: object) -> None:
    pass


@dataclass(slots=True, eq=False)
class BlockTable:
    """What one sequence holds: the stored blocks of its prefix, in order, and a number of private ones."""

    stored: list[int] = field(default_factory=list)
    private_count: int = 0

    @property
    def block_count(self) -> int:
        """All blocks the sequence holds."""
        return len(self.stored) + self.private_count


class BlockCache:
    """`total_blocks` blocks of `block_size` tokens. Every change of what is stored is told to `events`,
    which may be set at any time."""

    def __init__(self, total_blocks: int, block_size: int, events: KvEventSink | None = None) -> None:
        self.total_blocks = total_blocks
        self.block_size = block_size
        self.release_count = 0  # grows whenever room may have become available
        self.events: KvEventSink = events or _ignore
        self._holders: dict[int, int] = {}  # stored blocks in use → number of sequences that hold them
        self._idle: OrderedDict[int, None] = OrderedDict()  # stored blocks not in use, oldest first
        self._private_count = 0
        self._evicted: list[int] | None = None  # what is to be told at the end of `one_removal`

    def __repr__(self) -> str:
        return f"<BlockCache {self.active_count} active, {self.idle_count} idle of {self.total_blocks}>"

    @property
    def active_count(self) -> int:
        """Blocks that some sequence holds."""
        return len(self._holders) + self._private_count

    @property
    def idle_count(self) -> int:
        """Stored blocks that no sequence holds."""
        return len(self._idle)

    def stored(self) -> set[int]:
        """The hashes of all stored blocks."""
        return self._holders.keys() | self._idle.keys()

    def match(self, hashes: Sequence[int], limit: int) -> int:
        """How many of the first `limit` blocks are stored."""
        for index in range(limit):
            if hashes[index] not in self._holders and hashes[index] not in self._idle:
                return index
        return limit

    def hold(self, table: BlockTable, hashes: Sequence[int]) -> None:
        """Let an empty table hold these stored blocks, a prefix that `match` found."""
        for block in hashes:
            self._idle.pop(block, None)
            self._holders[block] = self._holders.get(block, 0) + 1
        table.stored.extend(hashes)

    def reserve(self, table: BlockTable, count: int) -> bool:
        """Give the table `count` private blocks, evicting idle ones as needed. All or nothing."""
        free_count = self.total_blocks - self.active_count - len(self._idle)
        missing_count = count - free_count
        if missing_count > len(self._idle):
            return False
        if missing_count > 0:
            evicted = tuple(self._idle.popitem(last=False)[0] for _ in range(missing_count))
            if self._evicted is None:
                self.events(BlocksRemoved(evicted))
            else:
                self._evicted += evicted
        self._private_count += count
        table.private_count += count
        return True

    @contextmanager
    def one_removal(self) -> Iterator[None]:
        """Within the block nothing is stored; what `reserve` evicts is told as one event at its end."""
        evicted: list[int] = []
        self._evicted = evicted
        try:
            yield
        finally:
            self._evicted = None
            if evicted:
                self.events(BlocksRemoved(tuple(evicted)))

    def store(self, table: BlockTable, hashes: Sequence[int], token_ids: Sequence[int]) -> None:
        """The table's next private blocks are whole, and hold `token_ids`: name and share them.

        A block that another sequence has stored meanwhile is shared, and the private copy given up.
        """
        parent = table.stored[-1] if table.stored else None
        known_count = self.match(hashes, len(hashes))  # by the invariant, all after the first unknown are too
        self.hold(table, hashes[:known_count])
        new = tuple(hashes[known_count:])
        for block in new:
            self._holders[block] = 1
        table.stored.extend(new)
        table.private_count -= len(hashes)
        self._private_count -= len(hashes)
        if known_count:
            parent = hashes[known_count - 1]
            self.release_count += 1
        if new:
            tokens = token_ids[known_count * self.block_size :] if known_count else token_ids
            self.events(BlocksStored(new, parent, tokens, self.block_size))

    def release(self, table: BlockTable) -> None:
        """Take everything back from a table; its stored blocks nobody else holds become idle."""
        for block in reversed(table.stored):
            holders = self._holders[block] - 1
            if holders:
                self._holders[block] = holders
            else:
                del self._holders[block]
                self._idle[block] = None
        self._private_count -= table.private_count
        table.stored.clear()
        table.private_count = 0
        self.release_count += 1

    def clear(self) -> int:
        """Forget all idle blocks; answers how many."""
        dropped = tuple(self._idle)
        self._idle.clear()
        if not self._holders:
            self.events(AllBlocksCleared())
        elif dropped:
            self.events(BlocksRemoved(dropped))
        return len(dropped)
