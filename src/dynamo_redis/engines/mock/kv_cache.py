"""The bookkeeping of a paged KV cache: which blocks are held, shared, idle and evicted. Pure.

A sequence holds *private* blocks (reserved, and not full yet) and *stored* blocks (full, named by their
sequence hash, shared by all sequences with that prefix). A stored block that no sequence holds is *idle*: it
stays until its place is needed. The least recently used idle block is evicted first.

Invariant: the predecessors of a stored block are stored. A sequence that holds a block holds its
predecessors, and blocks are released in reverse order: an idle block is always older in LRU order than the
block before it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from dynamo_redis.engines.base import AllBlocksCleared, BlocksRemoved, BlocksStored, KvEventSink


@dataclass(slots=True, eq=False)
class BlockTable:
    """The blocks of one sequence: the stored blocks of its prefix, in order, and the number of private
    ones."""

    stored: list[int] = field(default_factory=list)
    private_count: int = 0
    cache_salt: str | None = None
    """Only sequences with the same salt have the same hashes."""

    @property
    def block_count(self) -> int:
        """The number of all blocks that the sequence holds."""
        return len(self.stored) + self.private_count


class BlockCache:
    """A cache of `total_blocks` blocks of `block_size` tokens each.

    Every change of the stored blocks is reported to `events`, which may be replaced at any time.
    """

    def __init__(self, total_blocks: int, block_size: int, events: KvEventSink | None = None) -> None:
        self.total_blocks = total_blocks
        self.block_size = block_size
        self.release_count = 0  # grows whenever blocks may have become available
        self.events: KvEventSink = events or (lambda _: None)
        self._holders: dict[int, int] = {}  # stored blocks in use → number of sequences that hold them
        self._idle: OrderedDict[int, None] = OrderedDict()  # stored blocks not in use, oldest first
        self._private_count = 0
        self._evicted: list[int] | None = None  # see `hold_removals`

    def __repr__(self) -> str:
        return f"<BlockCache {self.active_count} active, {self.idle_count} idle of {self.total_blocks}>"

    @property
    def active_count(self) -> int:
        """The number of blocks that sequences hold."""
        return len(self._holders) + self._private_count

    @property
    def idle_count(self) -> int:
        """The number of stored blocks that no sequence holds."""
        return len(self._idle)

    def stored(self) -> set[int]:
        """Return the hashes of all stored blocks."""
        return self._holders.keys() | self._idle.keys()

    def match(self, hashes: Sequence[int], limit: int) -> int:
        """Return the number of stored blocks from the first on, at most `limit`."""
        for index in range(limit):
            if hashes[index] not in self._holders and hashes[index] not in self._idle:
                return index
        return limit

    def hold(self, table: BlockTable, hashes: Sequence[int]) -> None:
        """Add these stored blocks, a prefix that `match` found, to the end of a table."""
        for block in hashes:
            self._idle.pop(block, None)
            self._holders[block] = self._holders.get(block, 0) + 1
        table.stored.extend(hashes)

    def reserve(self, table: BlockTable, count: int) -> bool:
        """Add `count` private blocks to a table, evicting idle ones as needed. Returns False, and adds none,
        if there are not enough."""
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

    def hold_removals(self) -> None:
        """Collect the blocks that `reserve` evicts, until `report_removals`. Nothing may be stored
        meanwhile."""
        self._evicted = []

    def report_removals(self) -> None:
        """Report the collected blocks as one event."""
        evicted, self._evicted = self._evicted, None
        if evicted:
            self.events(BlocksRemoved(tuple(evicted)))

    def store(self, table: BlockTable, hashes: Sequence[int], token_ids: Sequence[int]) -> None:
        """Make a table's next private blocks, which are full of `token_ids`, stored blocks with these hashes.

        A block that another sequence has stored meanwhile is shared, and the private copy is freed.
        """
        parent = table.stored[-1] if table.stored else None
        known_count = self.match(
            hashes, len(hashes)
        )  # by the invariant, the blocks after the first unknown one are unknown, too
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
            self.events(BlocksStored(new, parent, tokens, self.block_size, table.cache_salt))

    def release(self, table: BlockTable) -> None:
        """Empty a table; its stored blocks that no other sequence holds become idle."""
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
        """Evict all idle blocks; return their number."""
        dropped = tuple(self._idle)
        self._idle.clear()
        if not self._holders:
            self.events(AllBlocksCleared())
        elif dropped:
            self.events(BlocksRemoved(dropped))
        return len(dropped)
